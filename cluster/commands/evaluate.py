"""`understudy evaluate`: the evaluation sets of a configuration, on any models, through rollout actors and without a learner.

Several models answer the same prompts with the same seeds, and are compared prompt by prompt. Teacher actors start only where
the reverse KL is asked for.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from actors.data.judge import Judge
from actors.data.models import check_fit
from actors.errors import UserError
from cluster.commands.export import chosen_checkpoint
from cluster.config import CampaignConfig, EvaluationConfig, EvaluationSetConfig
from cluster.config_file import load_config
from cluster.console.runs import all_runs, named_run
from cluster.fleet.ray_cluster import connected, room_to_begin
from cluster.inputs import read_set_inputs
from cluster.loop.evaluation import SAMPLED
from cluster.loop.evaluation_sets import Tallies, difference_of, metrics_of, to_json
from cluster.loop.weight_sync import ObjectStoreTransport
from cluster.records.metric_table import with_change, with_interval
from cluster.records.rewards import MEANS, Told, is_graded, told_as
from cluster.records.writer import CONFIG_FILE, write_atomically
from cluster.roles import build_fleets, build_saved_model, build_sets

OF_DISTANCE = ("reverse_kl", "entropy", "reverse_kl_on_teacher_text", "response_length_mean")
"""Quantities that are no shares."""


@dataclass
class SampledSetConfig(EvaluationSetConfig):
    """`evaluation.prompts`, answered as in training: with the ids and so the seeds of a campaign's own evaluation."""

    first_sample: ClassVar[int] = SAMPLED


class Model(NamedTuple):
    """A model to evaluate."""

    name: str
    """As it is shown."""
    path: str
    """A model directory or hub name."""


Results = dict[str, dict[str, Tallies]]
"""Set -> model's name -> its scores."""


def models_of(sources: Sequence[str], step: str | None, best: bool) -> list[Model]:
    """The models behind directories, hub names and runs.

    step, best: which checkpoint of a run; neither: the newest that is sound. UserError: no such checkpoint, or the same model
    twice.
    """
    found = []
    for source in sources:
        if (run_dir := named_run(source, "MODEL_OR_RUN")) is None:
            found.append(Model(source, source))
            continue
        by = load_config(run_dir / CONFIG_FILE, environment=False).best_by if best else None
        checkpoint, state = chosen_checkpoint(run_dir, step, by)
        found.append(Model(f"{source}@{state.step}", str(checkpoint)))
    if (step is not None or best) and all(model.name == model.path for model in found):
        raise UserError("--step, --best", f"{', '.join(sources)}, of which none is a run", "a run directory")
    names = [model.name for model in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError("MODEL_OR_RUN", f"{twice} twice", "each model once")
    return found


def to_evaluate(config: CampaignConfig, wanted: Sequence[str], reverse_kl: bool) -> CampaignConfig:
    """The configuration with these sets, and with teachers only for the reverse KL.

    `evaluation.prompts` is two sets, `greedy` and `sampled`. wanted: names; empty: all. UserError: no such set.
    """
    evaluation, own = config.evaluation, dict(config.evaluation.sets)
    if evaluation.prompts is not None:
        played = config.environment is not None  # it gives the rewards
        judged = played or evaluation.prompts.has_references or judges_without_references(evaluation)
        verifier = evaluation.verifier if judged and not played else None
        common: dict[str, Any] = {
            "prompts": evaluation.prompts,
            "verifier": verifier,
            "max_response_tokens": evaluation.max_response_tokens,
        }
        greedy = {"greedy": EvaluationSetConfig(**common, temperature=0.0)} if judged else {}
        own = greedy | {"sampled": SampledSetConfig(**common)} | own
    if not own:
        raise UserError("evaluation", "no prompts and no sets", "held-out prompts: evaluation.sets.<name>.prompts.path")
    for name in wanted:
        if name not in own:
            raise UserError("--set", name, f"one of {', '.join(own)}", list(own))
    sets = {name: own[name] for name in wanted or own}
    if reverse_kl and not any(map(config.is_scored, sets.values())):
        raise UserError(
            "--reverse-kl", "sets that all sample otherwise than training", "one that samples as training does"
        )
    return replace(
        config,
        evaluation=EvaluationConfig(sets=sets, verifiers=evaluation.verifiers, teacher=False),
        teachers=config.teachers if reverse_kl else {},
        # One process loads the weights and publishes them; it needs no GPU.
        learner=replace(
            config.learner, replicas=1, sequence_parallel=1, gpus_per_replica=0, cpus_per_replica=1.0, resources={}
        ),
        weights=replace(config.weights, encoding="dense"),
    )


def judges_without_references(evaluation: EvaluationConfig) -> bool:
    """Whether a verifier reads the prompt or its record, and so needs no reference answer. UserError: one that cannot be made."""
    judge = Judge(evaluation.verifier, by_domain=evaluation.verifiers)
    try:
        return any(judge.of(domain).asks for domain in (None, *evaluation.verifiers))
    finally:
        judge.end()


def evaluate(
    config: CampaignConfig, models: Sequence[Model], on_event: Callable[..., None], tell: Callable[[str], None]
) -> Results:
    """Evaluates the models one after the other. config: of `to_evaluate`. UserError: a model or a prompt is at fault."""
    results: Results = {name: {} for name in config.evaluation.sets}
    own = [
        replace(config, student=replace(config.student, model=model.path, revision=None, lora=None, optimizer="new"))
        for model in models
    ]
    first: dict[str, int] = {}
    for model, its in zip(models, own, strict=True):  # what can be known is known before anything starts
        with naming_a_run(model):
            check_fit(its.student.source, its.student.trust_remote_code, model.path, quantised="refused")
        inputs = read_set_inputs(its)
        inputs.close()
        counts = {name: len(one.prompts) for name, one in inputs.sets.items()}
        if counts != (first := first or counts):
            name = next(name for name in counts if counts[name] != first[name])
            found = f"{counts[name]} prompts for {model.name} and {first[name]} for {models[0].name}"
            raise UserError(
                f"evaluation.sets.{name}.prompts", found, "the same prompts for all (too_long: refuse), to pair them"
            )
    with connected(config) as private:
        for model, its in zip(models, own, strict=True):
            tell(f"{model.name}: {', '.join(config.evaluation.sets)}")
            for name, tallies in asyncio.run(_evaluated(its, private, on_event)).items():
                results[name][model.name] = tallies
    return results


@contextmanager
def naming_a_run(model: Model) -> Iterator[None]:
    """A model that is not found may be a run whose name is misspelt, which the error says."""
    try:
        yield
    except UserError as error:
        near = get_close_matches(model.name, [run.name for run in all_runs()], n=1)
        if model.name != model.path or Path(model.path).exists() or not near:
            raise
        raise UserError(error.where, error.found, f"{error.expected}; or the run {near[0]!r}") from error


async def _evaluated(config: CampaignConfig, private: bool, on_event: Callable[..., None]) -> dict[str, Tallies]:
    inputs = read_set_inputs(config)
    needed, begin, short = room_to_begin(config, private)
    if short:
        raise short
    turn = asyncio.Lock()
    fleets = build_fleets(config, inputs, needed, begin, on_event, turn)
    saved = build_saved_model(config, needed, on_event, turn)
    rollout = fleets["rollout"]
    teachers = {name: fleets[f"teacher.{name}"] for name in config.teachers}
    try:
        await asyncio.gather(*(fleet.start() for fleet in (saved, *fleets.values())))
        versions = ObjectStoreTransport(saved, rollout, config.weights)
        rollout.prepare = versions.give
        await versions.load(await versions.publish())
        sets = build_sets(config, inputs, teachers, on_event, keep=0)

        async def answered() -> dict[str, Tallies]:
            return {name: (await one.student(rollout)).tallies for name, one in sets.items()}

        # Nobody here calls the environment actors: without a look at them, what waits for them would wait for ever.
        watched = [fleet.watched() for role, fleet in fleets.items() if role == "environment"]
        return await _first(answered(), *watched)
    finally:
        inputs.close()
        for fleet in (saved, *fleets.values()):
            fleet.close()


async def _first(work: Coroutine[Any, Any, Any], *beside: Coroutine[Any, Any, Any]) -> Any:
    """Returns the result of `work`. If `work` or a coroutine of `beside` fails before that, its error is raised at once."""
    tasks = [asyncio.ensure_future(one) for one in (work, *beside)]
    try:
        [done, *_] = (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]
        return done.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def table(results: Results) -> list[list[str]]:
    """[rows][columns] of text: a row for each set and quantity, a column for each model, then differences to the first."""
    names = list(next(iter(results.values())))
    rows = [["set", "quantity", *names, *(f"{name} - {names[0]}" for name in names[1:])]]
    for of_set, by_model in results.items():
        values = {name: metrics_of("", tallies) for name, tallies in by_model.items()}
        told = told_as(any(is_graded(own, of="") for own in values.values()))
        # An environment may have given one model rewards, and another none at all.
        for quantity in dict.fromkeys(quantity for name in names for quantity in by_model[name]):
            form = _form(quantity, told)
            row = [of_set, told.name if quantity == "accuracy" else quantity]
            row += [with_interval(values[name], quantity, form) if quantity in by_model[name] else "" for name in names]
            rows.append(row + [_change(by_model, quantity, name, names[0], form) for name in names[1:]])
    return rows


def _form(quantity: str, told: Told) -> str:
    if quantity in MEANS:
        return told.form
    return (".1f" if quantity.endswith("length_mean") else ".4f") if quantity in OF_DISTANCE else ".1%"


def _change(by_model: Mapping[str, Tallies], quantity: str, name: str, first: str, form: str) -> str:
    if quantity not in by_model[name] or quantity not in by_model[first]:
        return ""
    found = metrics_of("", {quantity: by_model[name][quantity]}, {quantity: by_model[first][quantity]})
    return with_change(found, quantity, form)


def write_results(config: CampaignConfig, models: Sequence[Model], results: Results, path: Path) -> None:
    """Writes the JSON file: every value with its interval, paired differences of all pairs, and the scores of each prompt."""
    content: dict[str, Any] = {"confidence": 0.95, "models": {model.name: model.path for model in models}, "sets": {}}
    for name, by_model in results.items():
        content["sets"][name] = {
            "prompts": len(next(iter(next(iter(by_model.values())).values())).counts),
            "samples": config.evaluation.sets[name].samples,
            "values": {own: metrics_of("", tallies) for own, tallies in by_model.items()},
            "differences": [
                {
                    "model": b,
                    "against": a,
                    "quantity": quantity,
                    "difference": apart.value,
                    "low": apart.low,
                    "high": apart.high,
                }
                for i, a in enumerate(by_model)
                for b in list(by_model)[i + 1 :]
                for quantity in by_model[a]
                if quantity in by_model[b]
                for apart in [difference_of(quantity, by_model[b][quantity], by_model[a][quantity])]
            ],
            "scores_by_prompt": {own: to_json(tallies) for own, tallies in by_model.items()},
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(_finite(content), indent=1) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value
