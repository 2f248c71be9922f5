"""The types that pass between the campaign and rollout actors: requests, trajectories, and what is counted of them.

Flat ragged arrays with offsets, never a Python object for each token: Ray sends arrays without pickling their elements. Row i of a ragged field `x` is
`x[x_offsets[i]:x_offsets[i + 1]]`. Shapes: B trajectories, P prompt tokens in all, N response tokens in all,
K support size, V vocabulary size.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

FINISH_REASONS = ("stop", "length", "abort")
"""The values that `Trajectories.finish_reasons` indexes, in vLLM's words."""

EVALUATION_EPOCH = -1
"""The epoch of trajectories that are sampled for an evaluation and are never trained on."""

NO_VERSION = -1
"""The version of a token that no version of the student wrote: of an environment, or of a data set."""


class TrajectoryId(NamedTuple):
    """Names one sample permanently: a retry keeps the id and the seed. Example: TrajectoryId(epoch=0, prompt=17, sample=3)."""

    epoch: int
    prompt: int
    sample: int

    def __str__(self) -> str:
        return f"{self.epoch}/{self.prompt}/{self.sample}"


class Aside(NamedTuple):
    """What a verifier may know of a prompt besides its reference answer."""

    domain: str | None = None
    prompt: str | None = None
    """The text as the student reads it."""
    record: str | None = None
    """All fields of the record, as JSON; None where no verifier asks for it."""
    tools_field: str = "tools"
    """The record's field of tools, for the chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Samples to be drawn. Example: two samples of one prompt of three tokens have B = 2 and P = 6."""

    ids: np.ndarray
    """[B, 3] int64: epoch, prompt, sample."""
    seeds: np.ndarray
    """[B] int64: seed of the sampler, a function of the id and the campaign's seed."""
    prompt_tokens: np.ndarray
    """[P] int32."""
    prompt_offsets: np.ndarray
    """[B + 1] int64."""
    references: tuple[str | None, ...] = ()
    """[B] reference answers for the verifier, where responses get a reward; else empty."""
    asides: tuple[Aside, ...] = ()
    """[B] what else the verifier may know, where responses get a reward; else empty."""
    max_response_tokens: int | None = None
    """A length limit of their own; None: that of the sampling."""
    max_turns: int | None = None
    """A limit of turns of their own; None: that of the environment."""

    @property
    def prompts(self) -> list[np.ndarray]:
        """The tokens of each of the B prompts, int32; views."""
        return np.split(self.prompt_tokens, self.prompt_offsets[1:-1])

    def __reduce__(self) -> tuple[Callable[..., "Requests"], tuple[Any, ...]]:
        # Pickled for each trajectory, where four small arrays would take ten times as long as their bytes.
        return _requests, (
            np.asarray(self.ids, np.int64).tobytes(),
            np.asarray(self.seeds, np.int64).tobytes(),
            np.asarray(self.prompt_tokens, np.int32).tobytes(),
            np.asarray(self.prompt_offsets, np.int64).tobytes(),
            self.references,
            self.asides,
            (self.max_response_tokens, self.max_turns),
        )


def _requests(
    ids: bytes, seeds: bytes, tokens: bytes, offsets: bytes, references: tuple, asides: tuple, limits: tuple
) -> Requests:
    """What `Requests.__reduce__` took apart."""
    return Requests(
        ids=np.frombuffer(ids, np.int64).reshape(-1, 3),
        seeds=np.frombuffer(seeds, np.int64),
        prompt_tokens=np.frombuffer(tokens, np.int32),
        prompt_offsets=np.frombuffer(offsets, np.int64),
        references=references,
        asides=asides,
        max_response_tokens=limits[0],
        max_turns=limits[1],
    )


class Prompts(NamedTuple):
    """B prompts as tokens. Example: prompt 1 is tokens[offsets[1]:offsets[2]]."""

    tokens: np.ndarray
    """[P] int32."""
    offsets: np.ndarray
    """[B + 1] int64."""

    def rows(self) -> list[np.ndarray]:
        """[B] the tokens of each prompt."""
        return np.split(self.tokens, self.offsets[1:-1])


class Limits(NamedTuple):
    """Where a generated response ends."""

    max_response_tokens: int
    stop_token_ids: list[int]
    """The first of them that is generated ends the response, and is part of it."""


class EpisodeCounts(NamedTuple):
    """What the campaign process needs to know about one episode."""

    turns: int
    """Turns of the student."""
    prompt_tokens: int
    """Tokens of the prompt as it was read: an environment may have written it."""
    waited_seconds: float
    """Seconds for which the environment was waited for."""
    seconds: float
    """Seconds from its beginning to its end, of the attempt that counts."""
    retries: int = 0
    """How often it was begun again."""
    failed: str = ""
    """Why it failed in all attempts, in one line; empty: it did not."""
    conversations: int = 1
    """A program may hold several (actors/rollout/transcript.py)."""


class RolloutCounts(NamedTuple):
    """What the campaign process needs to know about a batch of trajectories: it never fetches the arrays."""

    lengths: np.ndarray
    """[B] response tokens."""
    oldest_versions: np.ndarray
    """[B] version of each trajectory's oldest token."""
    truncated: np.ndarray
    """[B] bool: it was cut at the length limit."""
    busy_seconds: float
    """Seconds that this engine has worked since its last report."""
    unjudged: tuple[str, ...] = ()
    """Why responses have no verdict, once for each of them; their reward is 0."""
    seats: int = 0
    """Responses that the engine should write at a time; 0: not said."""
    preempted: int = 0
    """Responses that lost their place in the engine's full cache since its last report, and were computed again."""
    parts: tuple[dict[str, float], ...] = ()
    """[B] named parts of each reward, where the verifier returns any; else ()."""
    context: tuple[int, ...] = ()
    """[B] tokens of each response that the student did not write; () where it has written all."""
    processor_seconds: float = 0.0
    """Processor time of the actor's process since its last report."""
    refused: Mapping[int, str] = {}
    """Number of a request -> why a teacher that writes in the student's place has not answered it, or why its episode has
    failed. The campaign drops it."""
    episodes: tuple[EpisodeCounts, ...] = ()
    """[B] where an environment answers; else ()."""
    waited_seconds: float = 0.0
    """Seconds since its last report for which the engine had nothing to write, while environments were waited for."""
    at_once: int = 0
    """Responses that the campaign should have under way at this actor; 0: as many as it has seats."""

    def __reduce__(self) -> tuple[Callable[..., "RolloutCounts"], tuple[Any, ...]]:
        lengths, oldest, truncated, *others = self  # as in Requests
        return _counts, (
            np.asarray(lengths, np.int64).tobytes(),
            np.asarray(oldest, np.int64).tobytes(),
            np.asarray(truncated, bool).tobytes(),
            *others,
        )


def _counts(lengths: bytes, oldest: bytes, truncated: bytes, *others: Any) -> RolloutCounts:
    """What `RolloutCounts.__reduce__` took apart."""
    return RolloutCounts(
        np.frombuffer(lengths, np.int64), np.frombuffer(oldest, np.int64), np.frombuffer(truncated, bool), *others
    )


class LoadSeconds(NamedTuple):
    """How long a rollout actor took to load a weight version."""

    prepared: float
    """Seconds to verify, decode and stage it, while the engine went on."""
    stood_still: float
    """Seconds for which no token was sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """What the student wrote. Every array is aligned with `ids` or, through the offsets, with the tokens."""

    ids: np.ndarray
    """[B, 3] int64: epoch, prompt, sample."""
    prompt_tokens: np.ndarray
    """[P] int32."""
    prompt_offsets: np.ndarray
    """[B + 1] int64."""
    response_tokens: np.ndarray
    """[N] int32, with the end-of-sequence token where the student wrote one."""
    response_offsets: np.ndarray
    """[B + 1] int64."""
    behaviour_logprobs: np.ndarray
    """[N] float32: log-prob of the token under the distribution it was sampled from."""
    policy_versions: np.ndarray
    """[N] int32: version of the weights that sampled the token."""
    finish_reasons: np.ndarray
    """[B] uint8: index into FINISH_REASONS."""
    support_ids: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    """[N, K] int32: the student's most likely tokens at sampling time, for teachers with the signal `student_topk`; [0, 0]
    if there are none."""
    rewards: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """[B] float32; [0] if the responses have no rewards."""
    unfiltered_logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    """[N] float32, where top-k or top-p filter: log-prob of the token before the filter, over the whole vocabulary; NaN from
    an engine that does not record it. [0] where nothing filters: it is then `behaviour_logprobs`."""
    trained: np.ndarray = None  # type: ignore[assignment]
    """[N] bool: whether the student wrote the token, so that it is trained on. The others are context: what an environment
    has put into the response, a tool's result, another's turn in a chat. Their log-probs and versions mean nothing, and
    are read nowhere. Default: all true."""
    begins: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """[N] bool, where a response holds several conversations: at the first token of each but the first. Nothing before it in the
    trajectory is read by it or after it, and the student did not write it. [0] where every response has one."""

    def __post_init__(self) -> None:
        if self.trained is None:
            # The only way to set a field of a frozen dataclass; the default depends on another field.
            object.__setattr__(self, "trained", np.ones(len(self.response_tokens), bool))
        if self.trained.dtype != bool or len(self.trained) != len(self.response_tokens):
            found = f"{self.trained.dtype} {list(self.trained.shape)}"
            raise ValueError(f"Trajectories.trained is {found}, expected bool [{len(self.response_tokens)}]")
        if self.begins.size and (self.begins.shape != self.trained.shape or (self.begins & self.trained).any()):
            raise ValueError("Trajectories.begins is not [N], or true where the student wrote the token")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def policy_logprobs(self) -> np.ndarray:
        """[N] float32: log pi(y_t | c_t) of the weights that sampled the token, before any filter."""
        return self.unfiltered_logprobs if self.unfiltered_logprobs.size else self.behaviour_logprobs

    @property
    def student_logprobs(self) -> np.ndarray:
        """[N] float32: `policy_logprobs`; where it is not known, the log-prob after the filter. For measuring only."""
        policy = self.policy_logprobs
        return np.where(np.isnan(policy), self.behaviour_logprobs, policy)

    @property
    def all_begins(self) -> np.ndarray:
        """[N] bool: `begins`, all false where every response has one conversation."""
        return self.begins if self.begins.size else np.zeros(len(self.response_tokens), bool)

    @property
    def truncated(self) -> np.ndarray:
        """[B] bool: the response was cut at the length limit."""
        return self.finish_reasons == FINISH_REASONS.index("length")

    @property
    def trained_lengths(self) -> np.ndarray:
        """[B] trained tokens of each response."""
        counts = np.concatenate([[0], np.cumsum(self.trained)])
        return np.diff(counts[self.response_offsets])

    @property
    def turns(self) -> np.ndarray:
        """[N] int64: which of the student's turns, from 0 in each response, a token belongs to; -1 where it is not trained.

        A turn is what the student wrote without anything of others in between.
        """
        begun = self._turns_begun()
        turns = begun[1:] - 1 - np.repeat(begun[self.response_offsets[:-1]], self.lengths)
        return np.where(self.trained, turns, -1)

    @property
    def own_places(self) -> np.ndarray:
        """[N] int64: how many tokens of the same response the student wrote before this one."""
        before = np.cumsum(self.trained) - self.trained
        starts = np.concatenate([[0], np.cumsum(self.trained)])[self.response_offsets[:-1]]
        return before - np.repeat(starts, self.lengths)

    @property
    def turn_counts(self) -> np.ndarray:
        """[B] int64: turns of the student's in each response."""
        return np.diff(self._turns_begun()[self.response_offsets])

    def _turns_begun(self) -> np.ndarray:
        """[N + 1] turns that have begun before each token, in all responses."""
        begins = self.trained & ~np.concatenate([[False], self.trained])[:-1]
        first = self.response_offsets[:-1][self.lengths > 0]
        begins[first] = self.trained[first]
        return np.concatenate([[0], np.cumsum(begins)])

    @property
    def oldest_versions(self) -> np.ndarray:
        """[B] int32: version of the oldest token that the student wrote in each response; the largest int32 where it wrote
        none."""
        none = np.iinfo(np.int32).max
        oldest = np.full(len(self), none, np.int32)
        rows = np.repeat(np.arange(len(self)), self.lengths)
        np.minimum.at(oldest, rows, np.where(self.trained, self.policy_versions, none).astype(np.int32))
        return oldest

    @property
    def lengths(self) -> np.ndarray:
        """[B] tokens of each response, trained or not."""
        return np.diff(self.response_offsets)


PER_TOKEN = (
    "response_tokens", "behaviour_logprobs", "policy_versions", "trained", "support_ids", "unfiltered_logprobs",
)  # fmt: skip
"""Fields of Trajectories with a row for each response token, without `begins`."""


def offsets_of(lengths: Iterable[int]) -> np.ndarray:
    """[B] lengths -> [B + 1] offsets, int64."""
    lengths = lengths if isinstance(lengths, np.ndarray) else np.fromiter(lengths, np.int64)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ragged_rows(values: np.ndarray, offsets: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """The rows with these numbers of a ragged field ([N, ...], with [B + 1] offsets), one after the other."""
    if len(rows) == 1:  # as most requests and answers are
        return values[offsets[rows[0]] : offsets[rows[0] + 1]].copy()  # a view would keep the whole field in memory
    rows = np.asarray(rows, np.int64)
    lengths = offsets[rows + 1] - offsets[rows]  # not of all rows: a prompt set has millions
    # `within` is an element's index in its row: its index in the result minus the start of its row in the result.
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return values[np.repeat(offsets[rows], lengths) + within]


def _rows_of(ids: np.ndarray, batches: Sequence[Trajectories]) -> np.ndarray:
    """Positions of `ids` [M, 3] among the concatenated rows of the batches; KeyError names an id that is not there."""
    place = {tuple(row): i for i, row in enumerate(np.concatenate([batch.ids for batch in batches]).tolist())}
    return np.array([place[tuple(row)] for row in np.asarray(ids).tolist()], np.int64)


def select_trajectories(ids: np.ndarray, batches: Sequence[Trajectories]) -> Trajectories:
    """The trajectories with these ids [M, 3], in this order, from batches that hold them and perhaps others.

    If `ids` are exactly those of a single batch, that batch is returned: its arrays are not copied, and may be read-only.
    KeyError names an id that no batch holds.
    """
    if len(batches) == 1 and np.array_equal(ids, batches[0].ids):
        return batches[0]
    rows, named, judged = _rows_of(ids, batches), batches[0].support_ids.size, batches[0].rewards.size
    prompt_offsets = offsets_of(np.concatenate([np.diff(b.prompt_offsets) for b in batches]))
    response_offsets = offsets_of(np.concatenate([b.lengths for b in batches]))

    filtered = any(b.unfiltered_logprobs.size for b in batches)

    def tokens(name: str, offsets: np.ndarray) -> np.ndarray:
        return ragged_rows(np.concatenate([getattr(b, name) for b in batches]), offsets, rows)

    return Trajectories(
        ids=np.asarray(ids, np.int64),
        prompt_tokens=tokens("prompt_tokens", prompt_offsets),
        prompt_offsets=offsets_of(np.diff(prompt_offsets)[rows]),
        response_tokens=tokens("response_tokens", response_offsets),
        response_offsets=offsets_of(np.diff(response_offsets)[rows]),
        behaviour_logprobs=tokens("behaviour_logprobs", response_offsets),
        unfiltered_logprobs=tokens("policy_logprobs", response_offsets) if filtered else np.zeros(0, np.float32),
        policy_versions=tokens("policy_versions", response_offsets),
        trained=tokens("trained", response_offsets),
        begins=tokens("all_begins", response_offsets) if any(b.begins.size for b in batches) else np.zeros(0, bool),
        finish_reasons=np.concatenate([b.finish_reasons for b in batches])[rows],
        support_ids=tokens("support_ids", response_offsets) if named else np.zeros((0, 0), np.int32),
        rewards=np.concatenate([b.rewards for b in batches])[rows] if judged else np.zeros(0, np.float32),
    )
