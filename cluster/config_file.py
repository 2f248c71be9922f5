"""From a YAML file and `key=value` overrides to a checked configuration, and back.

The only file that imports OmegaConf. Importing it loads neither torch nor vLLM nor Ray.
"""

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.validation import refuse


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> CampaignConfig:
    """YAML file + `key=value` -> configuration. UserError for anything that the schema or a range refuses."""
    file = Path(path)
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(file), getattr(error, "strerror", None) or "no text", "a readable YAML file") from error
    content: Any
    try:
        content = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(str(file), _one_line(error), "YAML") from error
    except AssertionError as error:  # what OmegaConf has to say of a number
        raise UserError(str(file), repr(text.strip()[:60]), "YAML with keys and values") from error
    if not OmegaConf.is_dict(content):
        raise UserError(str(file), "a list or a single value", "YAML with keys and values")
    _merge_check(str(file), content)
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise UserError("override", repr(override), "key=value, for example rollout.replicas=2")
        try:
            change = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError("override", repr(override), f"key=value in YAML ({_one_line(error)})") from error
        _merge_check(f"override {override!r}", change)
        content = OmegaConf.merge(content, change)
    config = _to_object(str(file), content)
    _check_values(config)
    refuse(config)
    config.output_dir = str(Path(config.output_dir).expanduser())
    return config


def write_config(config: CampaignConfig, path: Path) -> None:
    """The fully resolved configuration as YAML; a file that was there is replaced as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), "utf-8")
    temporary.replace(path)


def as_dictionary(config: CampaignConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and values."""
    return OmegaConf.to_container(OmegaConf.structured(config))  # type: ignore[return-value]


def differences(before: CampaignConfig, after: CampaignConfig) -> list[tuple[str, Any, Any]]:
    """(key, before, after) of all that differs."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    return [
        (key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]


def _schema() -> Any:
    return OmegaConf.structured(CampaignConfig)


def _merge_check(where: str, content: Any) -> None:
    """Raises for the first key or value of `content` that the schema refuses, naming `where` it stands."""
    try:
        OmegaConf.merge(_schema(), content)
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise UserError(f"{where}: {key}", "a key that does not exist", _expected_key(key)) from error
    except ValidationError as error:
        key = str(error.full_key or _no_mapping(_schema(), content))
        value = OmegaConf.select(content, key, default=None)
        raise UserError(f"{where}: {key}", repr(value), _wanted(_one_line(error))) from error
    except (OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
        if key := _no_mapping(_schema(), content):
            raise UserError(f"{where}: {key}", "a list or a single value", "keys with values") from error
        raise UserError(where, _one_line(error), "values that fit the schema of docs/configuration.md") from error


def _wanted(message: str) -> str:
    """OmegaConf's complaint about a value, as what was expected in its place."""
    for pattern, wanted in (
        (r".*could not be converted to (\w+).*", r"a value of type \1"),
        (r"Incompatible value .* for field of type '(\w+)'.*", r"a value of type \1"),
        (r"field '.*' is not Optional.*", "a value, or nothing at all for the default"),
        (
            r"Merge error.*|Invalid type assigned: .* is not a subclass of .*|Cannot assign \w+ to Dict.*",
            "keys with values",
        ),
        (r"Invalid value .*, expected (one of .*)", r"\1"),
        (r"Invalid value assigned: .* list.*", "a list"),
    ):
        if re.fullmatch(pattern, message):
            return re.sub(pattern, wanted, message)
    return message


def _no_mapping(schema: Any, content: Any) -> str:
    """The first key of `content` with a single value or a list where the schema has keys of its own."""
    for key in content:
        below, found = _below(schema, str(key)), content._get_node(key)
        if OmegaConf.is_dict(below):
            if not OmegaConf.is_dict(found):
                return str(key)
            if name := _no_mapping(below, found):
                return f"{key}.{name}"
    return ""


def _below(schema: Any, key: str) -> Any:
    """The schema under a key; that of a mapping's values, or of a section that is null by default, under any name. None
    where there is no such key."""
    if not OmegaConf.is_dict(schema):
        return None
    node = schema._get_node(key, validate_access=False)
    kind = node._metadata.ref_type if node is not None else schema._metadata.element_type
    return OmegaConf.structured(kind) if dataclasses.is_dataclass(kind) else node


def _expected_key(key: str) -> str:
    """Names the nearest valid key, and all that stand beside it."""
    *parents, name = key.split(".")
    node = functools.reduce(_below, parents, _schema())
    names = [str(k) for k in node] if OmegaConf.is_dict(node) else []
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"{close[0]!r} perhaps, or another of " if close else "one of "
    return f"{hint}{', '.join(sorted(names))}" if names else "a key of docs/configuration.md"


def _to_object(where: str, content: Any) -> CampaignConfig:
    merged = OmegaConf.merge(_schema(), content)
    try:
        OmegaConf.resolve(merged)
        for key in sorted(OmegaConf.missing_keys(merged)):
            raise UserError(f"{where}: {key}", "nothing", "a value: it has no default")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(f"{where}: {error.full_key}", _one_line(error), "a value that can be resolved") from error


def _nodes(config: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any], Any]]:
    """(key, metadata, value) of every leaf field."""
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), f"{prefix}{item.name}"
        children = {f"{key}.{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
        nested = {name: v for name, v in children.items() if dataclasses.is_dataclass(v)}
        for name, child in nested.items():
            yield from _nodes(child, f"{name}.")
        if not nested:
            yield key, dict(item.metadata), value


def _leaves(config: CampaignConfig) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, _, value in _nodes(config))


def _check_values(config: CampaignConfig) -> None:
    """Each by itself: ranges, and no secrets."""
    for key, limits, value in _nodes(config):
        if isinstance(value, str) and re.search(r"://[^/@]*:[^/@]+@", value):
            raise UserError(key, "a URL with a password", "one without: keys come from the environment")
        if not limits or value is None:
            continue
        rules = [
            (limits["minimum"], lambda v, x: v >= x, ">="),
            (limits["above"], lambda v, x: v > x, ">"),
            (limits["maximum"], lambda v, x: v <= x, "<="),
        ]
        if not math.isfinite(value):
            raise UserError(key, value, "a finite number")
        for limit, holds, sign in rules:
            if limit is not None and not holds(value, limit):
                raise UserError(key, value, f"a number {sign} {limit:g}")


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type"))]
    return "; ".join(lines) or type(error).__name__
