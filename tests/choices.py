"""Every choice that the configuration offers, found from its dataclasses, and those that a given configuration makes.

A choice is a pair of texts, (key, value). The value is that of a `Literal`, `true` or `false`, `null` or `set`, a name of a
table (NAMES), `other` for anything but the default, `empty` or `filled` for a list or a dictionary. Sections that occur
several times have a `*` in place of their name: `teachers.*.signal`.
"""

import dataclasses
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from actors.config import TeacherConfig
from actors.import_path import is_import_path
from actors.teacher.backends import BACKENDS
from cluster.config import CampaignConfig
from learner.objective.estimator_table import DIVERGENCES, ESTIMATORS

Choice = tuple[str, str]
OWN = "own"
"""An import path: code of the user's own."""
PATHS = ("jsonl", "jsonl.gz", "jsonl.zst", "parquet", "pattern", "directory", "saved", "dataset", "null")
"""Forms of prompts. `saved`: a directory that `save_to_disk` wrote. `null`: a function, or several sources."""
SOURCES = [f"{held_out}prompts.{several}" for held_out in ("", "evaluation.") for several in ("", "sources.*.")]
"""Where a source of prompts can be."""


NAMES: dict[str, tuple[str, ...]] = {
    "environment.name": (OWN,),
    "rollout.backend": ("vllm", OWN),
    "teachers.*.backend": (*BACKENDS, OWN),
    "learner.objective.estimator": (*ESTIMATORS, OWN),
    "learner.objective.divergence": (*DIVERGENCES, OWN),
    **{f"evaluation.{name}.name": ("exact", "regex", "numeric", "math", OWN) for name in ("verifier", "verifiers.*")},
    **{f"{source}path": PATHS for source in SOURCES},
}
"""Texts that name one of several things."""
PLAIN_TEXTS = {
    *("name", "output_dir", "student.model", "teachers.*.model", "guards.*.metric"),
    *(f"{source}{name}" for source in SOURCES for name in ("prompt_field", "tools_field", "split")),
}
"""Texts of the user's own. A new text without null is added to one of these two tables."""


SAME = ("evaluation.sets.*.prompts.", "evaluation.sets.*.verifier.")
"""Sections that are read as others of their kind are, `evaluation.prompts` and `evaluation.verifier`."""


def choices() -> set[Choice]:
    """Every choice that there is."""
    leaves = [leaf for leaf in _leaves() if not leaf[0].startswith(SAME)]
    return {(key, value) for key, hint, default in leaves for value in _values(key, hint, default)}


def made_by(config: CampaignConfig) -> set[Choice]:
    """The choices of a configuration that have an effect in its campaign."""
    defaults = {key: (hint, default) for key, hint, default in _leaves()}
    made = set()
    for key, value, section in _settings(config):
        hint, default = defaults[key]
        if _acts(key, config, section):
            made |= {(key, name) for name in _names(key, hint, default, value)}
    return made


def _optional(hint: Any) -> tuple[Any, bool]:
    """(the type, whether it may be null)."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    [kind] = [kind for kind in get_args(hint) if kind is not types.NoneType]
    return kind, True


def _section(hint: Any) -> Any:
    """The dataclass of the values of a dictionary of sections, or None."""
    return get_args(hint)[1] if get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]) else None


def _leaves(kind: Any = CampaignConfig, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, type, default) of every field."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        key, (hint, optional) = prefix + field.name, _optional(hints[field.name])
        if (several := _section(hint)) is not None:
            yield from _leaves(several, f"{key}.*.")
        elif dataclasses.is_dataclass(hint):
            if optional:
                yield key, hints[field.name], None
            yield from _leaves(hint, f"{key}.")
        else:
            made = field.default_factory is not dataclasses.MISSING
            yield key, hints[field.name], field.default_factory() if made else field.default


def _settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value, its section) of every field."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        key, value, (hint, optional) = prefix + field.name, getattr(config, field.name), _optional(hints[field.name])
        if _section(hint) is not None:
            for section in value.values():
                yield from _settings(section, f"{key}.*.")
        elif dataclasses.is_dataclass(hint):
            if optional:
                yield key, value, config
            if value is not None:
                yield from _settings(value, f"{key}.")
        else:
            yield key, value, config


def _values(key: str, hint: Any, default: Any) -> tuple[str, ...]:
    """All values of a key."""
    kind, optional = _optional(hint)
    if get_origin(kind) is list:
        inner = get_args(kind)[0]
        return ("empty", *(get_args(inner) if get_origin(inner) is Literal else ("filled",)))
    if get_origin(kind) is dict:
        return "empty", "filled"
    if get_origin(kind) is Literal:
        return (*get_args(kind), *(("null",) if optional else ()))
    if kind is bool:
        return ("true", "false", *(("null",) if optional else ()))
    if key in NAMES:
        return NAMES[key]
    if optional:
        return "null", "set"
    assert kind is not str or key in PLAIN_TEXTS, f"{key}: to be added to NAMES or PLAIN_TEXTS (tests/choices.py)"
    return ("other",)


def _names(key: str, hint: Any, default: Any, value: Any) -> Iterator[str]:
    """Those of `_values` that a value is."""
    kind, optional = _optional(hint)
    if value is None:
        yield "null"
    elif get_origin(kind) in (list, dict):
        literal = get_origin(kind) is list and get_origin(get_args(kind)[0]) is Literal
        yield from (value if value and literal else ["filled" if value else "empty"])
    elif get_origin(kind) is Literal:
        yield value
    elif kind is bool:
        yield str(value).lower()
    elif optional and key not in NAMES:
        yield "set"
    elif key in NAMES:
        yield (
            path_kind(value)
            if NAMES[key] == PATHS or key.endswith(".path")
            else OWN
            if is_import_path(value)
            else value
        )
    elif value != default:
        yield "other"


def path_kind(path: str | None) -> str:
    """The row of PATHS that a path of prompts is."""
    if path is None or "*" in path:
        return "pattern" if path else "null"
    file = Path(path)
    suffix = "".join(file.suffixes[-2:]).removeprefix(".")
    if suffix in PATHS or file.name == "saved":
        return suffix or file.name
    return "directory" if path.startswith(("/", ".")) else "dataset"


def _is_vllm(config: CampaignConfig, section: Any) -> bool:
    return config.rollout.backend == "vllm"


def _has_support(config: CampaignConfig, section: Any) -> bool:
    return any("topk" in teacher.signal for teacher in config.teachers.values())


def _is_mixed(config: CampaignConfig, section: TeacherConfig) -> bool:
    return sum(set(other.domains) == set(section.domains) for other in config.teachers.values()) > 1


ACTS: dict[str, Callable[[CampaignConfig, Any], bool]] = {
    "rollout.on_new_weights": lambda config, _: _is_vllm(config, _) and config.pipeline.max_staleness > 0,
    "rollout.recompute_kv": lambda config, _: _is_vllm(config, _) and config.pipeline.max_staleness > 0,
    "rollout.tensor_parallel_size": _is_vllm,
    "teachers.*.weight": _is_mixed,
    "teachers.*.top_k": lambda _, teacher: "topk" in teacher.signal,
    "teachers.*.head_chunk_tokens": lambda _, teacher: teacher.backend == "transformers",
    "teachers.*.microbatch_tokens": lambda _, teacher: teacher.backend == "transformers",
    "teachers.*.dtype": lambda _, teacher: teacher.backend in ("transformers", "vllm"),
    "teachers.*.trust_remote_code": lambda _, teacher: teacher.backend in ("transformers", "vllm"),
    "teachers.*.timeout_seconds": lambda _, teacher: teacher.backend == "http",
    "teachers.*.away_timeout_seconds": lambda _, teacher: teacher.backend == "http",
    "teachers.*.requests_per_url": lambda _, teacher: teacher.backend == "http",
    **{f"{source}split": lambda _, prompts: path_kind(prompts.path) == "dataset" for source in SOURCES},
    "learner.objective.support": _has_support,
    "learner.objective.mixture": lambda _, o: o.divergence in ("jsd", "skewed_forward_kl", "skewed_reverse_kl"),
    "learner.objective.entropy_threshold": lambda _, o: o.divergence == "entropy_gated_kl",
    "learner.objective.mismatch.level": lambda _, mismatch: mismatch.correction != "none",
    "learner.objective.mismatch.low": lambda _, mismatch: mismatch.correction == "mask",
    "learner.objective.mismatch.high": lambda _, mismatch: mismatch.correction != "none",
    "learner.objective.mismatch.pi_old": lambda _, mismatch: mismatch.correction == "none",
    "learner.optimizer.final_fraction": lambda _, optimizer: optimizer.schedule != "constant",
    "weights.anchor_every": lambda config, weights: weights.encoding == "delta" and config.pipeline.updates > 1,
    "evaluation.every_updates": lambda _, evaluation: evaluation.prompts is not None,
    "evaluation.teacher": lambda _, evaluation: evaluation.prompts is not None,
    "evaluation.keep_training_trajectories": lambda _, evaluation: evaluation.prompts is None,
    "evaluation.keep_trajectories": lambda _, evaluation: evaluation.prompts is not None,
    "evaluation.verifier.name": lambda config, _: config.evaluation.prompts is not None or config.gives_rewards,
    "evaluation.verifier.timeout_seconds": lambda config, _: (
        config.evaluation.prompts is not None or config.gives_rewards
    ),
    "evaluation.verifier.pattern": lambda config, _: config.evaluation.prompts is not None or config.gives_rewards,
    "guards.*.rate_factor": lambda _, guard: guard.action in ("lower_rate", "roll_back"),
    "guards.*.at_most": lambda _, guard: guard.action in ("lower_rate", "roll_back"),
}
"""Keys that have an effect only beside other settings: (configuration, section) -> whether they have."""


def _acts(key: str, config: CampaignConfig, section: Any) -> bool:
    return key not in ACTS or ACTS[key](config, section)
