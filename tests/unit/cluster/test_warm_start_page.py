"""docs/warm-start.md: its files and commands, as they stand there, lead from responses to distillation."""

import re
from pathlib import Path

from cluster.records.writer import read_jsonl
from tests import clean_process
from tests.documented import ROOT, commands_of
from tests.light_campaign import run_command_here
from tests.light_engine import BACKEND

PAGE = (ROOT / "docs" / "warm-start.md").read_text("utf-8")
FILES = re.findall(r"(?:Save this|And this) as\s+`([\w.]+)`:\n\n```\w+\n(.*?)```", PAGE, re.S)


def test_the_page_leads_from_responses_to_distillation(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, content in FILES:
        (tmp_path / name).write_text(content)
    assert [name for name, _ in FILES] == ["worked.py", "sft.yaml", "opd.yaml"]
    commands = [text.split()[1:] for text in commands_of(PAGE) if re.match(r"understudy \w+ \w+\.yaml", text)]
    assert commands == [["check", "sft.yaml"], ["run", "sft.yaml"], ["run", "opd.yaml"]]
    # The only differences: no cluster is asked, the engine is one that needs no vLLM, and there is less of it.
    less = ["pipeline.prompts_per_update=2", "evaluation.prompts.limit=2", "pipeline.updates=1"]
    less += ["evaluation.teacher=false", "sampling.max_response_tokens=20"]
    fewer = ["pipeline.prompts_per_update=16", "prompts.function_arguments.count=400"]
    more = [["--offline"], fewer, [f"rollout.backend={BACKEND}", "rollout.engine={}", *less]]
    for words, own in zip(commands, more, strict=True):
        log = tmp_path / f"{words[0]}.{words[1]}.log"
        process = clean_process.start(run_command_here, tmp_path, *words, *own, log=log)
        process.join()
        assert process.exitcode == 0, log.read_text()[-3000:]
    losses = [row["loss"] for row in read_jsonl(tmp_path / "runs" / "warm" / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0]
    [before, after] = read_jsonl(tmp_path / "runs" / "distilled" / "metrics.jsonl")
    assert "eval/accuracy" in before and after["tokens_trained"] > 0
