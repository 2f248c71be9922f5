"""What the files of a run directory hold, as far as their readers rely on it. A value of another form is damage.

Keys that a file lacks are no damage here: releases differ in them. Standard library only.
"""

from collections.abc import Callable, Mapping
from typing import Any

from actors.json_files import DamagedError, parsed
from cluster.records.metric_table import METRICS
from cluster.records.rewards import is_right

Check = Callable[[Any], bool]


def _number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _step(value: Any) -> bool:
    return type(value) is int


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _numbers(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_number, value)))


def _counts(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_number, value.values())))


def _spans(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(span, list) and len(span) == 2 and all(map(_step, span)) and span[0] < span[1] for span in value
    )


def _actors(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and {"mean", "end"} <= value.keys() and all(map(_counts, value.values()))
    )


def _live_actors(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) and _text(one.get("name")) for one in value)


def _phases(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, dict)
        and _text(row.get("phase"))
        and type(row.get("seconds")) in (int, float)
        and "ended" in row
        for row in value
    )


def _turns(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(isinstance(one, dict) and _text(one.get("by")) and _text(one.get("text")) for one in value)
    )


def _texts_by_role(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


TRAJECTORY: dict[str, Check] = {
    "response": _text,
    "tokens": lambda value: isinstance(value, list) and all(map(_text, value)),
    **dict.fromkeys(("student_logprobs", "teacher_logprobs"), lambda value: value is not None and _numbers(value)),
    "reward": _number,
    "trained": lambda value: value is None or (isinstance(value, list) and all(isinstance(one, bool) for one in value)),
    "turns": _turns,
    "begins": lambda value: value is None or (isinstance(value, list) and all(isinstance(one, int) for one in value)),
}
FORMS: dict[str, dict[str, Check]] = {
    "metrics.jsonl": {
        **{key: _numbers if metric.form == "histogram" else _number for key, metric in METRICS.items()},
        "step": _step,
        "wall_seconds": _number,
        "tokens_generated": _number,
    },
    "events.jsonl": {"kind": _text, "cause": _text, "time": _number, "wall_seconds": _number, "step": _number},
    "exports.jsonl": {"time": _number, "step": _step, "out": _text, "dtype": _text},
    "ledger.jsonl": {"trained": _spans, "dropped": _spans, "step": _step},
    "summary.json": {
        **dict.fromkeys(("updates", "tokens_generated", "wall_seconds", "loop_seconds", "faults"), _number),
        **dict.fromkeys(("accuracy_start", "accuracy_end", "accuracy_sampled_start", "accuracy_sampled_end"), _number),
        **dict.fromkeys(("right_start", "right_end", "right_teacher"), _number),
        **dict.fromkeys(("accuracy_teacher", "reverse_kl_start", "reverse_kl_end", "wall_over_slowest_stage"), _number),
        **dict.fromkeys(("busy", "ledger", "dropped_because"), _counts),
        "actors": _actors,
    },
    "status.json": {
        **dict.fromkeys(("time", "last_update_seconds_ago", "process"), _number),
        **dict.fromkeys(("host", "state", "waits_for"), _text),
        "roles": _texts_by_role,
        "actors": _live_actors,
        "start": _phases,
        **dict.fromkeys(("ledger", "dropped_because", "gpus"), _counts),
    },
}
"""File -> key -> what a value of it must be."""
REQUIRED = {"metrics.jsonl": ("step",), "events.jsonl": ("kind",), "status.json": ("time",)}
"""Keys without which a reader can do nothing."""


def wrong_in(name: str, row: Any) -> str | None:
    """What is wrong with the content of a file, or with a line of it; None: nothing that a reader would stumble over.

    name: of the file; that of sample trajectories begins with `step_`.
    """
    if not isinstance(row, dict):
        return "no JSON object"
    if missing := [key for key in REQUIRED.get(name, ()) if key not in row]:
        return f"no {missing[0]}"
    forms: Mapping[str, Check] = TRAJECTORY if name.startswith("step_") else FORMS.get(name, {})
    wrong = next((key for key, right in forms.items() if key in row and not right(row[key])), None)
    return None if wrong is None else f"another form of {wrong}: {str(row[wrong])[:80]}"


def parsed_row(name: str, line: str | bytes) -> dict[str, Any]:
    """One line of a file of JSON lines. DamagedError: it is not a line that a campaign writes."""
    row = parsed(line)
    if wrong := wrong_in(name, row):
        raise DamagedError(wrong)
    return row


def verdict(row: Mapping[str, Any]) -> str:
    """Of a sample trajectory: right from a reward of 1 on, wrong below it, unjudged without one."""
    reward = row.get("reward")
    return "unjudged" if reward is None else "right" if is_right(reward) else "wrong"
