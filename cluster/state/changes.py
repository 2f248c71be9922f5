"""Which keys of a campaign that has begun may change, as the dataclasses' metadata have it (`Change` in actors/config.py)."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from actors.config import Change
from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import differences
from learner.student.checkpoint import checkpoint_steps, step_directory

WHERE = ("name", "output_dir")
"""Keys that locate the run directory; `--resume DIRECTORY` sets them."""
VERIFIER = "evaluation.verifier"
"""Free where it only measures, on request where training uses its rewards."""


class Changed(NamedTuple):
    """A key whose value is another than the campaign ran with."""

    key: str
    before: Any
    after: Any
    change: Change


def keys_of(section: type = CampaignConfig, prefix: str = "", above: Change | None = None) -> Iterator[tuple[str, Any]]:
    """Yields (key, class of change, or None where the metadata name none) of every key; `*` stands for a name."""
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        own = above or item.metadata.get("change")
        inner = [kind for kind in (hints[item.name], *get_args(hints[item.name])) if dataclasses.is_dataclass(kind)]
        if not inner:
            yield f"{prefix}{item.name}", own
        else:
            many = "*." if get_origin(hints[item.name]) is dict else ""
            yield from keys_of(inner[0], f"{prefix}{item.name}.{many}", own)  # type: ignore[arg-type]


def class_of(key: str, config: CampaignConfig) -> Change:
    """The class of a key of this configuration, for example `teachers.default.replicas`. KeyError: there is none."""
    if is_below(key, [VERIFIER, f"{VERIFIER}s"]):
        return "on request" if config.gives_rewards else "free"
    for pattern, change in keys_of():
        if _fits(key.split("."), pattern.split(".")):
            return change
    raise KeyError(key)


def is_key(key: str) -> bool:
    """Whether this is a key or a section of a configuration."""
    names = key.split(".")
    return any(_fits(names, pattern.split(".")[: len(names)]) for pattern, _ in keys_of())


def names_like(key: str) -> list[str]:
    """All keys and sections as they may be meant by `key`: a name that the user has given is taken as it stands."""
    given, found = key.split("."), []
    for pattern, _ in keys_of():
        names = [
            own if part == "*" else part
            for part, own in zip_longest(pattern.split("."), given[: pattern.count(".") + 1])
        ]
        found += [".".join(map(str, names[: i + 1])) for i in range(len(names))]
    return list(dict.fromkeys(found))


def changes(before: CampaignConfig, after: CampaignConfig, allowed: Sequence[str]) -> list[Changed]:
    """What is other in `after`, apart from WHERE. allowed: keys or sections of `--allow-change`.

    Keys of the class `same contents` are left to same_inputs.py. UserError: a key may never change, or was not allowed to.
    """
    found = [
        Changed(key, old, new, class_of(key, after)) for key, old, new in differences(before, after) if key not in WHERE
    ]
    never = [one for one in found if one.change == "never"]
    asked = [one for one in found if one.change == "on request" and not is_below(one.key, allowed)]
    if refused := [one for one in found if one in never or one in asked]:
        told = ", ".join(f"{one.key}={one.before} where this one has {one.after}" for one in refused)
        raise UserError(str(after.run_dir), f"a campaign with {told}", _way_out(never, asked, after))
    return found


def _way_out(never: Sequence[Changed], asked: Sequence[Changed], config: CampaignConfig) -> str:
    ways = ["the same configuration"]
    if asked:
        options = " ".join(f"--allow-change {one.key}" for one in asked)
        ways.append(f"{options} to go on with {'these values' if len(asked) > 1 else 'this value'} from here on")
    if never:
        keys = ", ".join(one.key for one in never)
        ways.append(f"for another {keys} {begin_anew(config)}")
    else:
        ways.append("another name for a new campaign")
    return "; or ".join(ways)


def begin_anew(config: CampaignConfig) -> str:
    """How a new campaign begins from this one's checkpoint, for messages."""
    steps = checkpoint_steps(config.run_dir / "checkpoints")
    newest = step_directory(config.run_dir / "checkpoints", steps[-1]) if steps else config.student.model
    keep = " student.optimizer=keep (or new)" if steps else ""
    return f"a new campaign that begins from this one: another name, and student.model={newest}{keep}"


def is_below(key: str, sections: Sequence[str]) -> bool:
    """Whether a key is one of these, or in one of these sections."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if len(names) != len(pattern):
        return False
    return all(part in ("*", name) for name, part in zip(names, pattern, strict=True))
