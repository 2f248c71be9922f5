"""Evaluation sets: sets of held-out prompts with their own verifier, sampling and length limit, and what is measured on them.

A set's responses have the seeds of their prompt and sample, the same in every evaluation, so that curves differ by the weights
alone. Every value has an interval, and is compared with the untrained student and the teacher prompt by prompt
(evaluation_statistics.py).
"""

import asyncio
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from actors.data.judge import Judge, texts_to_judge
from actors.prompts.prompt_set import PromptSet, requests
from actors.teacher_scores import TeacherScores, select_scores
from actors.trajectory import EVALUATION_EPOCH, FINISH_REASONS, Trajectories, select_trajectories
from cluster.config import CampaignConfig
from cluster.fleet.ray_actor import fetched
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.evaluation import Evaluator, Tallies, identity, rewards_by_row, right_ones, tell_failed
from cluster.loop.evaluation_statistics import Estimate, Tally, difference, estimate, majority, mean_of, pass_at, tally
from cluster.loop.exposure import Prefixes, by_position, on_teacher_text, teacher_prefixes
from cluster.loop.samples import readable_rows
from cluster.loop.teachers import Teachers
from cluster.loop.work import each_once, split_evenly
from cluster.records.rewards import are_graded, is_right

COMPARED = ("accuracy", "accuracy_sampled", "right", "majority", "reverse_kl", "reverse_kl_on_teacher_text")
"""Quantities, beside pass@k, that are compared with the untrained student; those of REWARDS also with the teacher."""
COUNTS = ("response_length_mean", "truncated_fraction")
"""Quantities without an interval."""
REWARDS = ("accuracy", "accuracy_sampled", "right", "majority")
"""Quantities whose scores are rewards. Their interval is that of a share where all rewards lie between 0 and 1."""


class Measured(NamedTuple):
    """One evaluation of a set."""

    tallies: Tallies
    rows: list[dict[str, Any]]
    """Of trajectories/."""
    busy: dict[str, float]
    """Role -> seconds of work."""
    curves: dict[str, Any] = {}  # noqa: RUF012 (nothing changes it in place)
    """Values by position (exposure.py)."""


def metrics_of(
    prefix: str, tallies: Tallies, start: Tallies | None = None, teacher: Tallies | None = None
) -> dict[str, float]:
    """The lines of metrics.jsonl: each quantity, its interval, and its differences to the start and to the teacher.

    prefix: `eval/` or `eval/<set>/`. start, teacher: what they had on the same prompts; None: not known.
    """
    found: dict[str, float] = {}
    for name, own in tallies.items():
        key, compared = f"{prefix}{name}", name in COMPARED or name.startswith("pass@")
        found[key] = mean_of(own)
        if name in COUNTS:
            continue
        value = estimate_of(name, own)
        found |= {f"{key}:low": value.low, f"{key}:high": value.high}
        references = {"from_start": (start or {}).get(name)}
        if name in REWARDS:
            references["from_teacher"] = (teacher or {}).get("right" if name == "right" else "accuracy")
        for versus, other in references.items():
            if compared and other is not None:
                apart = difference_of(name, own, other)
                found |= dict(zip((f"{key}:{versus}{end}" for end in ("", ":low", ":high")), apart, strict=True))
    return found


def estimate_of(name: str, scores: Tally) -> Estimate:
    """A quantity's mean with its interval."""
    share = is_share(name, scores)
    return _told_by(name, estimate(scores, share=share), share)


def difference_of(name: str, ours: Tally, theirs: Tally) -> Estimate:
    """A quantity's paired difference, ours - theirs, with its interval."""
    share = is_share(name, ours) and is_share(name, theirs)
    return _told_by(name, difference(ours, theirs, share=share), share)


def _told_by(name: str, found: Estimate, share: bool) -> Estimate:
    """The estimate; without its interval where rewards that may have any value do not vary, and so do not tell one."""
    if share or name not in REWARDS or found.low < found.high:
        return found
    return Estimate(found.value, math.nan, math.nan)


def is_share(name: str, scores: Tally) -> bool:
    """Whether the scores are shares of something, so that their mean lies between 0 and 1. Rewards need not be."""
    within = bool(np.all((scores.sums >= 0) & (scores.sums <= scores.counts)))
    return within and (name in REWARDS or name.startswith("pass@"))


def of_json(content: Mapping[str, Any]) -> Tallies:
    """The inverse of `to_json`."""
    return {name: Tally(np.array(sums, np.float64), np.array(counts)) for name, (sums, counts) in content.items()}


def to_json(tallies: Tallies) -> dict[str, Any]:
    """As a checkpoint holds it: quantity -> [sums, counts]."""
    return {name: [own.sums.tolist(), own.counts.tolist()] for name, own in tallies.items()}


class SetEvaluator:
    """One evaluation set."""

    def __init__(
        self,
        name: str,
        prompts: PromptSet,
        tokenizer: Any,
        judge: Judge | None,
        teachers: Teachers,
        *,
        config: CampaignConfig,
        stop_token_ids: list[int],
        keep_trajectories: int,
        on_event: Callable[..., None],
    ):
        """judge: None judges nothing. teachers: without fleets, nothing is scored and no teacher answers."""
        own = config.evaluation.sets[name]
        self.name, self.config, self.prompts = name, own, prompts
        self.every = own.every_updates or config.evaluation.every_updates
        self.trajectories = own.samples * len(prompts)
        """Responses that the student gives in one evaluation."""
        self._tokenizer, self._judge, self._teachers = tokenizer, judge, teachers
        self._sampling, self._greedy, self._seed = config.sampling_of(own), own.temperature == 0, config.seed
        self._scored = config.is_scored(own) and bool(teachers.fleets)
        self._stop, self._keep, self._on_event = stop_token_ids, keep_trajectories, on_event
        self._prefixes: Prefixes | None = None
        self._frozen = all(teacher.ema_decay is None for teacher in config.teachers.values())
        self._judged: list[int] = prompts.judged().tolist() if judge or prompts.played else []

    def identity(self) -> str:
        """What two evaluations must share to be compared prompt by prompt."""
        told = asdict(self.config) | {"every_updates": None, "exposure": None, "prompts": None}
        if self._judge and "domains" in (settings := self._judge.settings):
            told["verifier"] = settings
        return identity(self.prompts, told, asdict(self._sampling))

    async def student(self, rollout: Fleet) -> Measured:
        """Evaluates the weights that the rollout actors hold now."""
        ids = np.array(
            [
                (EVALUATION_EPOCH, prompt, sample)
                for prompt in range(len(self.prompts))
                for sample in range(self.config.first_sample, self.config.first_sample + self.config.samples)
            ],
            np.int64,
        )
        references, busy = await self._write(rollout, ids)
        written = select_trajectories(ids, await fetched(references))
        tallies = self._lengths(written)
        scores: TeacherScores | None = None
        curves: dict[str, Any] = {}
        seconds = {"rollout": busy, "teacher": 0.0}
        if self._scored:
            answer = await self._teachers.score(ids, references)
            scores = select_scores(ids, await fetched(each_once(itertools.chain(*answer.references))))
            seconds["teacher"] = answer.busy_seconds
            tallies |= self._distances(written, scores)
            if self.config.exposure:
                curves, tallies["reverse_kl_on_teacher_text"], more = await self._exposed(rollout, written, scores)
                seconds = {role: own + more[role] for role, own in seconds.items()}
        rewards: list[float | None] = [None] * len(ids)
        if self.prompts.played:
            judged = rewards_by_row(written)
            rewards = [judged.get(row) for row in range(len(ids))]
            tallies |= self._right(judged, {}) if judged else {}
        elif self._judged:
            arrays = written.response_tokens, written.response_offsets, ids[:, 1], written.turns
            judged, answers = await self._rewards(*arrays)
            rewards = [judged.get(row) for row in range(len(ids))]
            tallies |= self._right(judged, answers)
        rows = await asyncio.to_thread(self._rows, written, scores, rewards)
        return Measured(tallies, rows, seconds, curves)

    async def teacher(self) -> Tallies:
        """The teachers' greedy answers by the same verifier; {} where nothing is judged."""
        if not self._judged or not self._teachers.fleets or self.prompts.played:
            return {}
        limit = self._sampling.max_response_tokens
        tokens, offsets = await self._teachers.generate(self.prompts, limit, self._stop)
        judged, _ = await self._rewards(tokens, offsets, np.arange(len(self.prompts)))
        return self._of_rewards(judged, np.arange(len(self.prompts)))

    async def _exposed(
        self, rollout: Fleet, written: Trajectories, scores: TeacherScores
    ) -> tuple[dict[str, Any], Tally, dict[str, float]]:
        """(the curves by position, the reverse KL at the teacher's prefixes, role -> seconds of work)."""
        prefixes = self._prefixes or await teacher_prefixes(self.prompts, self._teachers, self._sampling, self._seed)
        self._prefixes = prefixes if self._frozen else None
        at_prefixes, busy = await on_teacher_text(prefixes, rollout, self._teachers, self._sampling, self._seed)
        curves, found = by_position(prefixes, at_prefixes, written, scores)
        return curves, found, busy

    async def _write(self, rollout: Fleet, ids: np.ndarray) -> tuple[list[Any], float]:
        """References of the responses, one for each rollout actor's part, and the seconds of the engines."""
        answers = await asyncio.gather(
            *(
                rollout.call(
                    "generate",
                    requests(self.prompts, ids[list(part)], self._seed),
                    self._greedy,
                    self._sampling,
                    returns=2,
                    units=len(part) * self._sampling.max_response_tokens,
                )
                for part in split_evenly(len(ids), len(rollout.replicas))
            )
        )
        tell_failed([counts for counts, _ in answers], self._on_event, set=self.name)
        return [reference for _, reference in answers], sum(counts.busy_seconds for counts, _ in answers)

    def _lengths(self, written: Trajectories) -> Tallies:
        cut = written.finish_reasons == FINISH_REASONS.index("length")
        return {
            "response_length_mean": self._grouped(written.trained_lengths.astype(np.float64)),
            "truncated_fraction": self._grouped(cut.astype(np.float64)),
        }

    def _grouped(self, of_each: np.ndarray) -> Tally:
        """[C x samples] values, the samples of a prompt side by side."""
        rows = of_each.reshape(len(self.prompts), self.config.samples)
        return Tally(rows.sum(1), np.full(len(rows), self.config.samples))

    def _distances(self, written: Trajectories, scores: TeacherScores) -> Tallies:
        """Monte-Carlo estimates in nats a token: of KL(pi || q), over tokens with a score, and of the entropy of pi."""
        drawn, trained = written.student_logprobs, written.trained
        log_ratios = np.where(trained, drawn - scores.logprobs, np.nan)
        surprise = np.where(trained, -drawn, np.nan)
        bounds = written.response_offsets[:: self.config.samples][1:-1]
        return {
            "reverse_kl": tally(np.split(log_ratios, bounds)),  # type: ignore[arg-type]
            "entropy": tally(np.split(surprise, bounds)),  # type: ignore[arg-type]
        }

    async def _rewards(
        self, tokens: np.ndarray, offsets: np.ndarray, prompts: np.ndarray, turns: np.ndarray | None = None
    ) -> tuple[dict[int, float], dict[int, str | None]]:
        """(row -> reward, row -> answer) of the responses to prompts [B] that are judged. turns: see `texts_to_judge`."""
        judge = self._judge
        assert judge is not None
        chosen = set(self._judged)
        rows = [row for row, prompt in enumerate(prompts.tolist()) if prompt in chosen]
        references = [self.prompts.references[prompts[row]] for row in rows]
        asides = [self.prompts.aside(prompts[row]) for row in rows]
        votes = self.config.samples > 1 and judge.tells_answers(aside.domain for aside in asides)

        def verdicts() -> Any:
            texts = texts_to_judge(self._tokenizer, tokens, offsets, turns)
            return judge.rewards([texts[row] for row in rows], references, asides, answers=votes)

        # In a thread: decoding and judging take their time, and the loop has a checkpoint to write when it is interrupted.
        found = await asyncio.to_thread(verdicts)
        if found.failed:
            self._on_event("unjudged", count=len(found.failed), cause=found.failed[0], evaluation=True, set=self.name)
        return dict(zip(rows, found.rewards.tolist(), strict=True)), dict(zip(rows, found.answers, strict=False))

    def _by_prompt(self, judged: Mapping[int, float], prompts: np.ndarray) -> Tally:
        rows: list[list[float]] = [[] for _ in range(len(self.prompts))]
        for row, reward in judged.items():
            rows[prompts[row]].append(reward)
        return tally(rows)

    def _of_rewards(self, judged: Mapping[int, float], prompts: np.ndarray) -> Tallies:
        """The accuracy of answers to these prompts, and beside graded rewards the share of right ones."""
        right = {"right": self._by_prompt(right_ones(judged), prompts)} if are_graded(judged.values()) else {}
        return {"accuracy": self._by_prompt(judged, prompts), **right}

    def _right(self, judged: Mapping[int, float], answers: Mapping[int, str | None]) -> Tallies:
        """Accuracy (avg@k); with several samples also pass@k for k = 2, 4, 8, … and `samples`, and the majority vote."""
        samples = self.config.samples
        found = self._of_rewards(judged, np.arange(self.trajectories) // samples)
        if samples == 1:
            return found
        rewards = {prompt: [judged[prompt * samples + sample] for sample in range(samples)] for prompt in self._judged}
        there = np.zeros(len(self.prompts))
        there[self._judged] = 1
        for k in passes(samples):
            values = np.zeros(len(self.prompts))
            for prompt, of_it in rewards.items():
                values[prompt] = pass_at(k, sum(map(is_right, of_it)), samples)
            found[f"pass@{k}"] = Tally(values, there)
        if answers:
            values = np.zeros(len(self.prompts))
            for prompt, of_it in rewards.items():
                values[prompt] = majority([answers[prompt * samples + sample] for sample in range(samples)], of_it)
            found["majority"] = Tally(values, there)
        return found

    def _rows(
        self, written: Trajectories, scores: TeacherScores | None, rewards: list[float | None]
    ) -> list[dict[str, Any]]:
        kept = select_trajectories(written.ids[: self._keep], [written])
        unknown = np.full(len(kept.response_tokens), np.nan, np.float32)
        logprobs = unknown if scores is None else scores.logprobs[: len(unknown)]
        rows = readable_rows(kept, logprobs, self._tokenizer, self.prompts, rewards[: len(kept)])
        return [{**row, "set": self.name} for row in rows]


def passes(samples: int) -> list[int]:
    """The k of pass@k: powers of two up to the samples, and the samples; 1 is the accuracy."""
    return sorted({*(2**i for i in range(1, samples.bit_length()) if 2**i <= samples), samples} - {1})


class Evaluations:
    """All evaluations of a campaign: of `evaluation.prompts`, and of each set."""

    def __init__(self, config: CampaignConfig, of_prompts: Evaluator | None, sets: Mapping[str, SetEvaluator]):
        self._config, self._of_prompts, self._sets = config, of_prompts, sets

    def due(self, step: int) -> list[str]:
        """The evaluations after this update: names of sets, "" for `evaluation.prompts`."""
        every = {"": self._config.evaluation.every_updates} if self._of_prompts is not None else {}
        every |= {name: one.every for name, one in self._sets.items()}
        return [name for name, updates in every.items() if step == self._config.pipeline.updates or step % updates == 0]

    def trajectories(self, step: int) -> int:
        """Responses that the student gives in the evaluations after this update."""
        own = self._of_prompts.trajectories if self._of_prompts is not None else 0
        return sum(self._sets[name].trajectories if name else own for name in self.due(step))

    async def student(
        self, rollout: Fleet, step: int, baselines: dict[str, Any]
    ) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, float]]:
        """Evaluates the weights that the rollout actors hold now: (metrics, rows for trajectories/, role -> seconds).

        baselines: of the state. The evaluation of step 0 writes "start" there, and with `evaluation.teacher` "teacher"; later
        ones are compared with both. Teachers answer while the student is measured: they have actors of their own.
        """
        due = self.due(step)
        all_measured, of_teacher = await asyncio.gather(
            self._all_measured(due, rollout), self._teacher(due if step == 0 else [], baselines)
        )
        metrics: dict[str, Any] = {}
        rows: list[dict[str, Any]] = []
        busy: dict[str, float] = {}
        for name, (found, measured) in zip(due, all_measured, strict=True):
            compared = [self._baseline(baselines, who, name) for who in ("start", "teacher")]
            metrics |= metrics_of(f"eval/{name}/" if name else "eval/", measured.tallies, *compared) | found
            metrics |= {f"eval/{name}/{key}": values for key, values in measured.curves.items()}
            rows += measured.rows
            busy = {role: busy.get(role, 0.0) + seconds for role, seconds in measured.busy.items()}
            if step == 0:
                own = {"of": self._identity(name), "tallies": to_json(measured.tallies)}
                baselines.setdefault("start", {})[name] = own
        return metrics | of_teacher, rows, busy

    async def _teacher(self, names: Sequence[str], baselines: dict[str, Any]) -> dict[str, float]:
        """The metrics of the teachers' answers to these sets; their tallies go into `baselines`."""
        if not names or not self._config.evaluation.teacher:
            return {}
        found: dict[str, Any] = {}
        metrics: dict[str, float] = {}
        for name in names:
            tallies = await (self._sets[name] if name else self._of_prompts).teacher()  # type: ignore[union-attr]
            if tallies:
                found[name] = {"of": self._identity(name), "tallies": to_json(tallies)}
                for quantity, scores in tallies.items():
                    key, own = f"eval/{name}/{quantity}" if name else f"eval/{quantity}", estimate_of(quantity, scores)
                    values = zip(("", ":low", ":high"), own, strict=True)
                    metrics |= {f"{key}_teacher{bound}": value for bound, value in values}
        baselines["teacher"] = found
        return metrics

    async def _all_measured(self, names: Sequence[str], rollout: Fleet) -> list[tuple[dict[str, float], Measured]]:
        return [await self._measured(name, rollout) for name in names]

    async def _measured(self, name: str, rollout: Fleet) -> tuple[dict[str, float], Measured]:
        if name:
            return {}, await self._sets[name].student(rollout)
        assert self._of_prompts is not None
        metrics, rows, busy = await self._of_prompts.student(rollout)
        return metrics, Measured(self._of_prompts.tallies, rows, busy)

    def _identity(self, name: str) -> str:
        return self._sets[name].identity() if name else self._of_prompts.identity()  # type: ignore[union-attr]

    def _baseline(self, baselines: Mapping[str, Any], who: str, name: str) -> Tallies | None:
        """None: not measured, or with other prompts, another verifier or another sampling."""
        stored = baselines.get(who, {}).get(name)
        if stored is None or stored["of"] != self._identity(name):
            return None
        return of_json(stored["tallies"])
