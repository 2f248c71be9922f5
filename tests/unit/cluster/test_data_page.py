"""docs/data.md: its files and commands, as they stand there, are a campaign that works."""

import re
from pathlib import Path

from cluster.records.writer import read_jsonl
from tests import clean_process
from tests.documented import ROOT, commands_of
from tests.light_campaign import run_command_here
from tests.light_engine import BACKEND

PAGE = (ROOT / "docs" / "data.md").read_text("utf-8")
FILES = re.findall(r"[Ss]ave (?:this|it) as\s+`([\w.]+)`:\n\n```\w+\n(.*?)```", PAGE, re.S)


def test_the_page_leads_from_ten_lines_to_a_campaign(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, content in FILES:
        (tmp_path / name).write_text(content)
    assert [name for name, _ in FILES] == ["mine.jsonl", "mine_rewards.py", "mine.yaml"]
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) == 10
    commands = [text.split() for text in commands_of(PAGE) if text.startswith("understudy ")]
    assert [words[1] for words in commands] == ["check", "run", "status", "report"]
    told = {}
    for _, command, *words in commands[:2]:  # test_commands.py tries the others
        # The only differences: no cluster is asked, and the engine is one that needs no vLLM.
        more = {"check": ["--offline"], "run": [f"rollout.backend={BACKEND}", "rollout.engine={}"]}.get(command, [])
        log = tmp_path / f"{command}.log"
        process = clean_process.start(run_command_here, tmp_path, command, *words, *more, log=log)
        process.join()
        told[command] = log.read_text()
        assert process.exitcode == 0, told[command][-3000:]
    assert "prompts.sources.mine: 10 prompts, 75.0% of all that are drawn" in " ".join(told["check"].split())
    rows = [row for row in read_jsonl(tmp_path / "runs" / "mine" / "metrics.jsonl") if row["step"]]
    assert len(rows) == 2 and all("reward/format_mean" in row and "domain/mine/token_share" in row for row in rows)
    assert "eval/accuracy" in rows[-1] and (tmp_path / "runs" / "mine" / "report.html").exists()
