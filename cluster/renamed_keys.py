"""Keys of earlier releases: what they are called now, or that they are gone. So a run of an earlier release goes on.

A release that renames or removes a key raises SCHEMA and adds a row. config.yaml of every run names the schema that it was
written with; files without one, such as a user's own, may have keys of any release.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

SCHEMA = 2
"""The schema that this release writes. 1: release 0.1, whose config.yaml names none."""


class Renamed(NamedTuple):
    """One key that was renamed or removed. Example: Renamed(3, "teachers.*.url", "teachers.*.urls")."""

    schema: int
    """The first schema without the old name."""
    old: str
    """`*` stands for any name."""
    new: str | None
    """With as many `*`. None: it was removed."""
    why: str = ""
    """For one that was removed: what does its work now, in a few words."""

    def told(self) -> str:
        """For a user."""
        return f"is {self.new} now" if self.new else f"exists no more{f': {self.why}' if self.why else ''}"


RENAMED: tuple[Renamed, ...] = ()
"""So far none: every key of 0.1 still exists."""


def carried_over(content: dict[str, Any], schema: int, table: Sequence[Renamed] = RENAMED) -> list[str]:
    """Gives the keys of an earlier schema their names of today, in place; returns what it did, a line for each key.

    Where the new key is there too, it wins.
    """
    lines = []
    for row in table:
        if schema >= row.schema:
            continue
        for place in list(_places(content, row.old.split("."), ())):
            value = _pop(content, place)
            if row.new is not None:
                stars = iter(name for name, part in zip(place, row.old.split("."), strict=True) if part == "*")
                _put(content, [next(stars) if part == "*" else part for part in row.new.split(".")], value)
            lines.append(f"{'.'.join(place)} {row.told()}")
    return lines


def renamed(key: str, table: Sequence[Renamed] = RENAMED) -> str | None:
    """What has become of a key, or of the section it is in; None: nothing is known of it."""
    names = key.split(".")
    for row in table:
        pattern = row.old.split(".")
        if len(pattern) <= len(names) and all(p in ("*", n) for p, n in zip(pattern, names, strict=False)):
            return row.told()
    return None


def _places(content: Any, pattern: Sequence[str], above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    if not pattern:
        yield above
    elif isinstance(content, dict):
        for name in list(content) if pattern[0] == "*" else [pattern[0]] if pattern[0] in content else []:
            yield from _places(content[name], pattern[1:], (*above, name))


def _pop(content: dict[str, Any], place: Sequence[str]) -> Any:
    for name in place[:-1]:
        content = content[name]
    return content.pop(place[-1])


def _put(content: dict[str, Any], place: Sequence[str], value: Any) -> None:
    for name in place[:-1]:
        content = content.setdefault(name, {})
    content.setdefault(place[-1], value)
