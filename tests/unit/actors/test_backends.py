"""The table of teacher backends, and a backend of the user's own."""

import sys
from pathlib import Path

import pytest

from actors.config import TeacherConfig
from actors.errors import UserError
from actors.teacher.backends import BACKENDS, OWN_SETTINGS, SIGNALS, Backend, backend_of, needs_plan, teacher_class

OWN = """
from actors.teacher.backends import Backend
from actors.teacher.base import Teacher

class Complete:
    backend = Backend(signals=("sampled", "topk"), generates=False)
    def __init__(self, config, key, vocabulary): ...
    def score(self): ...
    def score_each(self): ...
    def status(self): ...

class Sampling(Complete):
    backend = Backend(samples=True, follows_student=True)

class Unknown(Complete):
    backend = Backend(signals=("logits",), generates=False)

class Hidden(Complete):
    backend = Backend(signals=("hidden",), generates=False)

class Narrow(Complete):
    def __init__(self, config): ...

class Coroutine(Complete):
    async def score(self): ...

class Child(Teacher):
    backend = Backend()

class Plain:
    pass

def function(): ...
"""


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_backend.py").write_text(OWN)
    (tmp_path / "ends_backend.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_backend", None)


def config(backend: str, **changes: object) -> TeacherConfig:
    return TeacherConfig("m", backend=backend, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BACKENDS)
def test_each_class_has_the_methods_that_its_row_promises(name: str) -> None:
    row, found = backend_of(config(name)), teacher_class(config(name))
    assert set(row.signals) <= set(SIGNALS) and set(row.settings) <= set(OWN_SETTINGS)
    assert hasattr(found, "sample") == row.samples
    assert hasattr(found, "load_weights") == row.follows_student
    assert all(callable(getattr(found, method)) for method in ("score", "score_each", "generate", "status"))


def test_several_ranks_of_a_model_that_transformers_divides_have_a_class_of_their_own() -> None:
    several = config("transformers", tensor_parallel_size=2)
    assert needs_plan(several) and teacher_class(several).__name__ == "ShardedTeacher"
    assert teacher_class(config("transformers")).__name__ == "LocalTeacher"
    assert not needs_plan(config("transformers")) and not needs_plan(config("vllm", tensor_parallel_size=2))


def test_a_class_of_the_users_own_brings_its_row() -> None:
    own = config("own_backend:Complete")
    assert backend_of(own, "teachers.wise") == Backend(signals=("sampled", "topk"), generates=False)
    assert teacher_class(own).__name__ == "Complete"


def test_a_module_in_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = [path for path in sys.path if path not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", elsewhere)  # as for the command `understudy`
    with pytest.raises(UserError, match="No module named 'own_backend'"):
        backend_of(config("own_backend:Complete"))
    monkeypatch.chdir(tmp_path)
    assert backend_of(config("own_backend:Complete")).signals == ("sampled", "topk")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("transformer", r"found transformer, expected .*package\.module:Class.* \(did you mean 'transformers'\?\)"),
        ("own_backend:Complet", r"expected a class in .*own_backend\.py \(did you mean 'own_backend:Complete'\?\)"),
        ("own_bakend:Complete", r"ModuleNotFoundError.*expected a module that can be imported"),
        ("own_backend:Plain", r"expected a class with the class attribute `backend = Backend"),
        ("own_backend:function", r"expected a class with the class attribute `backend = Backend"),
        ("own_backend:Unknown", r"found own_backend:Unknown with the signal logits, expected some of sampled, topk"),
        ("own_backend:Hidden", r"found own_backend:Hidden with the signal hidden, expected has_model_files=True"),
        (
            "own_backend:Child",
            r"found own_backend:Child without generate, score_tokens, expected a subclass of .*Teacher",
        ),
        ("own_backend:Narrow", r"found own_backend:Narrow \(.*\), expected Class\(config, key, vocabulary\)"),
        (
            "own_backend:Coroutine",
            r"found own_backend:Coroutine with the coroutine score, expected methods that are no",
        ),
        (
            "ends_backend:Complete",
            r"found ends_backend:Complete \(SystemExit: 0\), expected a module that can be imported",
        ),
        ("own_backend:Sampling", r"found own_backend:Sampling without generate, sample, load_weights"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(backend: str, message: str) -> None:
    with pytest.raises(UserError, match=r"^teachers\.wise\.backend: " + f".*{message}"):
        backend_of(config(backend), "teachers.wise")
