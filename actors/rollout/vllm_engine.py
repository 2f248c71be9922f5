"""A vLLM engine and the one thread that drives it.

Everything that touches the engine is a command, run by that thread between two engine steps: requests of one call
enter together, and weights change only between steps, so an engine never computes with a mixture of versions.
With one GPU (or none) the engine lives in this process and reads weights in place.
"""

import itertools
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from actors.config import LoraConfig, RolloutConfig, SamplingConfig
from actors.data.models import expected_tensors
from actors.errors import AbortedError, EngineError, WeightError
from actors.rollout.engine import Response, trajectories_of
from actors.rollout.vllm_lora import adapter_options, adapter_request, check_adapter, load_adapter
from actors.trajectory import Requests
from actors.vllm_startup import build_llm, importing_vllm
from actors.weights.buckets import WeightVersion, shapes

T = TypeVar("T")


class _Command(NamedTuple):
    """What to do between two engine steps."""

    do: Callable[[], Any]
    future: Future
    """Of what that returns."""
    turn: Literal["next", "idle", "any"]
    """In the order of arrival; then, and once no request runs; or, while such a one waits, before it."""


class _Call:
    """The requests of one `generate`, until the last of them has finished."""

    def __init__(self, requests: Requests, support_size: int):
        self.future: Future = Future()
        self._support_size = support_size
        self._requests = requests
        self._completions: list[Any] = [None] * len(requests.ids)
        self._missing = len(requests.ids)

    def id(self, place: int) -> tuple[int, ...]:
        return tuple(self._requests.ids[place].tolist())

    def finish(self, place: int, completion: Any) -> None:
        self._completions[place] = completion
        self._missing -= 1
        if self._missing == 0:
            responses = [_response(completion, self._support_size) for completion in self._completions]
            self.future.set_result(trajectories_of(self._requests, responses))

    def fail(self, error: BaseException | None) -> None:
        if error is not None and not self.future.done():
            self.future.set_exception(error)


class VllmEngine:
    """Samples trajectories with continuous batching; its weights are those of a published version, never a checkpoint's."""

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
    ):
        """Builds the engine with random weights: `load_weights` must come before `generate`.

        adapter: the versions are adapters of this kind, of a model whose weights are those of its files. support_size: how many of the most likely tokens are recorded at each position, for teachers to score. UserError where vLLM refuses an option of `config.engine`.
        """
        self.version: int | None = None
        self.busy_seconds = 0.0
        """Spent in engine steps since the engine was built."""
        self.tokens_sampled = 0
        self._tensor_parallel = config.tensor_parallel_size > 1
        self._wait_for_running, self._recompute_kv = config.on_new_weights == "wait", config.recompute_kv
        self._stop_token_ids = sorted({*stop_token_ids, *sampling.stop_token_ids})
        self._tensors = expected_tensors(model, trust_remote_code, "student.model")
        self._failure: BaseException | None = None
        self._waiting: dict[str, tuple[_Call, int]] = {}
        self._commands: queue.Queue[_Command | None] = queue.Queue()
        self._names = itertools.count()
        self._support_size = support_size
        self._adapter = adapter
        self._request = adapter_request() if adapter else None
        more = adapter_options(adapter) if adapter else {}
        self._llm = _build(model, config, sampling, support_size, seed, trust_remote_code, more)
        self._engine = self._llm.llm_engine
        self.seats: int = self._engine.vllm_config.scheduler_config.max_num_seqs
        """Requests that one step serves; others wait inside."""
        self._thread = threading.Thread(target=self._run, name="vllm-engine", daemon=True)
        self._thread.start()

    def generate(self, requests: Requests, sampling: SamplingConfig, *, greedy: bool = False) -> Future:
        """Samples all B requests; the future's result is their Trajectories, in the order of the requests."""
        call = _Call(requests, self._support_size)

        def enter() -> None:
            if self.version is None:
                raise WeightError("this engine has not been given weights yet")
            for place, prompt in enumerate(requests.prompts):
                params = self._sampling_params(sampling, int(requests.seeds[place]), greedy)
                name = str(next(self._names))
                entry: dict[str, Any] = {"prompt_token_ids": prompt.tolist()}
                if not self._recompute_kv:  # keys and values of old weights stay, but for requests that know them only
                    entry["cache_salt"] = str(self.version)
                self._engine.add_request(name, entry, params, lora_request=self._request)
                self._waiting[name] = (call, place)

        self._submit(enter).add_done_callback(lambda entered: call.fail(entered.exception()))
        return call.future

    def load_weights(self, manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> Future:
        """Replaces all weights between two steps; the future's result is the seconds that the engine stood still.

        Requests that run go on with the new ones, or, with `on_new_weights: wait`, end before, while those that come
        later wait. The bytes are verified, and names and shapes compared with the model's, before anything is touched:
        vLLM cannot take back an update that fails halfway, so such an engine refuses all further work. All that is done
        by whoever calls, while the engine goes on; it stands still for the replacement alone.
        """

        def load() -> float:
            start = time.perf_counter()
            try:
                self._replace_weights(manifest, buckets)
            except Exception as error:
                self._failure = error
                raise WeightError(f"version {manifest.version} could not be loaded: {error}") from error
            self.version = manifest.version
            return time.perf_counter() - start

        try:
            self._check_tensors(manifest)
        except WeightError as error:
            refused: Future = Future()
            refused.set_exception(error)
            return refused
        return self._submit(load, "idle" if self._wait_for_running else "next")

    def _check_tensors(self, manifest: WeightVersion) -> None:
        """WeightError unless the version has the model's tensors: what is missing would stay as vLLM has found it."""
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
        """Gives up all requests, or those for these ids [B, 3]: their calls fail with AbortedError."""
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
        """Ends the thread; what is still being generated is lost."""
        self._commands.put(None)
        self._thread.join(timeout=10)

    def apply_model(self, function: Callable[[Any], T]) -> Future:
        """Runs a function of the engine's torch module between two steps; the future's result is its list of one."""
        return self._submit(lambda: self._llm.apply_model(function))

    def _replace_weights(self, manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> None:
        if self._adapter is not None:
            load_adapter(self._engine, self._adapter, manifest, buckets)
        else:
            self._replace_model(manifest, buckets)
        if self._recompute_kv and not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise WeightError("vLLM kept the prefix cache of the old weights")

    def _replace_model(self, manifest: WeightVersion, buckets: Sequence[np.ndarray]) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if self._tensor_parallel else None) as folder:
            update: dict[str, Any] = {"manifest": manifest}
            if self._tensor_parallel:
                update["paths"] = [str(Path(folder, str(i))) for i in range(len(buckets))]
                for path, bucket in zip(update["paths"], buckets, strict=True):
                    bucket.tofile(path)
            else:
                update["buckets"] = list(buckets)
            self._llm.start_weight_update()
            self._llm.update_weights({"update_info": update})
            self._llm.finish_weight_update(str(manifest.version))

    def _sampling_params(self, sampling: SamplingConfig, seed: int, greedy: bool) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=0.0 if greedy else sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0 if greedy else sampling.top_k,
            max_tokens=sampling.max_response_tokens,
            stop_token_ids=self._stop_token_ids,
            seed=seed,
            logprobs=self._support_size,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _submit(self, do: Callable[[], T], turn: Literal["next", "idle", "any"] = "next") -> Future:
        future: Future = Future()
        self._commands.put(_Command(do, future, turn))
        return future

    def _run(self) -> None:
        arrived: deque[_Command | None] = deque()
        while True:
            while not self._commands.empty() or not (self._waiting or arrived):
                arrived.append(self._commands.get())
            if None in arrived:
                return
            command = self._take(arrived)
            if command is None:
                self._step()
            elif self._failure is not None:
                command.future.set_exception(EngineError(f"the vLLM engine has failed: {self._failure!r}"))
            else:
                try:
                    command.future.set_result(command.do())
                except Exception as error:  # becomes the caller's
                    command.future.set_exception(error)

    def _take(self, arrived: "deque[_Command | None]") -> _Command | None:
        """The command whose turn it is; None where the next is a step of the engine."""
        if not arrived:
            return None
        if self._waiting and arrived[0] is not None and arrived[0].turn == "idle":
            found = next((command for command in arrived if command is not None and command.turn == "any"), None)
            if found is not None:
                arrived.remove(found)
            return found
        return arrived.popleft()

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            for output in self._engine.step():
                if output.finished and output.request_id in self._waiting:
                    self.tokens_sampled += len(output.outputs[0].token_ids)
                    call, place = self._waiting[output.request_id]
                    call.finish(place, output.outputs[0])
                    del self._waiting[output.request_id]
        except Exception as error:  # every waiting and later call learns of it
            self._failure = error
            for call, _ in self._waiting.values():
                call.fail(EngineError(f"the vLLM engine has failed: {error!r}"))
            self._waiting.clear()
        self.busy_seconds += time.perf_counter() - start


def _build(
    model: str,
    config: RolloutConfig,
    sampling: SamplingConfig,
    support_size: int,
    seed: int,
    trust_remote_code: bool,
    more: dict[str, Any],
) -> Any:
    import torch

    with importing_vllm():
        from actors.rollout.vllm_worker import BACKEND

    options: dict[str, Any] = {
        "model": model,
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "load_format": "dummy",
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        "weight_transfer_config": {"backend": BACKEND},
        "worker_extension_cls": "actors.rollout.vllm_worker.WorkerExtension",
        # Log-probs of the distribution that is sampled from; at temperature 1 without filters both modes agree.
        "logprobs_mode": "raw_logprobs"
        if (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
        else "processed_logprobs",
        "max_logprobs": max(support_size, 1),
        **more,
    }
    if not torch.cuda.is_available():
        # A prompt that is read in several steps draws in each; vLLM takes a draw back in a way that only the generators
        # of GPUs know, and fails here. Whole prompts, then: also where keys and values are computed again.
        options["enable_chunked_prefill"] = False
    return build_llm(options, config.engine, "rollout.engine")


def _response(completion: Any, support_size: int) -> Response:
    """vLLM's completion as a response. A version is a span of tokens there; here each token has its own."""
    versions = np.empty(len(completion.token_ids), np.int32)
    for span in completion.weight_versions:
        versions[span.start : span.end] = int(span.version)
    # At each position vLLM lists the sampled token first, then the most likely ones that were asked for.
    logprobs = np.asarray(completion.logprobs.logprobs, np.float32)[:: support_size + 1]
    listed = np.asarray(completion.logprobs.token_ids, np.int32).reshape(-1, support_size + 1)
    return Response(completion.token_ids, logprobs, versions, completion.finish_reason, listed[:, 1:])
