"""Writes the tables of docs/metrics.md from cluster/records/metric_table.py: run `python docs/make_metrics.py` after a change.

With --check it writes nothing and exits with status 1 where the page differs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.records.metric_table import METRICS, SECTIONS, Metric

TARGET = Path(__file__).with_name("metrics.md")
BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"


def section(title: str) -> list[str]:
    """Heading and table of one section. The last column is left out where no metric has a bad sign."""
    rows = [(key, metric) for key, metric in METRICS.items() if metric.section == title]
    signs = any(metric.bad_sign for _, metric in rows)
    head = ["key", "", "unit", "meaning", *(["a bad sign"] if signs else [])]
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for key, metric in rows:
        cells = [f"`{key}`", "G" if metric.guarded else "", metric.unit, _meaning(metric)]
        cells += [metric.bad_sign] if signs else []
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return [*lines, ""]


def _meaning(metric: Metric) -> str:
    """With the signals that it needs."""
    if not metric.signals:
        return metric.meaning
    return f"{metric.meaning}; with a `signal` of {', '.join(metric.signals)}"


def main() -> int:
    """Writes the page, or with --check compares it."""
    page = TARGET.read_text("utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    tables = [line for title in SECTIONS for line in section(title)]
    text = "\n".join([f"{before}{BEGIN}", "", *tables, f"{END}{after}"])
    if "--check" in sys.argv:
        return 0 if page == text else 1
    TARGET.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
