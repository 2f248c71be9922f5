"""The rows of the audited table (docs/results.md): what each runs, and on what it is measured.

A row is a YAML file and an entry of ROWS. `python -m benchmarks.audit NAME` runs it.
"""

from dataclasses import dataclass, field
from typing import Any

from cluster.commands.compare import METHODS

SET = "audit"
"""The evaluation set that a row is measured on, where it names no other."""
SFT = {key: {"null": None, "false": False}.get(value, value) for key, value in METHODS["sft"].items()}
"""What supervised training on the teacher's own answers sets."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: campaigns that differ in method and seed."""

    title: str
    config: str
    """The YAML file, from the repository's root."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What all its campaigns set beside the file: key -> value."""
    measured: str = SET
    """The evaluation set (`evaluation.sets.<name>`, of the file or of `settings`) that the figures are of."""
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {"opd": {}})
    """Name -> what its campaigns set besides. The first is the one that is interrupted."""
    seeds: tuple[int, ...] = (0, 1, 2)
    prepare: str = ""
    """The command that makes what the file expects and the repository does not hold."""
    remark: str = ""
    """What a reader of the figures has to know."""
    needs: dict[str, str] = field(default_factory=dict)
    """What a row that nobody has run needs: `GPUs`, `hours`, `disk` ...; it is listed as not run."""


LAST_NUMBER = {"name": "regex", "pattern": r";(\d+)$"}
"""The verifier of sums, and of what ends as they do."""


def held_out(
    path: str, samples: int, verifier: dict[str, str] = LAST_NUMBER, every: int = 1_000_000, **prompts: Any
) -> dict[str, Any]:
    """A set of prompts: `samples` answers to each, sampled as in training, before the first update, after the last, and every so
    many updates between them."""
    return {
        f"evaluation.sets.{SET}": {
            "prompts": {"path": path, **prompts},
            "verifier": verifier,
            "samples": samples,
            "every_updates": every,
        }
    }


def played(path: str, samples: int) -> dict[str, Any]:
    """The same of episodes, whose environment judges."""
    found = held_out(path, samples)
    return {key: {name: its for name, its in one.items() if name != "verifier"} for key, one in found.items()}


ROWS: dict[str, Row] = {
    "demo": Row(
        title="The demo: a bad habit is corrected",
        config="configs/quickstart.yaml",
        settings=held_out("examples/addition/heldout.jsonl", 4),
    ),
    "two_domains": Row(
        title="Two teachers, two domains",
        config="examples/two_domains/distill.yaml",
        settings=held_out("examples/two_domains/heldout.jsonl", 4, domain_field="domain"),
    ),
    "privileged": Row(
        title="Privileged self-distillation",
        config="examples/privileged/distill.yaml",
        settings=held_out("examples/addition/heldout.jsonl", 4),
    ),
    "carries": Row(
        title="Sums with at least four carries",
        config="examples/carries/distill.yaml",
        settings=held_out("examples/carries/heldout.jsonl", 4),
    ),
    "guess": Row(
        title="Episodes: a number is guessed",
        config="examples/guess/distill.yaml",
        settings=played("examples/guess/heldout.jsonl", 4),
    ),
    "calculator": Row(
        title="Episodes with a tool: sums by a calculator",
        config="examples/calculator/distill.yaml",
        settings=played("examples/calculator/heldout.jsonl", 4),
    ),
    "ciphers": Row(
        title="A teacher with more ways to answer than the student has room for: OPD beside SFT",
        config="examples/ciphers/distill.yaml",
        methods={"opd": {}, "sft": SFT},
        settings=held_out("examples/ciphers/heldout.jsonl", 4, {"name": "examples.ciphers.ciphers:right"}, every=10),
    ),
    "heal": Row(
        title="SmolLM2-135M without three of its layers, twelve short updates: OPD beside SFT",
        config="examples/heal/heal_short.yaml",
        methods={
            "opd": {},
            "sft": SFT,
        },
        # Evaluated often enough to compare both at equal cost.
        settings={"evaluation.every_updates": 4, "evaluation.teacher": False},
        measured="heldout",
        prepare="python -m examples.heal.damage HuggingFaceTB/SmolLM2-135M-Instruct ~/understudy-models/heal-student --drop 10,14,18",
    ),
    "qwen3_1.7b": Row(
        title="Qwen3-1.7B-Base from Qwen3-8B",
        config="configs/qwen3_1.7b_base_from_8b.yaml",
        measured="aime",
        needs={
            "GPUs": "4 of 80 GB",
            "hours that `understudy plan` predicts for H100": "2.0, without evaluations: 300 updates of 24.4 s",
            "disk": "20 GB of models, 21 GB a checkpoint, 4 of them",
        },
    ),
    "qwen3_8b": Row(
        title="Qwen3-8B-Base from Qwen3-32B, after the warm start of configs/qwen3_8b_warm_start.yaml",
        config="configs/qwen3_8b_from_32b.yaml",
        measured="aime",
        needs={
            "GPUs": "16 of 80 GB, on 2 nodes",
            "hours that `understudy plan` predicts for H100": "7.7, without evaluations: 300 updates of 92.9 s",
            "disk": "82 GB of models, 121 GB a checkpoint, 4 of them",
        },
    ),
}
"""Name -> row."""
