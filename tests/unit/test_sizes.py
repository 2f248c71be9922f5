"""What `make lint` prints is counted right."""

from benchmarks.sizes import measure, report

SOURCE = '''"""Not a comment: # this."""

# A comment.
def longest(a: int, b):  # another, behind code
    text = "# no comment"
    try:
        return text
    except ValueError:
        return a


class Pair:
    first: int = 1

    def longest(self, c: int) -> None: ...
'''


def test_a_file_is_counted_as_by_hand() -> None:
    sizes = measure({"actors/config.py": SOURCE, "actors/data/__init__.py": '"""A folder."""\n'})
    assert sizes.lines == {"actors/config.py": 15, "actors/data/__init__.py": 1}
    assert sizes.functions == {"actors/config.py:longest": 6, "actors/config.py:15": 1}
    assert (sizes.comments, sizes.handlers, sizes.arguments, sizes.annotated, sizes.keys) == (2, 1, 3, 2, 1)
    assert (sizes.above(5), sizes.above(6)) == (0.5, 0)


def test_what_is_printed_names_folders_without_their_init_and_the_way_to_the_gradient() -> None:
    lines = report(measure({"actors/config.py": SOURCE, "actors/data/__init__.py": ""}), ["actors/config.py"])
    assert "modules 1 in 1 folders: actors 1" in lines
    assert lines[-1] == "from a prompt to a gradient: 1 modules, 15 lines"
