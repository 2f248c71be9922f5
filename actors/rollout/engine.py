"""The interface of an inference engine, as the rollout actor uses it, and the lookup of an engine by its name.

`rollout.backend` chooses the engine: `vllm` (actors/rollout/vllm_engine.py), or `package.module:Class` of your own.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from actors.config import LoraConfig, RolloutConfig, SamplingConfig
from actors.errors import CampaignError, UserError
from actors.import_path import check_call, import_object
from actors.trajectory import FINISH_REASONS, Requests, Trajectories, offsets_of
from actors.weights.buckets import WeightVersion, unpack

__all__ = [
    "Engine",
    "PromptLengths",
    "Response",
    "check_answer",
    "engine_class",
    "filters",
    "make_engine",
    "told_apart",
    "trajectories_of",
    "unpack",
]

BUILT_IN = {"vllm": "actors.rollout.vllm_engine:VllmEngine"}
"""Import paths by `rollout.backend`."""
METHODS = ("generate", "load_weights", "abort", "close")
ATTRIBUTES = ("version", "seats", "busy_seconds", "tokens_sampled")


class Engine(Protocol):
    """Samples trajectories with the weights that were loaded last.

    Threads: the rollout actor calls the methods from its event loop's thread and from helper threads, so calls may
    overlap. `generate`, `load_weights` and `abort` must return at once, with a `concurrent.futures.Future`; an engine
    does its work in a thread of its own (a `ThreadPoolExecutor` with one worker is enough). Attributes are read from
    other threads while the engine works.

    Progress: an engine calls `actors.heartbeat.beat()` at least every few seconds of its work, for example at every
    decoding step. An actor that works for `ray.hang_timeout_seconds` without a beat is taken for hung and replaced.

    Errors: an exception in a future fails that call. EngineError means that the engine cannot go on: the campaign
    tells its message, ends the actor's process, and replaces it by a new actor with a new engine.
    """

    version: int | None
    """Version of the loaded weights; None before the first `load_weights`."""
    seats: int
    """Responses that the engine writes at the same time. The campaign keeps about this many under way at each actor. It may
    change: every answer reports it."""
    busy_seconds: float
    """Seconds of work since the engine was built. Only grows; the report's busy time is its increase."""
    tokens_sampled: int
    """Response tokens since the engine was built. Only grows."""

    def __init__(
        self,
        model: str,
        config: RolloutConfig,
        sampling: SamplingConfig,
        *,
        stop_token_ids: Sequence[int],
        support_size: int,
        seed: int,
        trust_remote_code: bool,
        adapter: LoraConfig | None,
    ):
        """Builds the engine. Its weights do not matter: `load_weights` comes before the first `generate`.

        model: a Hugging Face model directory or hub name, for the architecture and the tokenizer.
        config: the section `rollout`. `config.engine` holds the engine's own options, `config.dtype` the dtype of the
            weights that will be loaded, `config.on_new_weights` and `config.recompute_kv` what a load does to
            responses that are being written.
        sampling: the section `sampling`.
        stop_token_ids: tokens that end a response, in addition to `sampling.stop_token_ids`.
        support_size: K, how many of the most likely tokens `generate` records at each position; 0 for most teachers.
        seed: the campaign's seed. Each request has a seed of its own.
        adapter: if set, versions hold only the matrices of this LoRA adapter, and the model's weights come from its files.
        UserError: an option that the engine does not know or does not support.
        """

    def generate(self, requests: Requests, sampling: SamplingConfig, *, greedy: bool = False) -> Future:
        """Samples one response for each of the B requests. Result: Trajectories, in the order of the requests.

        A response ends with a stop token, which is part of it (finish reason "stop"), or after
        `sampling.max_response_tokens` tokens ("length"). greedy: take the most likely token, for evaluations. sampling:
        that of the constructor, or, for an evaluation set, one with another temperature, filter or length limit: its
        log-probs are then not read.

        Each token is recorded with the version of the weights that computed it, and with its log-prob under the
        distribution that it was drawn from, i.e. after temperature, top-k and top-p; and, where top-k or top-p filter,
        also before them. The learner divides by these probabilities, so they have to be exact up to rounding. A greedy
        token's log-prob is that at the sampling temperature, before any filter. A request's sample depends on its seed,
        not on the other requests of the call. No id beyond the tokenizer's is sampled, whatever rows the model has.
        `trajectories_of` collates responses.

        Errors of the future: AbortedError after `abort`; WeightError before the first `load_weights`; EngineError.
        """

    def load_weights(self, manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> Future:
        """Replaces all weights by those of a version. Result: the seconds for which no token was sampled; or None.

        Called in a helper thread: what can be prepared while the engine goes on may be done before it returns.

        The checksums have been verified. `unpack(manifest, buckets)` yields (name, tensor) with
        the names of a Hugging Face checkpoint, in `config.dtype`. The tensors are views of shared memory that other
        actors read, too: copy them, never write to them, and keep none after the future is done.

        After it, `version` is `manifest.version`, and no cached keys and values of the old weights are used for new
        requests. A token is never computed with a mixture of two versions.

        Errors of the future: WeightError where names or shapes are not the model's; the engine then keeps what it has.
        """

    def abort(self, ids: np.ndarray | None = None) -> Future:
        """Aborts the requests with these ids [B, 3], or all. Their calls end with AbortedError. Result: None.

        The campaign aborts responses that would be too stale to train on, and all requests before it starts again. An
        engine that cannot abort may return a completed future: the responses are then discarded later.
        """

    def close(self) -> None:
        """Ends the engine's threads and frees its memory. Running requests are lost."""


class PromptLengths(NamedTuple):
    """Tokens of a campaign's prompts; 0: not known."""

    usual: int = 0
    """On average."""
    longest: int = 0
    """Of those of training that the student answers."""
    whole: int = 0
    """Of the longest text of an evaluation, prompt and response: its responses have a length limit of their own."""


class Response(NamedTuple):
    """One response of n tokens, as an engine has sampled it."""

    tokens: ArrayLike
    """[n], the stop token included."""
    logprobs: ArrayLike
    """[n] log-prob of each token under the distribution that it was drawn from, after top-k and top-p."""
    versions: ArrayLike
    """[n] version of the weights that sampled each token."""
    finish_reason: str
    """`stop` (a stop token ended it), `length` (the limit did) or `abort`."""
    support_ids: np.ndarray | None = None
    """[n, K] the most likely tokens at each position, most likely first; None where K is 0."""
    unfiltered_logprobs: ArrayLike | None = None
    """[n] log-prob of each token before top-k and top-p, at the same temperature, over the whole vocabulary; None where
    nothing was filtered, or where the engine does not know it."""
    trained: ArrayLike | None = None
    """[n] bool: the student wrote the token. False for context that somebody else has put into the response: the other
    fields may hold anything there. None: it wrote all of them."""


def trajectories_of(requests: Requests, responses: Sequence[Response]) -> Trajectories:
    """Collates the responses to B requests, in the order of the requests: one flat array for each field, [N]."""
    tokens = [np.asarray(one.tokens, np.int32) for one in responses]
    supports = [one.support_ids for one in responses if one.support_ids is not None]
    unfiltered = [one.unfiltered_logprobs for one in responses if one.unfiltered_logprobs is not None]
    offsets = offsets_of(map(len, tokens))
    own = [
        np.ones(len(t), bool) if one.trained is None else np.asarray(one.trained, bool)
        for t, one in zip(tokens, responses, strict=True)
    ]
    return Trajectories(
        ids=requests.ids,
        prompt_tokens=requests.prompt_tokens,
        prompt_offsets=requests.prompt_offsets,
        response_tokens=np.concatenate(tokens),
        response_offsets=offsets,
        behaviour_logprobs=np.concatenate([np.asarray(one.logprobs, np.float32) for one in responses]),
        policy_versions=np.concatenate([np.asarray(one.versions, np.int32) for one in responses]),
        unfiltered_logprobs=np.concatenate(
            [np.asarray(one, np.float32) for one in unfiltered] or [np.zeros(0, np.float32)]
        ),
        finish_reasons=np.array([FINISH_REASONS.index(one.finish_reason) for one in responses], np.uint8),
        support_ids=np.concatenate(supports) if supports else np.zeros((offsets[-1], 0), np.int32),
        trained=np.concatenate(own),
    )


def check_answer(requests: Requests, trajectories: Trajectories) -> None:
    """CampaignError unless an engine has answered every request, in their order, each with at least one token of the
    student's, and these with log-probs that are numbers."""
    if not np.array_equal(trajectories.ids, requests.ids):
        raise CampaignError(
            f"rollout.backend: the engine answered {len(trajectories)} of {len(requests.ids)} requests, or in another "
            "order; expected one trajectory for each request, in the order of the requests (docs/extending.md)"
        )
    if not np.isfinite(trajectories.behaviour_logprobs[trajectories.trained]).all():
        raise CampaignError("rollout.backend: the engine recorded a log-prob that is not finite (docs/extending.md)")
    if not trajectories.trained_lengths.all():
        raise CampaignError(
            "rollout.backend: the engine returned a response without a token that the student wrote; expected at least "
            "one in each response (docs/extending.md)"
        )


def filters(sampling: SamplingConfig) -> bool:
    """Whether the sampler leaves out some of the tokens that the policy gives a probability to."""
    return sampling.top_p < 1 or sampling.top_k > 0


def told_apart(trajectories: Trajectories, sampling: SamplingConfig, greedy: bool) -> Trajectories:
    """The same, with NaN as the log-probs before the filter where there was one and the engine has not recorded them."""
    if greedy or not filters(sampling) or trajectories.unfiltered_logprobs.size:
        return trajectories
    return replace(trajectories, unfiltered_logprobs=np.full(len(trajectories.response_tokens), np.nan, np.float32))


def engine_class(backend: str) -> type[Engine]:
    """The class that `rollout.backend` names.

    UserError: it cannot be imported, or a method of `Engine` is missing or takes other arguments.
    """
    found: Any = import_object(BUILT_IN.get(backend, backend), "rollout.backend", "a class")
    missing = [name for name in METHODS if not callable(getattr(found, name, None))]
    if not isinstance(found, type) or missing:
        expected = f"a class with the methods {', '.join(METHODS)} (docs/extending.md)"
        raise UserError("rollout.backend", f"{backend} without {', '.join(missing) or 'being a class'}", expected)
    options = ("stop_token_ids", "support_size", "seed", "trust_remote_code", "adapter")
    own: Any = found
    for function, keywords, name, call in (
        (own, options, "", f"Class(model, config, sampling, {', '.join(options)})"),
        (own.generate, ("greedy",), ".generate", "generate(requests, sampling, greedy=False)"),
        (own.load_weights, (), ".load_weights", "load_weights(manifest, buckets)"),
    ):
        check_call(function, 3, keywords, "rollout.backend", backend + name, call)
    return own


def make_engine(
    model: str,
    config: RolloutConfig,
    sampling: SamplingConfig,
    *,
    vocabulary: int | None = None,
    prompts: PromptLengths | None = None,
    **options: Any,
) -> Engine:
    """Builds the engine that `config.backend` names. The options are those of `Engine.__init__`.

    vocabulary: ids from here on are never sampled; None: all rows of the model may be. An engine of the user's own is
    not told, since its class does not take it: the learner leaves such tokens out.

    UserError: see `engine_class`; or what was built lacks an attribute of `Engine`.
    """
    if config.backend in BUILT_IN:
        options |= {"vocabulary": vocabulary, "prompts": prompts or PromptLengths()}
    engine = engine_class(config.backend)(model, config, sampling, **options)
    missing = [name for name in ATTRIBUTES if not hasattr(engine, name)]
    if missing:
        expected = f"an engine with the attributes {', '.join(ATTRIBUTES)} (docs/extending.md)"
        raise UserError("rollout.backend", f"{config.backend} without {', '.join(missing)}", expected)
    return engine
