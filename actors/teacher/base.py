"""The base class of the teacher backends: turns trajectories into scores, and runs the self-test.

A backend is a class that extends `Teacher` and has a row in `backends.py`.
"""

import time
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from actors.config import TeacherConfig
from actors.data.contexts import context_length, engine_context, has_context
from actors.data.models import load_config
from actors.errors import CampaignError
from actors.processor_time import ProcessorTime
from actors.teacher.backends import Backend
from actors.teacher_scores import TeacherScores, split_scores
from actors.trajectory import PER_TOKEN, Limits, Prompts, Trajectories, offsets_of, select_trajectories

PLAUSIBLE = (-1000.0, 1e-3)
"""Nats. Some servers answer a sentinel such as -9999 in place of a log-prob; values outside are treated as missing."""
REPEATS = 0.02
"""Nats by which an answer to the probe may differ when asked again, where kernels or batches change from call to call."""
UNBOUNDED = 2**31 - 1
"""Stands for a vocabulary or a context whose size is not known."""


class TeacherCounts(NamedTuple):
    """What the campaign process needs to know about a batch of scores: it never fetches the scores themselves."""

    missing: int
    """Tokens without a score. They are masked in training."""
    busy_seconds: float
    """Seconds that the call took."""
    refused: Mapping[int, str] = {}
    """Number of a trajectory in the call -> why it has no scores at all. The campaign drops it."""
    processor_seconds: float = 0.0
    """Processor time of the actor's process since its last report."""


class Teacher:
    """Base class of the teacher backends. A backend implements `score_tokens`, and the methods that its row promises.

    Its constructor takes (config, key, vocabulary), and ends with `self_test`. An actor runs one call at a time.
    """

    backend: Backend
    """Row of a class of the user's own; the rows of the built-in classes are in backends.py."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """config: the teacher's section. key: the section's configuration key, for errors, e.g. "teachers.default".

        vocabulary: V, rows of the student's output layer; None if it is not known.
        """
        self.config, self.key, self.name = config, key, key.rpartition(".")[2]
        self.vocabulary = vocabulary or UNBOUNDED
        """Ids below it have a score: those that student and teacher both have a row for. The backend lowers it to the
        teacher's rows."""
        self.temperature = 1.0 if config.temperature is None else config.temperature
        """Divides the logits of everything that is scored. The campaign puts the student's where the user gave none."""
        self.context = UNBOUNDED
        """Tokens that it can score at once, prompt and response. A longer trajectory is refused, not cut."""
        self._busy_seconds, self._probe_logprob = 0.0, float("nan")
        self._processor = ProcessorTime()

    # Teacher is not an ABC: a teacher that wraps another one overrides `score` and needs no `score_tokens`. backends.py
    # reads the marks, to refuse a user's class that lacks a method.
    @abstractmethod
    def score_tokens(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """The fields of TeacherScores with one row for each of the N response tokens, as `config.signal` asks.

        Always `logprobs` [N] float32, log q(y_t | c_t) in nats at `temperature`. With `topk` and `student_topk` also
        `support_ids` [N, K] int32 and `support_logprobs` [N, K] float32; with `full` `support_logprobs` [N, V]; with
        `hidden` `hidden` [N, H]. NaN: the log-prob is missing. Arrays must be writable. The key `refused` may hold the
        trajectories that cannot be scored at all, see TeacherCounts.

        Long work has to call `actors.heartbeat.beat()` from time to time (docs/extending.md).
        """
        raise NotImplementedError

    @abstractmethod
    def generate(self, prompts: Prompts, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
        """Greedy responses to B prompts: (tokens [N] int32, offsets [B + 1]), with the stop tokens that ended them."""
        raise NotImplementedError

    def score(
        self,
        ids: np.ndarray,
        *batches: Trajectories,
        prompts: Prompts | None = None,
        log_weights: np.ndarray | None = None,
    ) -> tuple[TeacherCounts, TeacherScores]:
        """Scores the trajectories with these ids [B, 3], in this order; the batches hold them, and perhaps others.

        prompts: the B prompts that a teacher with privileged information reads in place of the student's; the response
        is the same. log_weights: [B] log of this teacher's share in a mixture, copied into the scores; None: 0.

        A token has the score NaN, and is counted as missing, where its log-prob is missing, not finite or implausible
        (PLAUSIBLE), where its id is not below `vocabulary`, or where nothing is left of its support. For the same reasons
        a single entry of a support is NaN, with the id 0; the other entries keep their scores. In the context, the last
        row of the vocabulary stands for ids that the teacher has no row for. The result depends on `ids` and on the
        trajectories, not on the batches that they came in. KeyError: an id that no batch holds.
        """
        start = time.perf_counter()
        trajectories = select_trajectories(ids, batches)
        if prompts is not None:
            trajectories = replace(trajectories, prompt_tokens=prompts[0], prompt_offsets=prompts[1])
        fields, refused = self._fields_of(trajectories)
        scored = ~np.repeat(np.isin(np.arange(len(ids)), list(refused)), trajectories.lengths)
        known = scored & (trajectories.response_tokens < self.vocabulary)
        # Comparisons with NaN are false, so NaN is not known.
        known &= (fields["logprobs"] > PLAUSIBLE[0] / min(self.temperature, 1.0)) & (fields["logprobs"] <= PLAUSIBLE[1])
        support_ids, support = fields["support_ids"], fields["support_logprobs"]
        entries = np.isfinite(support) & (support <= PLAUSIBLE[1])
        if support_ids.shape[1]:
            entries &= (support_ids >= 0) & (support_ids < self.vocabulary)
            fields["support_ids"] = np.where(entries, support_ids, 0).astype(np.int32)
            fields["support_logprobs"] = np.where(entries, support, np.float32(np.nan))
            known &= entries.any(-1)
        else:  # the whole vocabulary, which is no distribution where one of its entries is missing
            known &= entries.all(-1)
        # One mark is enough: the learner masks a token whose log-prob is NaN, whatever its support holds.
        fields["logprobs"][~known] = np.nan
        scores = TeacherScores(
            ids=trajectories.ids,
            response_offsets=trajectories.response_offsets,
            teacher=self.name,
            log_weights=np.zeros(len(ids), np.float32) if log_weights is None else log_weights,
            **fields,
        )
        counts = self._counted(scores, trajectories.trained & scored, start)
        return counts._replace(refused=refused), scores

    def _fields_of(self, trajectories: Trajectories) -> tuple[dict[str, np.ndarray], dict[int, str]]:
        """(the fields of `score_tokens` for all trajectories, NaN for those that are refused; these, with the reason)."""
        nothing = np.empty((len(trajectories.response_tokens), 0), np.float32)
        fields: dict[str, Any] = {
            "logprobs": np.full(len(nothing), np.nan, np.float32),
            "support_ids": nothing.astype(np.int32),
            "support_logprobs": nothing,
            "hidden": nothing,
        }
        lengths = np.diff(trajectories.prompt_offsets) + trajectories.lengths
        refused = {
            int(row): f"{lengths[row]} tokens, and {self.key} reads {self.context}"
            for row in np.flatnonzero(lengths > self.context)
        }
        if not refused:
            fields |= self._scored(trajectories)
            return fields, fields.pop("refused", {})
        rows = np.setdiff1d(np.arange(len(lengths)), list(refused))
        if len(rows):
            read = select_trajectories(trajectories.ids[rows], [trajectories])
            found = self._scored(read)
            refused |= {int(rows[row]): reason for row, reason in found.pop("refused", {}).items()}
            fields |= spread(found, np.repeat(np.isin(np.arange(len(lengths)), rows), trajectories.lengths))
        return fields, refused

    def _scored(self, trajectories: Trajectories) -> dict[str, Any]:
        """See `score_tokens`, which gets each conversation of a trajectory as a trajectory."""
        read = known_context(trajectories, self.vocabulary)
        if not read.begins.size:
            return self.score_tokens(read)
        apart, places, rows = conversations_apart(read)
        found: dict[str, Any] = self.score_tokens(apart)
        refused = {int(rows[row]): reason for row, reason in found.pop("refused", {}).items()}
        return {**spread(found, places), "refused": refused}

    def score_each(self, *arguments: Any, **keywords: Any) -> tuple[Any, ...]:
        """The same as `score`, in 1 + B values: the counts, and a TeacherScores for each of the B trajectories.

        For a learner of several ranks: Ray then sends each value only to the rank that trains on its trajectory.
        """
        counts, scores = self.score(*arguments, **keywords)
        return counts, *split_scores(scores)

    def status(self) -> dict[str, float]:
        """Busy seconds since the start, and the mean log-prob of the self-test's probe, which replicas share."""
        return {"busy_seconds": self._busy_seconds, "probe_logprob": self._probe_logprob}

    def self_test(self, vocabulary: int | None = None, *, repeats: float = 0.0) -> np.ndarray:
        """Scores a probe of the vocabulary twice and returns the scores. CampaignError: see `check_probe`."""
        size = vocabulary or self.vocabulary
        written = probe(min(size, self.context + 1))
        # Through `score`, so that the probe also tests the masks.
        first, second = (self.score(written.ids, written)[1].logprobs for _ in range(2))
        self._probe_logprob = check_probe(self.key, first, second, size, repeats=repeats)
        return first

    def _counted(self, scores: TeacherScores, trained: np.ndarray, start: float) -> TeacherCounts:
        """The counts of a call that began at `start`; adds its time to the busy seconds.

        trained: [N] bool, tokens whose missing scores are counted; the others are context (see Trajectories).
        """
        seconds = time.perf_counter() - start
        self._busy_seconds += seconds
        missing = int(np.isnan(scores.logprobs[trained]).sum())
        return TeacherCounts(missing, seconds, processor_seconds=self._processor.since_report())


def context_of(config: TeacherConfig, key: str) -> int:
    """Tokens that a teacher with files of its own can score at once; UNBOUNDED where its architecture has no limit.

    key: of the teacher's section. UserError: its files cannot be read.
    """
    network = load_config(config.source, config.trust_remote_code, f"{key}.model")
    if config.backend == "vllm":
        return engine_context(network, config.engine, f"{key}.engine") - 1  # it writes a token after what it scores
    return context_length(network) if has_context(network) else UNBOUNDED


def known_context(trajectories: Trajectories, vocabulary: int) -> Trajectories:
    """The trajectories with `vocabulary` - 1 in place of every id that is not below `vocabulary`.

    A model has no embedding for such an id: it would be an error in the whole batch, or a fault of the GPU.
    """
    last = np.int32(vocabulary - 1)
    prompt, response = trajectories.prompt_tokens, trajectories.response_tokens
    if max(prompt.max(initial=0), response.max(initial=0)) <= last:
        return trajectories
    return replace(trajectories, prompt_tokens=np.minimum(prompt, last), response_tokens=np.minimum(response, last))


def conversations_apart(trajectories: Trajectories) -> tuple[Trajectories, np.ndarray, np.ndarray]:
    """(each conversation as a trajectory, without its reward; [N] bool, the response tokens that are still ones; [C] the number
    of each conversation's trajectory). What the student read before the first turn of a conversation is its prompt.
    """
    t, total = trajectories, len(trajectories.response_tokens)
    further = np.flatnonzero(t.begins)
    rows = np.concatenate([np.arange(len(t)), np.searchsorted(t.response_offsets, further, side="right") - 1])
    starts = np.concatenate([t.response_offsets[:-1], further])
    order = np.lexsort((starts, rows))
    rows, starts = rows[order], starts[order]
    stops = np.append(starts[1:], total)
    turns = np.append(np.flatnonzero(t.trained), total)
    there = np.zeros(total, bool)
    of_trajectories, prompts = Prompts(t.prompt_tokens, t.prompt_offsets).rows(), []
    for start, stop, row, is_further in zip(starts, stops, rows, np.isin(starts, further), strict=True):
        turn = min(int(turns[np.searchsorted(turns, start)]), stop) if is_further else start
        prompts.append(t.response_tokens[start:turn] if is_further else of_trajectories[row])
        there[turn:stop] = True
    lengths = np.diff(np.concatenate([[0], np.cumsum(there)])[np.append(starts, total)])
    apart = replace(
        t,
        ids=t.ids[rows],
        prompt_tokens=np.concatenate(prompts),
        prompt_offsets=offsets_of(map(len, prompts)),
        response_offsets=offsets_of(lengths),
        finish_reasons=t.finish_reasons[rows],
        rewards=np.zeros(0, np.float32),
        begins=np.zeros(0, bool),
        **{name: getattr(t, name)[there] for name in PER_TOKEN if getattr(t, name).size},
    )
    return apart, there, rows


def spread(fields: dict[str, np.ndarray], places: np.ndarray) -> dict[str, np.ndarray]:
    """The fields of tokens at these places [N] bool as those of all N; the others have no score."""
    found = {}
    for name, values in fields.items():
        found[name] = np.zeros((len(places), *values.shape[1:]), values.dtype)
        found[name][places] = values
    found["logprobs"][~places] = np.nan
    return found


def known_prompts(prompts: Prompts, limits: Limits, vocabulary: int) -> tuple[Prompts, Limits]:
    """The same for prompts to answer, and the limits without stop tokens that the model cannot write."""
    stop = [token for token in limits.stop_token_ids if token < vocabulary]
    tokens = np.minimum(prompts.tokens, np.int32(vocabulary - 1))
    return Prompts(tokens, prompts.offsets), limits._replace(stop_token_ids=stop)


def texts_of(trajectories: Trajectories) -> list[list[int]]:
    """[B] prompt and response of each trajectory as one list of token ids, for engines that take a text as a prompt."""
    pairs = zip(
        Prompts(trajectories.prompt_tokens, trajectories.prompt_offsets).rows(),
        np.split(trajectories.response_tokens, trajectories.response_offsets[1:-1]),
        strict=True,
    )
    return [np.concatenate(pair).tolist() for pair in pairs]


def probe(vocabulary: int) -> Trajectories:
    """One trajectory of up to 31 response tokens, which every teacher with this vocabulary can score."""
    length = min(32, vocabulary - 1)
    tokens = np.arange(1, length + 1, dtype=np.int32)
    zeros = np.zeros(length - 1, np.float32)
    return Trajectories(
        ids=np.zeros((1, 3), np.int64),
        prompt_tokens=tokens[:1],
        prompt_offsets=offsets_of([1]),
        response_tokens=tokens[1:],
        response_offsets=offsets_of([length - 1]),
        behaviour_logprobs=zeros,
        policy_versions=zeros.astype(np.int32),
        finish_reasons=np.zeros(1, np.uint8),
        support_ids=np.tile(tokens[:1], (length - 1, 1)),
    )


def check_probe(key: str, first: np.ndarray, second: np.ndarray, vocabulary: int, *, repeats: float = 0.0) -> float:
    """Mean log-prob of the probe, after a check that the two answers `first` and `second` are plausible scores.

    A wrongly loaded model still answers: with the same log-prob for all tokens, or with different ones each time.
    repeats: nats by which the two answers may differ. CampaignError: scores that are not finite, uniform, or not
    repeatable.
    """
    uniform = -np.log(vocabulary)
    for fault, found in (
        ("scores are not finite", not np.isfinite(first).all()),
        ("scores are uniform: its weights are not those of the files", np.abs(first - uniform).max() < 1e-4),
        # `not ... <=`, so that NaN fails the test.
        ("scores differ when asked twice", not np.abs(first - second).max() <= repeats),
    ):
        if found:
            raise CampaignError(f"{key} fails its self-test: {fault}")
    return float(first.mean())
