"""The vLLM engine: an `Engine` that drives vLLM from one thread.

vLLM's engine is not thread-safe. So every call into it is a command, which that thread runs between two engine steps.
All requests of one `generate` therefore enter in the same step, and weights change only between steps: no step computes
with a mixture of versions. With one GPU (or none) vLLM runs in this process and reads the weights in place.

Why not AsyncLLM: it always starts a second process, which costs 5 to 13 s and a copy of the weights in each update.
"""

import hashlib
import itertools
import os
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from actors.accelerator import torch_device
from actors.config import LoraConfig, RolloutConfig, SamplingConfig
from actors.data.contexts import engine_context
from actors.data.models import expected_tensors, find_model, load_config
from actors.errors import AbortedError, EngineError, WeightError
from actors.last_words import last_error, own_log
from actors.rollout.engine import PromptLengths, Response, filters, trajectories_of
from actors.rollout.seats import Seats
from actors.rollout.vllm_lora import adapter_options, adapter_request, check_adapter, load_adapter
from actors.trajectory import Requests
from actors.vllm_logits import EXTENSION, MARK
from actors.vllm_startup import build_llm, importing_vllm
from actors.weights.buckets import WeightVersion, shapes
from actors.weights.node_staging import NodeStaging
from actors.weights.staging import Staging, staging_for

T = TypeVar("T")

NOT_KNOWN = PromptLengths()


class _Command(NamedTuple):
    """A function to run between two steps of the engine."""

    do: Callable[[], Any]
    future: Future
    """Gets the result or the error of `do`."""
    turn: Literal["next", "idle", "any"]
    """next: first in, first out. idle: the same, but it waits until no request is running. any: as `next`, but it may
    overtake a waiting `idle` command: an abort must not wait for the requests that it aborts."""


class _Call:
    """The requests of one `generate`, until the last of them has finished. Used in the engine's thread only."""

    def __init__(self, requests: Requests, support_size: int, filtered: bool):
        self.future = _uncancellable()
        self._support_size, self._filtered = support_size, filtered
        self._requests = requests
        self._completions: list[Any] = [None] * len(requests.ids)
        self._missing = len(requests.ids)

    def id(self, place: int) -> tuple[int, ...]:
        return tuple(self._requests.ids[place].tolist())

    def prompt_tokens(self, place: int) -> int:
        return int(np.diff(self._requests.prompt_offsets[place : place + 2])[0])

    def finish(self, place: int, completion: Any) -> None:
        self._completions[place] = completion
        self._missing -= 1
        if self._missing == 0:
            responses = [_response(one, self._support_size, self._filtered) for one in self._completions]
            self.future.set_result(trajectories_of(self._requests, responses))

    def fail(self, error: BaseException | None) -> None:
        # Several requests of the call may fail, one after the other: the first error counts.
        if error is not None and not self.future.done():
            self.future.set_exception(error)


class VllmEngine:
    """Samples trajectories with vLLM's continuous batching. Its weights come from published versions only."""

    _filters = _tensor_parallel = False
    _staging: Staging | NodeStaging | None = None
    """Where versions lie while they are loaded; None: where they have come."""

    def __init__(
        self,
        model: str,
        config: RolloutConfig,
        sampling: SamplingConfig,
        *,
        stop_token_ids: Sequence[int] = (),
        support_size: int = 0,
        seed: int = 0,
        trust_remote_code: bool = False,
        adapter: LoraConfig | None = None,
        vocabulary: int | None = None,
        prompts: PromptLengths = NOT_KNOWN,
    ):
        """See Engine.__init__ and `make_engine`. The weights are random, or those of the model's files where an adapter is published.

        UserError: vLLM does not know an option of `config.engine`.
        """
        self.version: int | None = None
        self.busy_seconds = 0.0
        """Seconds spent in vLLM's steps."""
        self.tokens_sampled = 0
        self._tensor_parallel = config.tensor_parallel_size > 1
        self._temperature = sampling.temperature
        self._wait_for_running, self._recompute_kv = config.on_new_weights == "wait", config.recompute_kv
        self._stop_token_ids = sorted({*stop_token_ids, *sampling.stop_token_ids})
        # Before vLLM starts, which takes seconds: a fault in the model's files is then found at once.
        self._tensors = expected_tensors(model, trust_remote_code, "student.model")
        self._failure: BaseException | None = None
        self._cause = ""
        """Of the failure, in one line."""
        self._waiting: dict[str, tuple[_Call, int]] = {}
        self._commands: queue.Queue[_Command | None] = queue.Queue()
        # vLLM's request ids. Not the trajectory ids: a retry has the same one while the first request may still run.
        self._names = itertools.count()
        self._support_size = support_size
        self._adapter = adapter
        self._request = adapter_request() if adapter else None
        more = adapter_options(adapter) if adapter else {}
        if prompts.longest or prompts.whole:
            # By default vLLM wants room in its cache for one sequence of the model's whole context.
            length = max(prompts.longest + sampling.max_response_tokens, prompts.whole)
            network = load_config(model, trust_remote_code, "student.model")
            more["max_model_len"] = min(length, engine_context(network, {}, "rollout.engine"))
        self._filters = filters(sampling)
        # vLLM gets files that are here: it would download the weights of a hub name, which versions replace.
        model = str(find_model(model, "student.model", weights=adapter is not None, code=trust_remote_code))
        self._llm = _build(model, config, sampling, support_size, seed, trust_remote_code, more)
        self._llm.collective_rpc("shape_logits", args=(sampling.temperature, vocabulary))
        if self._filters:
            self._llm.collective_rpc("record_unfiltered")
        self._staging = None if adapter else staging_for(torch_device(), node_name(model, config))
        self._engine = self._llm.llm_engine
        expected = prompts.usual + sampling.max_response_tokens
        self._seats = Seats(*cache_of(self._engine.vllm_config), expected)
        self.preempted = 0
        """Times that a response lost its blocks of the full cache to another, and was computed again."""
        count_preemptions(self._engine.engine_core.engine_core.scheduler, self._preempts)
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._thread.start()

    @property
    def seats(self) -> int:
        """Responses that the cache holds at their usual length, at most `max_num_seqs`. vLLM queues what it has no room for."""
        return self._seats.number

    def _preempts(self) -> None:
        self.preempted += 1

    def generate(self, requests: Requests, sampling: SamplingConfig, *, greedy: bool = False) -> Future:
        """Samples B requests; the future's result is their Trajectories, in the order of the requests.

        Log-probs are vLLM's, computed in float32 from the logits of the weights' dtype, after temperature, top-k and
        top-p, and before the last two. Each request has a random generator of its own, seeded with `requests.seeds`, so
        its sample does not depend on the requests beside it. A response may span several versions of the weights; each
        token has its own. Any thread may call this. Errors of the future: see Engine.generate; and vLLM's own for a
        prompt that does not fit into the model's context.
        """
        call = _Call(requests, self._support_size, self._filters)

        def enter() -> None:
            if self.version is None:
                raise WeightError("this engine has not been given weights yet")
            for place, prompt in enumerate(requests.prompts):
                params = self._sampling_params(sampling, int(requests.seeds[place]), greedy)
                name = str(next(self._names))
                # vLLM's `TokensInput`. It would render a prompt without a type first, which it calls deprecated.
                entry: dict[str, Any] = {"type": "token", "prompt_token_ids": prompt.tolist()}
                if not self._recompute_kv:
                    # The prefix cache keeps the keys and values of old weights; the salt hides them from new requests.
                    entry["cache_salt"] = str(self.version)
                self._engine.add_request(name, entry, params, lora_request=self._request)
                self._waiting[name] = (call, place)

        # The command's future is not the call's: the command ends when the requests have entered.
        self._submit(enter).add_done_callback(lambda entered: call.fail(entered.exception()))
        return call.future

    def load_weights(self, manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> Future:
        """Replaces all weights between two steps; the future's result is the seconds without a step.

        Running requests continue with the new weights. With `on_new_weights: wait` they end first, and later requests
        wait. In the caller's thread, while the engine goes on, names and shapes are compared with the model's (vLLM cannot
        undo an update that fails halfway; after such a failure the engine refuses all further work), and the buckets are
        copied to where vLLM's workers read them fastest (actors/weights/staging.py).
        """

        def load() -> float:
            start = time.perf_counter()
            try:
                self._replace_weights(manifest, staged)
            except Exception as error:
                self._fail(error)  # not one token more from weights that are half replaced
                raise WeightError(f"version {manifest.version} could not be loaded: {error}") from error
            self.version = manifest.version
            return time.perf_counter() - start

        try:
            self._check_tensors(manifest)
        except WeightError as error:
            refused: Future = Future()
            refused.set_exception(error)
            return refused
        staged = self._staging.stage(manifest, buckets) if self._staging else buckets
        loaded = self._submit(load, "idle" if self._wait_for_running else "next")
        if self._staging:
            loaded.add_done_callback(self._staging.release)
        return loaded

    def _check_tensors(self, manifest: WeightVersion) -> None:
        """WeightError unless the version has exactly the model's tensors: vLLM accepts an incomplete version silently."""
        if self._adapter is not None:
            check_adapter(manifest, self._tensors, self._adapter.rank)
            return
        expected = self._tensors
        found = shapes(manifest)
        if found != expected:
            wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            name = wrong[0]
            raise WeightError(
                f"version {manifest.version} does not fit the model in {len(wrong)} tensors, first {name}: "
                f"found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
            )

    def abort(self, ids: np.ndarray | None = None) -> Future:
        """Aborts the requests with these ids [B, 3], or all. Their calls end with AbortedError.

        A call ends when one of its requests is aborted. Its other requests run on, and their responses are dropped.
        """
        wanted = None if ids is None else {tuple(row) for row in ids.tolist()}

        def abort() -> None:
            given_up = [
                name for name, (call, place) in self._waiting.items() if wanted is None or call.id(place) in wanted
            ]
            self._engine.abort_request(given_up)
            for name in given_up:
                call, _ = self._waiting.pop(name)
                call.fail(AbortedError("aborted"))

        return self._submit(abort, "any")

    def close(self) -> None:
        """Ends the thread. Running requests are lost."""
        self._commands.put(None)
        self._thread.join(timeout=10)
        if isinstance(self._staging, NodeStaging):
            self._staging.close()

    def apply_model(self, function: Callable[[Any], T]) -> Future:
        """Runs a function of vLLM's torch module between two steps. Result: a list of its value in each worker."""
        return self._submit(lambda: self._llm.apply_model(function))

    def _drain(self) -> None:
        """Steps until the last scheduled token has been sampled and labelled, and schedules no further one.

        vLLM that schedules asynchronously (on GPUs by default) has the next step under way when `step` returns. Its
        tokens are from the weights before a load, but vLLM gives a token the version at the time it collects it.
        """
        core = self._engine.engine_core.engine_core
        core.pause_scheduler("keep", clear_cache=False)
        # While paused, vLLM puts empty batches into its queue.
        while self._failure is None and any(batch.total_num_scheduled_tokens for _, batch, _ in core.batch_queue or ()):
            self._step()
        core.resume_scheduler()
        if self._failure is not None:
            raise self._failure

    def _replace_weights(self, manifest: WeightVersion, staged: Sequence[Any]) -> None:
        self._drain()
        if self._adapter is not None:
            load_adapter(self._engine, self._adapter, manifest, staged)
        else:
            self._replace_model(manifest, staged)
        # Without reset_running_requests vLLM resets nothing while a request runs. Running requests lose their blocks, too,
        # and are prefilled again with the new weights.
        if self._recompute_kv and not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise WeightError("vLLM kept the prefix cache of the old weights")

    def _replace_model(self, manifest: WeightVersion, staged: Sequence[Any]) -> None:
        update: dict[str, Any] = {"manifest": manifest}
        # vLLM's tensor-parallel workers are other processes, which map the buckets: vLLM does not serialise arrays in an
        # update unless VLLM_ALLOW_INSECURE_SERIALIZATION is set.
        update["places" if self._tensor_parallel else "buckets"] = list(staged)
        self._llm.start_weight_update()
        self._llm.update_weights({"update_info": update})
        self._llm.finish_weight_update(str(manifest.version))

    def _sampling_params(self, sampling: SamplingConfig, seed: int, greedy: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            # The model's own logits are tempered (`shape_logits`), so this is what an evaluation changes of it.
            temperature=0.0 if greedy else sampling.temperature / self._temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0 if greedy else sampling.top_k,
            max_tokens=sampling.max_response_tokens,
            stop_token_ids=self._stop_token_ids,
            seed=seed,  # of the request, so that its sample does not depend on the batch
            # 0: of the sampled token only. One more, whose place `record_unfiltered` takes, where there is a filter.
            logprobs=self._support_size + self._filters,
            flat_logprobs=True,  # lists of numbers; by default vLLM makes a dictionary of objects for each token
            detokenize=False,  # the engine has no tokenizer
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # they are this request's own
        )

    def _submit(self, do: Callable[[], T], turn: Literal["next", "idle", "any"] = "next") -> Future:
        future = _uncancellable()
        self._commands.put(_Command(do, future, turn))
        return future

    def _run(self) -> None:
        arrived: deque[_Command | None] = deque()
        while True:
            # Takes all commands that have come; blocks only when there is nothing to step for and nothing to do.
            while not self._commands.empty() or not (self._waiting or arrived):
                arrived.append(self._commands.get())
            if None in arrived:  # from `close`, which does not wait for the commands before it
                return
            command = self._take(arrived)
            if command is None:
                self._step()
            elif self._failure is not None:
                command.future.set_exception(EngineError(self._cause))
            else:
                try:
                    command.future.set_result(command.do())
                except Exception as error:  # becomes the caller's
                    command.future.set_exception(error)

    def _take(self, arrived: "deque[_Command | None]") -> _Command | None:
        """Removes and returns the command to run now. None: the engine steps first."""
        if not arrived:
            return None
        if self._waiting and arrived[0] is not None and arrived[0].turn == "idle":
            # `next` commands stay behind it: new requests would keep the engine busy, and the weights would never load.
            found = next((command for command in arrived if command is not None and command.turn == "any"), None)
            if found is not None:
                arrived.remove(found)
            return found
        return arrived.popleft()

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            for output in self._engine.step():
                # The second check skips the end of a request that `abort` has taken out of `_waiting`.
                if output.finished and output.request_id in self._waiting:
                    self.tokens_sampled += len(output.outputs[0].token_ids)
                    call, place = self._waiting[output.request_id]
                    self._seats.ended(call.prompt_tokens(place) + len(output.outputs[0].token_ids))
                    call.finish(place, output.outputs[0])
                    del self._waiting[output.request_id]
        except Exception as error:
            self._fail(error)
        self.busy_seconds += time.perf_counter() - start

    def _fail(self, error: Exception) -> None:
        """Fails every waiting call; later ones are refused. The state of vLLM, or its weights, are unknown."""
        traceback.print_exception(error)  # into the log of this process: the message has one line
        self._failure = error
        self._cause = f"the vLLM engine has failed: {type(error).__name__}: {' '.join(str(error).split())}"
        # Of a worker in another process vLLM says little more than that it is gone.
        if self._tensor_parallel and (last := last_error(own_log())) and last not in self._cause:
            self._cause += f"; the last error in its log: {last}"
        for call, _ in self._waiting.values():
            call.fail(EngineError(self._cause))
        self._waiting.clear()


def node_name(model: str, config: RolloutConfig) -> str:
    """A name that a campaign's engines on a node have in common, and no others; "" for workers in the engine's process."""
    if config.tensor_parallel_size == 1:
        return ""
    told = "\n".join([os.environ.get("RAY_JOB_ID", ""), model, config.dtype])  # Ray tells its workers the job's id
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()


def cache_of(vllm_config: Any) -> tuple[int, int, int]:
    """(`max_num_seqs`, tokens that the cache holds, tokens of a block) of an engine that was built."""
    cache = vllm_config.cache_config
    # The first is vLLM's own sum, which counts layers with a sliding window as what they are.
    tokens = cache.kv_cache_size_tokens or cache.num_gpu_blocks * cache.block_size
    return vllm_config.scheduler_config.max_num_seqs, tokens, cache.block_size


def count_preemptions(scheduler: Any, on_preemption: Callable[[], None]) -> None:
    """Calls `on_preemption` for each response that vLLM takes its blocks of the cache away from, for want of room.

    vLLM has no log line of it, and counts only with its statistics on, together with the responses that `load_weights` makes
    it compute again; these come with `drop_stale_output`. The method is private to vLLM: a test on a real engine would tell.
    """
    preempt = scheduler._preempt_request

    def counted(request: Any, timestamp: float, drop_stale_output: bool = False) -> None:
        if not drop_stale_output:
            on_preemption()
        preempt(request, timestamp, drop_stale_output=drop_stale_output)

    scheduler._preempt_request = counted


def _uncancellable() -> Future:
    """A future whose caller may give up without effect on it.

    A coroutine that is cancelled while it waits cancels the future, too, unless it counts as running. The engine would
    then fail when it sets the result, and with it every other call.
    """
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future


def _build(
    model: str,
    config: RolloutConfig,
    sampling: SamplingConfig,
    support_size: int,
    seed: int,
    trust_remote_code: bool,
    more: dict[str, Any],
) -> Any:
    device = torch_device()
    with importing_vllm():
        from actors.rollout.vllm_worker import BACKEND

    options: dict[str, Any] = {
        "model": model,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "load_format": "dummy",  # random weights: a version replaces them before the first request
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        "weight_transfer_config": {"backend": BACKEND},
        "worker_extension_cls": EXTENSION,
        # Log-probs of the distribution that is sampled from. Without filters both modes agree.
        "logprobs_mode": "processed_logprobs" if filters(sampling) else "raw_logprobs",
        "max_logprobs": support_size + 1,  # vLLM refuses requests for more; its default is 20
        **more,
    }
    if device == "cpu":
        # With chunked prefill vLLM samples after each chunk and then rewinds the request's random generator. Only
        # generators on GPUs can be rewound, so on a CPU each prompt is prefilled in one step, also after new weights.
        options["enable_chunked_prefill"] = False
    return build_llm(options, config.engine, "rollout.engine", config.gpus_per_replica)


def _response(completion: Any, support_size: int, filtered: bool) -> Response:
    """Converts vLLM's completion. vLLM records one version for a span of tokens; a Response has one for each token."""
    versions = np.empty(len(completion.token_ids), np.int32)
    for span in completion.weight_versions:
        versions[span.start : span.end] = int(span.version)
    # At each position vLLM lists the sampled token first, then the `support_size` most likely tokens, and at last, with a
    # filter, the sampled token's log-prob before it.
    columns = support_size + 1 + filtered
    logprobs = np.asarray(completion.logprobs.logprobs, np.float32).reshape(-1, columns)
    listed = np.asarray(completion.logprobs.token_ids, np.int32).reshape(-1, columns)
    if filtered and (listed[:, -1] != MARK).any():
        raise EngineError("vLLM's sampler was not the one that records log-probs before top-k and top-p")
    return Response(
        completion.token_ids,
        logprobs[:, 0],
        versions,
        completion.finish_reason,
        listed[:, 1 : support_size + 1],
        logprobs[:, -1] if filtered else None,
    )
