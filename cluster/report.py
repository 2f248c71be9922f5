"""A run directory, or several, as one self-contained HTML page: what was learnt, what limited it, what was written.

The page is made from the files of cluster/records.py and from nothing else, so a campaign that is running, or has
crashed, has one too. Whatever a model, a user or an error wrote is escaped, the page's policy admits no script but its
own (by its hash), and nothing is loaded from anywhere.
"""

import base64
import hashlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml

from actors.errors import UserError
from cluster.charts import PALETTE_SIZE, compact, percent
from cluster.figures import (
    BUSY,
    GROUPS,
    HISTOGRAMS,
    Past,
    busy_figure,
    hero_figures,
    histogram_figure,
    seconds,
    small_figures,
    with_throughput,
)
from cluster.plan import Plan, Stage
from cluster.records import (
    CONFIG_FILE,
    EVENTS_FILE,
    FAULTS,
    METRICS_FILE,
    UNDONE_FILE,
    read_jsonl,
    read_summary,
    trajectory_files,
)
from cluster.samples import samples
from cluster.timeline import timeline

TEMPLATE = Path(__file__).with_name("report.html")
DASH = "–"


@dataclass(frozen=True)
class Run:
    """What is on disk of one run."""

    path: Path
    name: str
    metrics: list[dict[str, Any]]
    undone: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    trajectories: dict[int, Path]

    def first(self, key: str) -> Any:
        """The earliest value of a metric that there is."""
        return next((row[key] for row in self.metrics if row.get(key) is not None), None)

    def last(self, key: str) -> Any:
        """The newest value of a metric that there is."""
        return next((row[key] for row in reversed(self.metrics) if row.get(key) is not None), None)

    @property
    def result(self) -> dict[str, Any]:
        """summary.json; for a campaign without one, as much of it as the metrics tell."""
        told = {
            "accuracy_start": self.first("eval/accuracy"),
            "accuracy_end": self.last("eval/accuracy"),
            "accuracy_sampled_start": self.first("eval/accuracy_sampled"),
            "accuracy_sampled_end": self.last("eval/accuracy_sampled"),
            "accuracy_teacher": self.first("eval/accuracy_teacher"),
            "reverse_kl_start": self.first("eval/reverse_kl"),
            "reverse_kl_end": self.last("eval/reverse_kl"),
            "updates": self.last("step"),
            "tokens_generated": self.last("tokens_generated"),
            "wall_seconds": self.last("wall_seconds"),
            "faults": sum(event["kind"] in FAULTS for event in self.events),
            "busy": {role: sum(row.get(key) or 0 for row in self.metrics) for role, key in BUSY.items()},
        }
        return {**told, **{key: value for key, value in self.summary.items() if value is not None}}

    def setting(self, key: str, default: Any = None) -> Any:
        """One value of the configuration, by its full key."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node


def write_report(run_dirs: Sequence[Path], output: Path) -> Path:
    """Writes the page about these runs to `output`. UserError where a directory is no run, or cannot be read."""
    return write_page([load_run(Path(run_dir)) for run_dir in run_dirs], output)


def write_page(runs: Sequence[Run], output: Path) -> Path:
    """The page about runs that have been read. UserError where it cannot be written."""
    template = TEMPLATE.read_text("utf-8")
    script = template.split("<script>", 1)[1].split("</script>", 1)[0]
    page = Template(template).substitute(
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **sections(runs),
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, "utf-8", errors="replace")
    except OSError as error:
        raise UserError(str(output), error.strerror or str(error), "a file to write the report to") from error
    return output


def load_run(path: Path) -> Run:
    """Reads a run directory. Only metrics.jsonl must be there."""
    if not (path / METRICS_FILE).is_file():
        found = f"no {METRICS_FILE} in it" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise UserError(str(path), found, "the run directory of a campaign that has begun, <output_dir>/<name>")
    try:
        config_file = path / CONFIG_FILE
        config_text = config_file.read_text("utf-8") if config_file.exists() else ""
        metrics, events = with_throughput(read_jsonl(path / METRICS_FILE)), read_jsonl(path / EVENTS_FILE)
        undone = read_jsonl(path / UNDONE_FILE)
        summary = read_summary(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(str(path), str(error), "the files that a campaign wrote") from error
    config = _parsed(config_text)
    name = str(config.get("name") or path.resolve().name)
    return Run(path, name, metrics, undone, events, summary, config_text, config, trajectory_files(path))


def sections(runs: Sequence[Run]) -> dict[str, str]:
    """The parts of the page, by their names in the template."""
    one = runs[0] if len(runs) == 1 else None
    names = _distinct_names(runs)
    curves = [(name, run.metrics) for name, run in zip(names, runs, strict=True)]
    teachers = {run.result["accuracy_teacher"] for run in runs} - {None}
    past = Past(one.events, one.undone) if one else Past()
    groups, steady = [], []
    for title, figures in GROUPS.items():
        drawn, flat = small_figures(figures, curves, past)
        if title in HISTOGRAMS:
            drawn += "".join(histogram_figure(HISTOGRAMS[title], "" if one else name, rows) for name, rows in curves)
        if title == "The pipeline":
            drawn = "".join(busy_figure("" if one else name, rows) for name, rows in curves) + drawn
        steady.append(flat)
        if drawn:
            groups.append(f'<section><h2>{title}</h2><div class="grid">{drawn}</div></section>')
    flat = "".join(steady)
    return {
        "title": escape(one.name if one else f"{len(runs)} campaigns"),
        "state": _state(one) if one else "",
        "headline": _headline(runs),
        "meta": _meta(one) if one else "",
        "legend": "" if one else _legend(names),
        "summary": _before_after(one) if one else _comparison(names, runs),
        "bottleneck": "".join(_bottleneck(run, "" if one else name) for name, run in zip(names, runs, strict=True)),
        "hero": hero_figures(curves, sorted(teachers), past) or "<p class=none>Nothing has been measured yet.</p>",
        "groups": "".join(groups),
        "steady": f'<section class="steady"><h2>Never changed</h2><dl>{flat}</dl></section>' if flat else "",
        "samples": samples([(name, run.trajectories) for name, run in zip(names, runs, strict=True)]),
        "timeline": "".join(
            timeline("" if one else name, run.events, run.result["wall_seconds"] or 0.0)
            for name, run in zip(names, runs, strict=True)
        ),
        "configuration": _configuration(names, runs),
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "sources": ", ".join(f"<code>{escape(str(run.path))}</code>" for run in runs),
    }


def _headline(runs: Sequence[Run]) -> str:
    """What happened, in a sentence."""
    if len(runs) > 1:
        ends = [run.result["accuracy_end"] for run in runs if run.result["accuracy_end"] is not None]
        span = f"{percent(min(ends))} to {percent(max(ends))}" if ends else "not measured"
        return f"Held-out accuracy after training, over {len(runs)} campaigns: <b>{span}</b>."
    result = runs[0].result
    before, after, teacher = (result[f"accuracy_{when}"] for when in ("start", "end", "teacher"))
    if before is None or after is None:
        kl = result["reverse_kl_end"]
        return f"The reverse KL to the teacher is <b>{compact(kl)}</b>." if kl is not None else "A campaign has begun."
    sentence = f"The student answers <b>{after:.1%}</b> of held-out prompts right"
    if result["updates"]:
        sentence += f", {'up' if after >= before else 'down'} from {before:.1%}"
    return sentence + (f"; its teacher answers {teacher:.1%}." if teacher is not None else ".")


def _state(run: Run) -> str:
    """Whether it has ended, and how."""
    last = next((event for event in reversed(run.events) if event["kind"] in _STATES), None)
    word, tone = _STATES[last["kind"]] if last else ("not finished", "warn")
    updates = run.setting("pipeline.updates")
    if word == "not finished" and updates:
        word = f"update {run.last('step')} of {escape(str(updates))}"
    cause = f' title="{escape(str(last["cause"]), quote=True)}"' if last and last.get("cause") else ""
    return f'<span class="state {tone}"{cause}>{word}</span>'


_STATES = {
    "started": ("not finished", "warn"),
    "resumed": ("not finished", "warn"),
    "interrupted": ("interrupted", "warn"),
    "stopped": ("interrupted", "warn"),
    "failed": ("failed", "bad"),
    "finished": ("finished", "good"),
}


def _meta(run: Run) -> str:
    teachers = run.setting("teachers", {})
    names = [str(teacher.get("model", name)) for name, teacher in teachers.items() if isinstance(teacher, dict)]
    parts = []
    if student := run.setting("student.model"):
        parts.append(f"<code>{escape(str(student))}</code> from <code>{escape(', '.join(names) or DASH)}</code>")
    if run.events:
        parts.append(time.strftime("%-d %B %Y, %H:%M", time.localtime(run.events[0]["time"])))
    if (seed := run.setting("seed")) is not None:
        parts.append(f"seed {escape(str(seed))}")
    return " <i></i> ".join(f"<span>{part}</span>" for part in parts)


def _before_after(run: Run) -> str:
    """Student before, student after, teacher; and what it took."""
    result = run.result
    rows = [
        ("Student, before", "before", "accuracy_start", "accuracy_sampled_start", "reverse_kl_start"),
        ("Student, after", "after", "accuracy_end", "accuracy_sampled_end", "reverse_kl_end"),
        ("Teacher", "teacher", "accuracy_teacher", "accuracy_sampled_teacher", None),
    ]
    lines = []
    for name, look, accuracy, sampled, kl in rows:
        share = result.get(accuracy)
        bar = (
            f'<span class="gauge {look}"><span style="width:{100 * share:.1f}%"></span></span>'
            if share is not None
            else ""
        )
        cells = [
            _cell(share, "{:.1%}".format),
            _cell(result.get(sampled), "{:.1%}".format),
            _cell(result.get(kl) if kl else 0, compact),
        ]
        lines.append(f'<tr class="{look}"><th>{name}</th><td class="bar">{bar}</td>{"".join(cells)}</tr>')
    head = "<tr><th>Held-out prompts</th><td></td><th>Accuracy</th><th>Sampled</th><th>Reverse KL</th></tr>"
    took = [
        ("updates", _text(result["updates"], "{:,}".format)),
        ("tokens sampled", _text(result["tokens_generated"], "{:,}".format)),
        ("wall clock", _text(result["wall_seconds"], seconds)),
        ("faults", _text(result["faults"], "{:,}".format)),
    ]
    took += _cost(result.get("cost") or {})
    ledger = result.get("ledger") or {}
    if ledger:
        took.append(("trajectories trained", f"{ledger['trained']:,}"))
    for reason, count in (result.get("dropped_because") or {}).items():
        took.append((f"dropped: {escape(reason)}", f"{count:,}"))
    if still_open := ledger.get("issued", 0) - ledger.get("trained", 0) - ledger.get("dropped", 0):
        took.append(("under way", f"{still_open:,}"))
    tiles = "".join(f"<div><dd>{value}</dd><dt>{name}</dt></div>" for name, value in took)
    return f'<table class="result"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table><dl class="tiles">{tiles}</dl>'


def _cost(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """Hours by role, of GPUs where there were any, else of processors."""
    kind = "gpu_hours" if cost.get("tokens_per_gpu_hour") else "cpu_hours"
    hours = {role: found for role, found in cost.get(kind, {}).items() if found}
    name = "GPU hours" if kind == "gpu_hours" else "core hours"
    tiles = [(f"{name}, {escape(role)}", f"{found:,.3g}") for role, found in hours.items()]
    if cost.get("tokens_per_gpu_hour"):
        tiles.append(("tokens sampled in a GPU hour", f"{cost['tokens_per_gpu_hour']:,.0f}"))
    return tiles


def _comparison(names: Sequence[str], runs: Sequence[Run]) -> str:
    """The same for several runs, a line each."""
    columns = (
        ("before", "accuracy_start", "{:.1%}".format),
        ("after", "accuracy_end", "{:.1%}".format),
        ("teacher", "accuracy_teacher", "{:.1%}".format),
        ("KL before", "reverse_kl_start", compact),
        ("KL after", "reverse_kl_end", compact),
        ("updates", "updates", "{:,}".format),
        ("tokens", "tokens_generated", "{:,}".format),
        ("wall clock", "wall_seconds", seconds),
    )
    head = "".join(f"<th>{name}</th>" for name, _, _ in columns)
    lines = [
        f'<tr><th><span class="key c{i % PALETTE_SIZE}"></span>{escape(name)} {_state(run)}</th>'
        + "".join(_cell(run.result.get(key), form) for _, key, form in columns)
        + "</tr>"
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    return f'<div class="wide"><table class="result many"><thead><tr><th>Campaign</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


class Pace(NamedTuple):
    """How the loop's time was spent."""

    shares: dict[str, float]
    """Share of the loop's time that one actor of each role works; empty where nothing was measured."""
    replicas: dict[str, int]
    """At the end."""
    loop_seconds: float
    over_slowest: float
    """The loop's time over that of its slowest stage."""


def pace(run: Run) -> Pace:
    """From the summary; without one, from the metrics: the loop's time is then that between the first and last line."""
    result = run.result
    teachers = [t for t in run.setting("teachers", {}).values() if isinstance(t, dict)]
    replicas = {
        "rollout": run.setting("rollout.replicas", 1),
        "teacher": sum(teacher.get("replicas", 1) for teacher in teachers) or 1,
        "learner": run.setting("learner.replicas", 1),
    }
    counted = result.get("actors") or {"mean": replicas, "end": replicas}
    replicas = counted["end"]
    each = {role: (result["busy"].get(role) or 0.0) / (counted["mean"][role] or 1) for role in BUSY}
    slowest = max(each.values())
    walls = [row["wall_seconds"] for row in run.metrics if row.get("wall_seconds") is not None]
    loop = result.get("loop_seconds") or (result.get("wall_over_slowest_stage") or 0) * slowest
    loop = loop or (walls[-1] - walls[0] if walls else 0.0)
    if not slowest or not loop:
        return Pace({}, replicas, loop, 0.0)
    return Pace({role: value / loop for role, value in each.items()}, replicas, loop, loop / slowest)


def _bottleneck(run: Run, name: str) -> str:
    """Which stage sets the pace, in a sentence and three bars."""
    shares, replicas, loop, ratio = pace(run)
    if not shares:
        return ""
    slowest = max(shares, key=lambda role: shares[role])
    count = replicas[slowest]
    stages = [Stage(role, shares[role] * replicas[role], replicas[role], scalable=role != "learner") for role in shares]
    verdict = Plan(tuple(stages), overlapped=run.setting("pipeline.max_staleness", 0) > 0).sentence()
    if name:
        sentence = f"<b>{escape(name)}: {verdict}.</b> The loop’s {seconds(loop)} are {ratio:.2f} times those of its slowest stage."
        return f'<div class="bottleneck"><p>{sentence}</p><dl>{_bars(shares)}</dl></div>'
    sentence = (
        f"<b>{verdict.capitalize()}.</b> The {slowest} is the slowest stage: "
        f"{f'each of its {count} actors' if count > 1 else 'it'} works {percent(shares[slowest])} of the loop’s {seconds(loop)}. "
        f"The loop takes {ratio:.2f} times as long as that stage alone; 1 would mean that it never waits."
    )
    if run.setting("pipeline.max_staleness") == 0:
        sentence += " With <code>pipeline.max_staleness: 0</code> the stages take turns, and their times add up."
    return f'<div class="bottleneck"><p>{sentence}</p><dl>{_bars(shares)}</dl></div>'


def _bars(shares: dict[str, float]) -> str:
    return "".join(
        f'<div><dt>{role}</dt><dd><span class="gauge"><span class="r{i}" style="width:{min(100 * share, 100):.1f}%"></span></span>'
        f"<span>{percent(share)}</span></dd></div>"
        for i, (role, share) in enumerate(shares.items())
    )


def _configuration(names: Sequence[str], runs: Sequence[Run]) -> str:
    """The configuration as it was resolved; for several runs, first where they differ."""
    parts = []
    if len(runs) > 1:
        leaves = [dict(_leaves(run.config)) for run in runs]
        keys = [
            key
            for key in dict.fromkeys(key for leaf in leaves for key in leaf)
            if len({leaf.get(key) for leaf in leaves}) > 1
        ]
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        rows = "".join(
            f"<tr><th><code>{escape(key)}</code></th>"
            + "".join(f"<td>{escape(leaf.get(key, DASH))}</td>" for leaf in leaves)
            + "</tr>"
            for key in keys
        )
        parts.append(
            f'<h3>Where they differ</h3><div class="wide"><table class="differences"><tr><th></th>{head}</tr>{rows}</table></div>'
        )
    for name, run in zip(names, runs, strict=True):
        if run.config_text:
            opened = " open" if len(runs) == 1 else ""
            parts.append(
                f"<details{opened}><summary>{escape(name)}/{CONFIG_FILE}</summary><pre>{_highlighted(run.config_text)}</pre></details>"
            )
    return "".join(parts) or f"<p class=none>There is no {CONFIG_FILE}.</p>"


def _highlighted(text: str) -> str:
    """YAML with its keys marked."""
    lines = []
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        lines.append(f"<b>{escape(key)}</b>{colon}{escape(value)}" if colon else escape(line))
    return "\n".join(lines)


def _parsed(text: str) -> dict[str, Any]:
    """The configuration as a dictionary; {} where it is torn: the text is shown all the same."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names; with their directories where two have one name."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _legend(names: Sequence[str]) -> str:
    return "".join(f'<span class="key c{i % PALETTE_SIZE}">{escape(name)}</span>' for i, name in enumerate(names))


def _text(value: Any, form: Any) -> str:
    return DASH if value is None else escape(form(value))


def _cell(value: Any, form: Any) -> str:
    return f"<td>{_text(value, form)}</td>"
