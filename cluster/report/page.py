"""Writes one self-contained HTML page about one run or several: results, bottleneck, charts, samples, events.

It needs only the files of cluster/records/writer.py, so it also works for a campaign that is running or has crashed. All
text from models, users and errors is escaped. The page's security policy allows only its own script, by hash, and the
page loads nothing.
"""

import base64
import hashlib
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from actors.errors import UserError
from cluster.records.metric_table import METRICS, PIPELINE
from cluster.records.reader import Run, load_run
from cluster.records.software import in_one_line
from cluster.records.writer import CONFIG_FILE, OF_THIS_RUN
from cluster.report.charts import PALETTE_SIZE
from cluster.report.evaluations import evaluation_sets
from cluster.report.figures import (
    GROUPS,
    HISTOGRAMS,
    Past,
    Rows,
    busy_figure,
    hero_figures,
    histogram_figure,
    small_figures,
)
from cluster.report.samples import samples
from cluster.report.summary import DASH, before_after, bottleneck, comparison, headline, meta, state
from cluster.report.timeline import exports, timeline
from cluster.tracking.alerts import calls

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(run_dirs: Sequence[Path], output: Path) -> Path:
    """Writes the page about these runs to `output`. UserError: a directory is no run, or cannot be read."""
    return write_page([load_run(Path(run_dir)) for run_dir in run_dirs], output)


def write_page(runs: Sequence[Run], output: Path) -> Path:
    """Writes the page about runs that were read already. UserError: `output` cannot be written."""
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


def sections(runs: Sequence[Run]) -> dict[str, str]:
    """Name in the template -> HTML."""
    one = runs[0] if len(runs) == 1 else None
    names = _distinct_names(runs)
    titled = list(zip([""] if one else names, runs, strict=True))  # a single run needs no title on what is its own
    curves = [(name, run.metrics) for name, run in titled]
    teachers = {run.result["accuracy_teacher"] for run in runs} - {None}
    past = Past(one.events, one.undone, one.exports) if one else Past()
    groups, steady = _groups(curves, past)
    return {
        "title": escape(one.name if one else f"{len(runs)} campaigns"),
        "state": state(one) if one else "",
        "headline": headline(runs),
        "meta": meta(one) if one else "",
        "legend": "" if one else _legend(names),
        "summary": before_after(one) if one else comparison(names, runs),
        "bottleneck": "".join(bottleneck(run, name) for name, run in titled),
        "hero": hero_figures(curves, sorted(teachers), past) or "<p class=none>Nothing has been measured yet.</p>",
        "groups": evaluation_sets(curves, past) + groups,
        "steady": f'<section class="steady"><h2>Never changed</h2><dl>{steady}</dl></section>' if steady else "",
        "samples": samples([(name, run.trajectories) for name, run in zip(names, runs, strict=True)]),
        "timeline": "".join(_what_happened(name, run) for name, run in titled),
        "configuration": _configuration(names, runs),
        "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "sources": ", ".join(f"<code>{escape(str(run.path))}</code>" for run in runs),
    }


def _what_happened(name: str, run: Run) -> str:
    called = bool(run.setting("alerts.command") or run.setting("alerts.webhook"))
    return timeline(name, run.events, run.result["wall_seconds"] or 0.0, calls if called else None) + exports(
        run.exports
    )


def _groups(curves: Sequence[tuple[str, Rows]], past: Past) -> tuple[str, str]:
    """(sections of small charts, list of metrics that never changed)."""
    groups, steady = [], []
    for title, figures in GROUPS.items():
        drawn, flat = small_figures(figures, curves, past)
        for key in (key for key in HISTOGRAMS if METRICS[key].section == title):
            drawn += "".join(histogram_figure(key, name, rows) for name, rows in curves)
        if title == PIPELINE:
            drawn = "".join(busy_figure(name, rows) for name, rows in curves) + drawn
        if drawn:
            groups.append(f'<section><h2>{title}</h2><div class="grid">{drawn}</div></section>')
        steady.append(flat)
    return "".join(groups), "".join(steady)


def _configuration(names: Sequence[str], runs: Sequence[Run]) -> str:
    """The resolved configuration; for several runs, first a table of the keys that differ."""
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
        if software := run.setting(f"{OF_THIS_RUN}.software"):
            title = "" if len(runs) == 1 else f"{escape(name)}: "
            parts.append(f'<p class="meta">{title}{escape(in_one_line(software))}</p>')
        if run.config_text:
            opened = " open" if len(runs) == 1 else ""
            parts.append(
                f"<details{opened}><summary>{escape(name)}/{CONFIG_FILE}</summary><pre>{_highlighted(run.config_text)}</pre></details>"
            )
    return "".join(parts) or f"<p class=none>There is no {CONFIG_FILE}.</p>"


def _highlighted(text: str) -> str:
    """YAML with its keys in another colour."""
    lines = []
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        lines.append(f"<b>{escape(key)}</b>{colon}{escape(value)}" if colon else escape(line))
    return "\n".join(lines)


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _distinct_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names; runs with the same name get their directories instead."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _legend(names: Sequence[str]) -> str:
    return "".join(f'<span class="key c{i % PALETTE_SIZE}">{escape(name)}</span>' for i, name in enumerate(names))
