"""The report's text and tables: how a run ended, what was learnt, what it cost, what limited it. All text is escaped."""

import time
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from cluster.planning.throughput import Plan, Stage, environments, mean_of
from cluster.records.event_table import BEGINNINGS, ENDS, EVENTS
from cluster.records.outcome import outcome
from cluster.records.reader import Run, pace
from cluster.records.rewards import REWARD, told_as
from cluster.report.charts import PALETTE_SIZE, compact, percent, seconds

DASH = "–"


def headline(runs: Sequence[Run]) -> str:
    """The result in one sentence."""
    if len(runs) > 1:
        ends = [run.result["accuracy_end"] for run in runs if run.result["accuracy_end"] is not None]
        graded = any(run.result["graded"] for run in runs)
        low, high = (compact(end) if graded else percent(end) for end in ((min(ends), max(ends)) if ends else (0, 0)))
        span = f"{low} to {high}" if ends else "not measured"
        return f"Held-out {told_as(graded).name} after training, over {len(runs)} campaigns: <b>{span}</b>."
    result = runs[0].result
    before, after, teacher = (result[f"accuracy_{when}"] for when in ("start", "end", "teacher"))
    if before is None or after is None:
        kl = result["reverse_kl_end"]
        return f"The reverse KL to the teacher is <b>{compact(kl)}</b>." if kl is not None else "A campaign has begun."
    since = ""
    if result["updates"]:
        how = f"{'up' if after > before else 'down'} from {before:{told_as(result['graded']).form}}"
        since = f", {'as before' if after == before else how}"
    if result["graded"]:
        return _headline_of_rewards(result, since)
    sentence = f"The student answers <b>{after:.1%}</b> of held-out prompts right{since}"
    return sentence + (f"; its teacher answers {teacher:.1%}." if teacher is not None else ".")


def _headline_of_rewards(result: Mapping[str, Any], since: str) -> str:
    after = next(row for row in outcome(result).rows if row.look == "after")
    sentence = f"The student’s mean reward on held-out prompts is <b>{escape(after.cells[0])}</b>{since}"
    if after.right is not None:
        sentence += f"; {after.right:.1%} of its answers are right (a reward of at least 1)"
    teacher = result["accuracy_teacher"]
    return sentence + (f"; its teacher’s mean reward is {teacher:{REWARD.form}}." if teacher is not None else ".")


def state(run: Run) -> str:
    """Whether the run has ended, and how."""
    last = next((event for event in reversed(run.events) if event["kind"] in (*BEGINNINGS, *ENDS)), None)
    word, tone = "not finished", "warn"
    if last and last["kind"] in ENDS:
        word, tone = EVENTS[last["kind"]].label, EVENTS[last["kind"]].tone
    elif updates := run.setting("pipeline.updates"):
        word = f"update {run.last('step')} of {escape(str(updates))}"
    cause = f' title="{escape(str(last["cause"]), quote=True)}"' if last and last.get("cause") else ""
    return f'<span class="state {tone}"{cause}>{word}</span>'


def meta(run: Run) -> str:
    """Models, start and seed."""
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


def before_after(run: Run) -> str:
    """Table of the student before, the student after and the teacher, where they were measured; and the cost."""
    columns, rows = outcome(run.result)
    lines = []
    for row in rows:
        width = "" if row.right is None else f'<span style="width:{100 * row.right:.1f}%"></span>'
        bar = f'<span class="gauge {row.look}">{width}</span>' if width else ""
        cells = "".join(f"<td>{_with_interval_below(cell)}</td>" for cell in row.cells)
        lines.append(f'<tr class="{row.look}"><th>{_titled(row.name)}</th><td class="bar">{bar}</td>{cells}</tr>')
    head = "".join(f"<th>{_titled(name)}</th>" for name in columns)
    head = f"<tr><th>Held-out prompts</th><td></td>{head}</tr>"
    table = f'<table class="result"><thead>{head}</thead><tbody>{"".join(lines)}</tbody></table>'
    table = f'<div class="scrolled">{table}</div>' if rows else ""
    return f'{table}<dl class="tiles">{_tiles(run.result)}</dl>'


def _with_interval_below(cell: str) -> str:
    """`97.7 ± 0.9%` in two lines, which a narrow column has room for."""
    value, sign, half = cell.partition(" ± ")
    if not sign:
        return DASH if cell == "-" else escape(cell)
    return f"{escape(value)}{'%' * half.endswith('%')}<small>± {escape(half)}</small>"


def _titled(text: str) -> str:
    return escape(text[:1].upper() + text[1:])


def _tiles(result: dict[str, Any]) -> str:
    """The cost: one tile for each number."""
    took = [
        ("updates", _text(result["updates"], "{:,}".format)),
        ("tokens sampled", _text(result["tokens_generated"], "{:,}".format)),
        ("wall clock", _text(result["wall_seconds"], seconds)),
        ("actors lost", _text(result["faults"], "{:,}".format)),
    ]
    because, ledger = result.get("dropped_because") or {}, result.get("ledger") or {}
    took += [(f"dropped: {escape(reason.replace('_', ' '))}", f"{count:,}") for reason, count in because.items()]
    if (
        dropped := ledger.get("dropped", result.get("dropped"))
    ) and not because:  # under way: the reasons are in status.json
        took.append(("trajectories dropped", f"{dropped:,}"))
    took += _cost(result.get("cost") or {})
    if ledger:
        took.append(("trajectories trained", f"{ledger['trained']:,}"))
    if still_open := ledger.get("issued", 0) - ledger.get("trained", 0) - ledger.get("dropped", 0):
        took.append(("under way", f"{still_open:,}"))
    return "".join(f"<div><dd>{value}</dd><dt>{name}</dt></div>" for name, value in took)


def _cost(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """Hours of each role: of GPUs if there were any, otherwise of processor cores."""
    kind = "gpu_hours" if cost.get("tokens_per_gpu_hour") else "cpu_hours"
    hours = {role: found for role, found in cost.get(kind, {}).items() if found}
    name = "GPU hours" if kind == "gpu_hours" else "core hours"
    tiles = [(f"{name}, {escape(role)}", f"{found:,.3g}") for role, found in hours.items()]
    if cost.get("tokens_per_gpu_hour"):
        tiles.append(("tokens sampled in a GPU hour", f"{cost['tokens_per_gpu_hour']:,.0f}"))
    return tiles


def comparison(names: Sequence[str], runs: Sequence[Run]) -> str:
    """The same for several runs, one row each."""
    told = told_as(any(run.result["graded"] for run in runs))
    form = f"{{:{told.form}}}".format
    columns = (
        (f"{told.name} before", "accuracy_start", form),
        ("after", "accuracy_end", form),
        ("teacher", "accuracy_teacher", form),
        ("KL before", "reverse_kl_start", compact),
        ("KL after", "reverse_kl_end", compact),
        ("updates", "updates", "{:,}".format),
        ("tokens", "tokens_generated", "{:,}".format),
        ("wall clock", "wall_seconds", seconds),
    )
    head = "".join(f"<th>{name}</th>" for name, _, _ in columns)
    lines = [
        f'<tr><th><span class="key c{i % PALETTE_SIZE}"></span>{escape(name)} {state(run)}</th>'
        + "".join(_cell(run.result.get(key), form) for _, key, form in columns)
        + "</tr>"
        for i, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    return f'<div class="wide"><table class="result many"><thead><tr><th>Campaign</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def bottleneck(run: Run, name: str) -> str:
    """The stage that limits the run: a sentence and three bars."""
    shares, replicas, loop, ratio = pace(run)
    if not shares:
        return ""
    slowest = max(shares, key=lambda role: shares[role])
    count = replicas[slowest]
    stages = [Stage(role, shares[role] * replicas[role], replicas[role]) for role in shares]
    staleness = run.setting("pipeline.max_staleness", 0)
    if thinking := mean_of(run.metrics, "environment_seconds_mean"):
        stages.append(environments(thinking * run.result["updates"] / loop, 1, staleness))
    plan = Plan(tuple(stages), overlapped=staleness > 0)
    verdict = plan.sentence()
    if name:
        sentence = f"<b>{escape(name)}: {verdict}.</b> The loop’s {seconds(loop)} are {ratio:.2f} times those of its slowest stage."
    else:
        played = plan.bottleneck.at_once
        sentence = (
            f"<b>{verdict.capitalize()}.</b> {'Of the other stages, the' if played else 'The'} {slowest} is the slowest stage: "
            f"{f'each of its {count} actors' if count > 1 else 'it'} works {percent(shares[slowest])} of the loop’s {seconds(loop)}. "
            f"The loop takes {ratio:.2f} times as long as {'the environments' if played else 'that stage'} alone; "
            f"1 would mean that {'nothing else is waited for' if played else 'this stage never waits'}."
        )
        if staleness == 0:
            sentence += " With <code>pipeline.max_staleness: 0</code> the stages take turns, and their times add up."
    idle = sum(row.get("environment_idle_seconds") or 0.0 for row in run.metrics) / max(1, replicas.get("rollout", 0))
    if idle:
        sentence += f" Rollout engines had nothing to write for {percent(idle / loop)} of it, because environments were waited for."
    return f'<div class="bottleneck"><p>{sentence}</p><dl>{_bars(shares)}</dl></div>'


def _bars(shares: dict[str, float]) -> str:
    return "".join(
        f'<div><dt>{role}</dt><dd><span class="gauge"><span class="r{i}" style="width:{min(100 * share, 100):.1f}%"></span></span>'
        f"<span>{percent(share)}</span></dd></div>"
        for i, (role, share) in enumerate(shares.items())
    )


def _text(value: Any, form: Any) -> str:
    return DASH if value is None else escape(form(value))


def _cell(value: Any, form: Any) -> str:
    return f"<td>{_text(value, form)}</td>"
