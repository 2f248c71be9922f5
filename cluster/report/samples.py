"""The report's sample trajectories: text with tokens coloured by log pi - log q, and filters."""

from bisect import bisect
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from cluster.records.forms import verdict
from cluster.records.turns import turns_of
from cluster.records.writer import read_jsonl

LEVELS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Bounds between the shades, in nats, on either side of white."""
MAX_STEPS = 7
"""Steps shown for each run: the first, the last, and some between."""
MAX_ROWS = 16
MAX_ROW_TOKENS = 400
"""A longer response is cut here."""
PAGE_TOKENS = 9000
"""Tokens on the page in all; bounds its size."""


def samples(runs: Sequence[tuple[str, dict[int, Path]]]) -> str:
    """The section: controls, legend, trajectories; at first those of the last step. runs: (name, step -> file)."""
    shown = {(run, step): path for run, (_, files) in enumerate(runs) for step, path in _spread(files).items()}
    if not shown:
        return "<p class=none>No trajectories were kept.</p>"
    articles, kept, budget = [], 0, PAGE_TOKENS // len(shown)
    last = {run: max(step for r, step in shown if r == run) for run, _ in shown}
    first_run = min(last)
    for (run, step), path in shown.items():
        rows = read_jsonl(path, checked=True)
        kept = max(kept, len(rows))
        hidden = (run, step) != (first_run, last[first_run])
        articles += [_article(run, step, row, hidden) for row in _within(rows, budget)]
    run_buttons = [(str(run), name) for run, (name, files) in enumerate(runs) if files]
    controls = _choice("run", run_buttons, str(first_run)) if len(run_buttons) > 1 else ""
    steps = sorted({step for _, step in shown})
    labels = [(str(step), f"{step}" if step else "0, untrained") for step in steps]
    controls += _choice("step", labels, str(last[first_run]), "update")
    controls += _choice("verdict", [("", "all"), ("right", "right"), ("wrong", "wrong")], "")
    return f'<div class="controls">{controls}<output></output></div>{_legend()}<div class="samples">{"".join(articles)}</div>'


def shade(student: float | None, teacher: float | None, trained: bool = True) -> str:
    """The CSS class of a token: p1 to p6 if the student gives it more, n1 to n6 if the teacher does, x without a score, c
    (context) if the student did not write it."""
    if not trained:
        return "c"
    if student is None or teacher is None:
        return "x"
    level = bisect(LEVELS, abs(student - teacher))
    return f"{'p' if student > teacher else 'n'}{level}" if level else ""


def _article(run: int, step: int, row: dict[str, Any], hidden: bool) -> str:
    student, teacher, tokens = row["student_logprobs"], row["teacher_logprobs"], row["tokens"][:MAX_ROW_TOKENS]
    reward, judged = row.get("reward"), verdict(row)
    trained = row.get("trained") or [True] * len(row["tokens"])
    own = [(s, t) for s, t, by in zip(student, teacher, trained, strict=True) if by]
    pairs = [(s, t) for s, t in own if s is not None and t is not None]
    facts = [f"{len(own):,} tokens", escape(str(row["finish_reason"]))]
    if len(own) < len(trained):
        facts.insert(1, f"{len(trained) - len(own):,} of others")
    begins = row.get("begins") or []
    if begins:
        facts.insert(2, f"{len(begins) + 1} conversations")
    if pairs:
        mean = sum(s - t for s, t in pairs) / len(pairs)
        facts.append(f"{mean:.3f} nats per token".replace("-", "−"))
    if reward not in (None, 0, 1):
        facts.append(f"reward {reward:g}")
    if row.get("reference") is not None:
        facts.append(f"expected <code>{escape(str(row['reference']))}</code>")
    shown = [_token(token, shade(s, t, by)) for token, s, t, by in zip(tokens, student, teacher, trained, strict=False)]
    marks = _turns(shown, trained[: len(tokens)], begins) if len(own) < len(trained) else "".join(shown)
    more = len(row["tokens"]) - len(tokens)
    text = "".join((marks, f"<span class=more>… {more:,} more tokens</span>" if more else ""))
    data = f'data-run="{run}" data-step="{step}" data-verdict="{judged}"'
    values = f'data-s="{_thousandths(student[: len(tokens)])}" data-t="{_thousandths(teacher[: len(tokens)])}"'
    head = f'<header><span class="verdict">{judged}</span> {" <i></i> ".join(facts)}</header>'
    prompt = f"<p class=prompt>{escape(str(row['prompt']))}</p>"
    return f"<article {data}{' hidden' * hidden}>{head}{prompt}<p class=tokens {values}>{text}</p></article>"


def _turns(marks: Sequence[str], trained: Sequence[bool], begins: Sequence[int]) -> str:
    """Tokens as blocks: the student's turns by number, and what others wrote between them."""
    return "".join(
        f'<span class={"turn" if turn.student else "others"} data-by="{turn.by}">'
        f"{''.join(marks[turn.begin : turn.end])}</span>"
        for turn in turns_of(trained, begins)
    )


def _token(token: str, look: str) -> str:
    """One token. Line ends, tabs and empty tokens get a visible sign."""
    text = escape(token).replace("\n", "⏎\n").replace("\t", "⇥\t") or "∅"
    return f"<i class={look}>{text}</i>" if look else f"<i>{text}</i>"


def _thousandths(logprobs: Sequence[float | None]) -> str:
    return " ".join("x" if value is None else f"{1000 * value:.0f}" for value in logprobs)


def _spread(files: dict[int, Path]) -> dict[int, Path]:
    """At most MAX_STEPS of the steps, with the first and the last."""
    steps = sorted(files)
    shown = min(len(steps), MAX_STEPS)
    wanted = {steps[round(i * (len(steps) - 1) / max(shown - 1, 1))] for i in range(shown)}
    return {step: files[step] for step in sorted(wanted)}


def _within(rows: Sequence[dict[str, Any]], budget: int) -> list[dict[str, Any]]:
    """The first rows that fit into `budget` tokens, but at least two."""
    fitting: list[dict[str, Any]] = []
    for row in rows[:MAX_ROWS]:
        budget -= min(len(row["tokens"]), MAX_ROW_TOKENS)
        if budget < 0 and len(fitting) >= 2:
            break
        fitting.append(row)
    return fitting


def _choice(name: str, options: Sequence[tuple[str, str]], chosen: str, title: str = "") -> str:
    """Buttons, one of them pressed."""
    buttons = "".join(
        f'<button data-{name}="{value}" aria-pressed="{"true" if value == chosen else "false"}">{escape(label)}</button>'
        for value, label in options
    )
    return f'<div class="choice" data-choice="{name}">{f"<span>{title}</span>" if title else ""}{buttons}</div>'


def _legend() -> str:
    """The scale of colours, with its bounds in nats."""
    most = len(LEVELS)
    cells = [*(f"n{level}" for level in range(most, 0, -1)), "n0", *(f"p{level}" for level in range(1, most + 1))]
    bounds = [*(f"−{bound:g}" for bound in reversed(LEVELS)), *(f"{bound:g}" for bound in LEVELS)]
    shades = "".join(
        f"<span><i class={cell}></i>{f'<b>{bounds[i]}</b>' if i < len(bounds) else ''}</span>"
        for i, cell in enumerate(cells)
    )
    return (
        f'<div class="scale"><span>teacher surer</span><div>{shades}</div><span>student surer</span>'
        "<p>Each token is coloured by log π − log q, in nats: student minus teacher. Red is what distillation takes back. What others wrote, such as an environment or a tool, has no colour.</p></div>"
    )
