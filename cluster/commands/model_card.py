"""The model card of an exported student: where it comes from, what it was trained on and how, and how well it does."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from actors.config import MixedSourceConfig, SamplingConfig
from cluster.config import CampaignConfig, prompt_sources
from cluster.config_file import as_dictionary
from cluster.records.rewards import is_graded, told_as
from cluster.records.software import in_one_line
from cluster.state.campaign_state import CampaignState
from learner.config import ObjectiveConfig, OptimizerConfig


def model_card(
    config: CampaignConfig,
    state: CampaignState,
    evaluations: Mapping[int, Mapping[str, Any]],
    dtype: str,
    *,
    adapter_only: bool,
) -> str:
    """The card as Markdown, with the metadata of the Hugging Face hub. evaluations: step -> metrics."""
    base = config.student.model
    head = ["---", "library_name: " + ("peft" if adapter_only else "transformers")]
    if not _is_path(base):
        head.append(f"base_model: {base}")
    head += ["tags: [distillation, on-policy-distillation, understudy]", "---", ""]
    what = "The adapter of a student" if adapter_only else "A student"
    intro = (
        f"{what}, distilled on its own samples by Understudy: `{_name(base)}` after update {state.step} of "
        f"{config.pipeline.updates} of the campaign `{config.name}`. Weights in {dtype}."
    )
    lines = [*head, f"# {config.name}, update {state.step}", "", intro, ""]
    lines += ["## Figures", "", *_figures(state, evaluations), ""]
    lines += ["## Teachers and data", "", *_sources(config, state), ""]
    lines += ["## Training", "", *_training(config, state), ""]
    if state.history:
        changed = [
            f"- after update {row['step']}: `{row['key']}` {row['before']} -> {row['after']}" for row in state.history
        ]
        lines += ["Changed while it ran:", "", *changed, ""]
    lines += [
        "## Software",
        "",
        in_one_line(state.software) or "not recorded (an earlier release wrote this checkpoint)",
    ]
    return "\n".join(lines) + "\n"


def _figures(state: CampaignState, evaluations: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """A table of the untrained student, this one and the teacher."""
    here = evaluations.get(state.step) or state.evaluations.get(state.step, {})
    before = evaluations.get(0) or state.start
    rows = []
    told = told_as(any(map(is_graded, (before, here))))
    figures = {
        "eval/accuracy": (f"{told.name}, greedy", told.form),
        "eval/accuracy_sampled": (f"{told.name}, sampled", told.form),
        "eval/right": ("right (a reward of at least 1), greedy", ".1%"),
        "eval/reverse_kl": ("reverse KL to the teacher, nats a token", ".4f"),
    }
    for key, (name, form) in figures.items():
        teacher = before.get(f"{key}_teacher")
        found = [_text(one, form) for one in (before.get(key), here.get(key), teacher)]
        if found != ["–"] * 3:
            rows.append(f"| {name} | {' | '.join(found)} |")
    if not rows:
        return ["This checkpoint was not evaluated."]
    return ["On held-out prompts:", "", "| | before | here | teacher |", "|---|---|---|---|", *rows]


def _sources(config: CampaignConfig, state: CampaignState) -> list[str]:
    """Models and prompts with the fingerprints that the campaign knows them by."""

    def told(key: str, path: str) -> str:
        fingerprint = state.inputs.get(key, {}).get("fingerprint")
        return f"`{_name(path)}`" + (f", fingerprint `{fingerprint}`" if fingerprint else "")

    lines = [f"- student before: {told('student.model', config.student.model)}"]
    for name, teacher in config.teachers.items():
        how = f"backend {teacher.backend}, signal {teacher.signal}"
        lines.append(f"- teacher `{name}`: {told(f'teachers.{name}.model', teacher.model)}, {how}")
    for key, source in prompt_sources(config).items():
        what = "held-out prompts" if key.startswith("evaluation.") else "prompts"
        weight = f", weight {source.weight:g}" if isinstance(source, MixedSourceConfig) and source.weight else ""
        lines.append(f"- {what}: {told(key, source.origin)}{weight}")
    return lines


def _training(config: CampaignConfig, state: CampaignState) -> list[str]:
    pipeline, trained = config.pipeline, state.ledger.trained
    amount = (
        f"{state.step} updates of {pipeline.prompts_per_update} prompts with {pipeline.samples_per_prompt} samples each; "
        f"{trained:,} trajectories and {state.tokens_generated:,} tokens of the student's own; seed {config.seed}."
    )
    content = as_dictionary(config)
    settings = {
        "objective": _unusual(content["learner"]["objective"], ObjectiveConfig, ["estimator", "divergence"]),
        "optimizer": _unusual(content["learner"]["optimizer"], OptimizerConfig, ["learning_rate", "schedule"]),
        "sampling": _unusual(content["sampling"], SamplingConfig, ["temperature", "max_response_tokens"]),
    }
    return [
        amount,
        "",
        "What is not the default, besides the first of each:",
        "",
        "```yaml",
        yaml.safe_dump(settings, sort_keys=False).rstrip(),
        "```",
    ]


def _unusual(content: Mapping[str, Any], section: type, always: Iterable[str]) -> dict[str, Any]:
    defaults = asdict(section())
    return {key: value for key, value in content.items() if key in always or value != defaults[key]}


def _text(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _is_path(name: str) -> bool:
    """Whether a model or a data set is a directory or file, and not a name of the hub."""
    return name.startswith(("/", ".", "~")) or Path(name).exists() or name.count("/") > 1


def _name(path: str) -> str:
    """A name of the hub as it is; of a path only its end, since a card may be published."""
    return Path(path).name if _is_path(path) else path
