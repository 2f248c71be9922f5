"""Loads a configuration from a YAML file and `key=value` overrides, checks it, and writes it.

Types are checked here against the dataclasses of the three config.py, so that messages are ours. OmegaConf merges,
resolves `${...}` and builds the objects. This is the only file that imports it; it loads neither torch nor Ray.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, BooleanNode, FloatNode, IntegerNode, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException, ValidationError
from yaml.scanner import ScannerError

from actors.config import holds_section
from actors.errors import UserError
from actors.plain_text import conceal
from cluster.config import CampaignConfig
from cluster.records.writer import CONFIG_FILE, OF_THIS_RUN
from cluster.renamed_keys import SCHEMA, carried_over, renamed
from cluster.validation import refuse

LARGEST = 2**63 - 1
"""The largest whole number of a configuration: everything that reads it has 64 bits."""
OF_ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)")
"""A reference to an environment variable, and its name."""
CARRIED = "_carried"
"""Attribute of a loaded configuration: a line for each key that an earlier release called otherwise."""
REFERENCES = "_references"
"""Attribute of a loaded configuration: see `_references`."""

SINGLE_VALUES = {
    int: (IntegerNode, "a whole number"),
    float: (FloatNode, "a number"),
    bool: (BooleanNode, "true or false"),
    str: (StringNode, "text"),
}
"""Type of a field -> the converter, and what an error message calls it."""

LARGEST = 2**63 - 1
"""The largest whole number that tensors and files can count with."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, environment: bool = True) -> CampaignConfig:
    """YAML file and `key=value` overrides -> configuration. The last override of a key wins.

    environment: False puts `$NAME` for an environment variable that is not set, for those who read a run and need not
    have its secrets. UserError: the first key or value that does not fit the dataclasses, their ranges, or the other settings.
    """
    content = _read(Path(path))
    content, carried = _of_today(str(path), content)
    _check_type(f"{path}: ", "", CampaignConfig, content)
    for override in overrides:
        if became := renamed(override.partition("=")[0]):
            raise UserError("override", repr(override), f"the key of today: it {became}")
        change = _parse(override)
        _check_type(f"override {override!r}: ", "", CampaignConfig, change)
        content = OmegaConf.merge(_cleared(content, change), change)
    config = _to_object(str(path), content, environment)
    setattr(config, CARRIED, carried)
    _check_values(config)
    refuse(config)
    config.output_dir = str(Path(config.output_dir).expanduser())
    return config


def write_config(config: CampaignConfig, path: Path, of_this_run: Mapping[str, Any] | None = None) -> None:
    """Writes the resolved configuration as YAML, by renaming a temporary file; see `as_dictionary`."""
    temporary = path.with_name(f".{path.name}.tmp")
    text = OmegaConf.to_yaml(OmegaConf.create(as_dictionary(config)))
    if of_this_run:
        text += "# What the campaign wrote about itself; these are no settings.\n"
        text += yaml.safe_dump({OF_THIS_RUN: dict(of_this_run)}, sort_keys=False, allow_unicode=True)
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def as_dictionary(config: CampaignConfig) -> dict[str, Any]:
    """The configuration as dictionaries, lists and single values.

    A text that came from the environment (`${oc.env:NAME}`) is the reference: its value may be a secret.
    """
    content: Any = OmegaConf.to_container(OmegaConf.structured(config))
    for place, reference in getattr(config, REFERENCES, {}).items():
        _put(content, place, reference)
    return content


def differences(before: CampaignConfig, after: CampaignConfig) -> list[tuple[str, Any, Any]]:
    """(key, before, after) of each key whose value differs. A value from the environment is given as its reference."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    for config, leaves in ((before, old), (after, new)):
        for place, reference in getattr(config, REFERENCES, {}).items():
            key = ".".join(map(str, place))
            if key in leaves:
                leaves[key] = reference
    return [
        (key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]


def _read(file: Path) -> Any:
    """The keys and values of a YAML file, as OmegaConf has them. UserError: the file cannot be read, or is not YAML."""
    try:
        text = file.read_text("utf-8")
        content = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(file), getattr(error, "strerror", None) or "no text", "a readable YAML file") from error
    except yaml.MarkedYAMLError as error:
        # A scanner's problem is where the token begins that it could not finish: a quote, a key without a colon.
        mark = error.context_mark if isinstance(error, ScannerError) and error.context_mark else error.problem_mark
        where = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise UserError(where, f"invalid YAML ({error.problem})", "lines of `key: value`") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(str(file), f"invalid YAML ({_one_line(error)})", "lines of `key: value`") from error
    except RecursionError as error:
        raise UserError(str(file), "values in one another, hundreds deep", "lines of `key: value`") from error
    except AssertionError as error:  # OmegaConf's answer to a file that is one number
        raise UserError(str(file), repr(text.strip()[:60]), "lines of `key: value`") from error
    if not OmegaConf.is_dict(content):
        raise UserError(str(file), "a list or a single value", "lines of `key: value`")
    return content


def of_this_run(run_dir: Path) -> dict[str, Any]:
    """What a campaign wrote about itself in its config.yaml; {} where there is none. UserError: the file cannot be read."""
    file = run_dir / CONFIG_FILE
    if not file.exists():
        return {}
    content = OmegaConf.to_container(_read(file), resolve=False)
    found = content.get(OF_THIS_RUN) if isinstance(content, dict) else None
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _of_today(file: str, content: Any) -> tuple[Any, list[str]]:
    """The settings under their names of today, without what a campaign wrote about itself; and what was renamed."""
    raw: Any = OmegaConf.to_container(content, resolve=False)
    own = raw.pop(OF_THIS_RUN, None)
    schema = own.get("schema", 1) if isinstance(own, dict) else 1
    if not isinstance(schema, int) or schema > SCHEMA:
        raise UserError(f"{file}: {OF_THIS_RUN}.schema", schema, f"at most {SCHEMA}: a later release wrote this file")
    lines = carried_over(raw, schema)
    return OmegaConf.create(raw), lines


def _parse(override: str) -> Any:
    """`rollout.replicas=2` -> {rollout: {replicas: 2}}."""
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise UserError("override", repr(override), "key=value, for example rollout.replicas=2")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        fault = getattr(error, "problem", None) or _one_line(error)
        raise UserError("override", repr(override), f"key=value, with a value in YAML ({fault})") from error
    except RecursionError as error:
        found = f"{override[:60]!r}, hundreds of values in one another"
        raise UserError("override", found, "key=value, with a value in YAML") from error


def _cleared(content: Any, change: Any) -> Any:
    """The settings without what an override sets to `{}`: a merge with nothing would leave all that is there."""
    names, inner = [], OmegaConf.to_container(change)
    while isinstance(inner, dict) and len(inner) == 1:
        [(name, inner)] = inner.items()
        names.append(name)
    if inner == {} and OmegaConf.select(content, ".".join(map(str, names))) is not None:
        OmegaConf.update(content, ".".join(map(str, names)), {}, merge=False)
    return content


def _check_type(where: str, key: str, hint: Any, value: Any) -> None:
    """UserError where a value does not have the type of its field, or a key does not exist.

    where: the file or the override, for the message. Keys that are absent are not looked for, so that an override can
    be checked by itself. Single values are converted as OmegaConf does it ("2" is a 2).
    """
    # OmegaConf would refuse the same values, but its messages name its own classes, and not always the key.
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if value == MISSING or (isinstance(value, str) and "${" in value):  # no value, or one that is known later
        return
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kind, origin = kinds[0], get_origin(kinds[0])
    if value is None and NoneType in kinds:
        return
    if dataclasses.is_dataclass(kind) or origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where}{key}", repr(value), "keys with values")
        fields = get_type_hints(kind) if dataclasses.is_dataclass(kind) else dict.fromkeys(value, get_args(kind)[1])
        for name, inner in value.items():
            below = f"{key}.{name}" if key else str(name)
            if not isinstance(name, str):
                raise UserError(f"{where}{below}", f"{name!r} as a name", f"a text, for example {f'name{name}'!r}")
            if name not in fields:
                raise UserError(f"{where}{below}", "a key that does not exist", _nearest(str(name), list(fields)))
            _check_type(where, below, fields[name], inner)
    elif origin is list:
        if not isinstance(value, list):
            raise UserError(f"{where}{key}", repr(value), "a list")
        for place, inner in enumerate(value):
            _check_type(where, f"{key}[{place}]", get_args(kind)[0], inner)
    elif origin is Literal:
        if value not in get_args(kind):
            raise UserError(f"{where}{key}", repr(value), f"one of {', '.join(map(str, get_args(kind)))}")
    elif kind is not Any:
        node, name = SINGLE_VALUES[kind]  # OmegaConf's converters decide which text is a number
        try:
            node(value, is_optional=False)
        except ValidationError as error:
            raise UserError(f"{where}{key}", repr(value), name) from error
        except OverflowError as error:
            raise UserError(f"{where}{key}", f"a number of {len(str(value))} digits", "one below 1.8e308") from error


def _nearest(name: str, names: list[str]) -> str:
    """The valid key that is most like this one, and all others beside it."""
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"{close[0]!r} perhaps, or another of " if close else "one of "
    return hint + ", ".join(sorted(names))


@cache
def _schema() -> Any:
    """The dataclasses as OmegaConf has them, which it takes half of a load to make; `merge` copies them."""
    return OmegaConf.structured(CampaignConfig)


def _to_object(where: str, content: Any, environment: bool) -> CampaignConfig:
    try:
        merged = OmegaConf.merge(_schema(), content)
        raw = OmegaConf.to_container(merged, resolve=False)
        for variable in OF_ENVIRONMENT.findall(str(raw)):
            conceal(variable)
        with contextlib.nullcontext() if environment else _stand_ins(raw):
            OmegaConf.resolve(merged)
        # Only now: an override may have given a required value that the file lacks.
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{where}: {key}", "nothing", "a value: it has no default")
        config: Any = OmegaConf.to_object(merged)
        setattr(config, REFERENCES, _references(raw, OmegaConf.to_container(merged)))
        return config
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key}", _one_line(error), "a value that can be resolved") from error


def _references(raw: Any, resolved: Any) -> dict[tuple, str]:
    """Place of a text that came from the environment, as keys and indices -> the text before it was resolved.

    Also one that came there by another key (`${tracking.mlflow_uri}`). Numbers and true or false are no secrets.
    """
    values = {os.environ[name] for name in OF_ENVIRONMENT.findall(str(raw)) if os.environ.get(name)}
    found: dict[tuple, str] = {}

    def walk(before: Any, after: Any, place: tuple) -> None:
        if isinstance(before, str) and "${" in before and isinstance(after, str | dict | list):
            if OF_ENVIRONMENT.search(before) or any(value in str(after) for value in values):
                found[place] = before
        elif isinstance(before, dict) and isinstance(after, dict):
            for name, inner in before.items():
                walk(inner, after.get(name), (*place, name))
        elif isinstance(before, list) and isinstance(after, list):
            for number, (inner, other) in enumerate(zip(before, after, strict=False)):
                walk(inner, other, (*place, number))

    walk(raw, resolved, ())
    return found


def _put(content: Any, place: tuple, value: Any) -> None:
    for name in place[:-1]:
        content = content[name]
    content[place[-1]] = value


@contextlib.contextmanager
def _stand_ins(raw: Any) -> Iterator[None]:
    """Context in which every environment variable that is missing has its own name as its value."""
    missing = {name: f"${name}" for name in OF_ENVIRONMENT.findall(str(raw)) if name not in os.environ}
    os.environ.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Yields (key, field metadata, value) of every leaf field."""
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), f"{prefix}{item.name}"
        children = {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
        nested = {name: v for name, v in children.items() if dataclasses.is_dataclass(v)}
        for name, child in nested.items():
            yield from _nodes(child, f"{name}.")
        # Sections by name (`prompts.sources`), and none of them: no value beside the keys of those that have a name.
        if not nested and not (value == {} and holds_section(item)):
            yield key, dict(item.metadata), value


def _leaves(config: CampaignConfig) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, _, value in _nodes(config))


def _check_values(config: CampaignConfig) -> None:
    """UserError for the first number outside its range, or URL with a password."""
    for key, limits, value in _nodes(config):
        if isinstance(value, str) and re.search(r"://[^/@]*:[^/@]+@", value):
            raise UserError(key, "a URL with a password", "one without: keys come from the environment")
        if type(value) is int and abs(value) > LARGEST:
            raise UserError(key, f"a number of {len(str(abs(value)))} digits", "at most 2^63 - 1")
        if "minimum" not in limits or value is None:
            continue
        rules = [
            (limits["minimum"], lambda v, x: v >= x, ">="),
            (limits["above"], lambda v, x: v > x, ">"),
            (limits["maximum"], lambda v, x: v <= x, "<="),
        ]
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UserError(key, "a number that no counter holds", f"at most {LARGEST}")
        if not math.isfinite(value):
            raise UserError(key, value, "a finite number")
        for limit, holds, sign in rules:
            if limit is not None and not holds(value, limit):
                raise UserError(key, value, f"a number {sign} {limit:g}")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type"))]
    return "; ".join(lines) or type(error).__name__
