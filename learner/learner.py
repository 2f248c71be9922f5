"""The learner: the one role that changes weights. A plain class, values in, values out.

An update takes B trajectories with their teacher scores through one optimiser step. Shapes: N response tokens of the
update, n of a micro-batch, V vocabulary, K support; [B, T] is padded by trajectory.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from actors.batching import Microbatch
from actors.config import StudentConfig
from actors.errors import NonFiniteLossError
from actors.logprobs import chunked_head, entropy, token_logprobs
from actors.models import load_model, load_tokenizer, response_head
from actors.trajectory import TeacherScores, Trajectories, TrajectoryId
from actors.weights import WeightVersion, pack
from learner.batch import MetricSums, UpdateBatch
from learner.checkpoint import read_json, write_json
from learner.config import LearnerConfig
from learner.estimators import ESTIMATORS
from learner.objective import surrogate
from learner.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from learner.trust_region import k3


class Learner:
    """Master weights in float32, AdamW, and the number of updates taken, which is the policy version."""

    def __init__(
        self,
        student: StudentConfig,
        config: LearnerConfig,
        *,
        total_updates: int,
        temperature: float,
        publish_dtype: str,
        bucket_bytes: int,
        checkpoint: str | None = None,
    ):
        """Loads the student, or, where `checkpoint` names a directory, the state that was saved there."""
        self._student, self._config = student, config
        self._total_updates, self._temperature = total_updates, temperature
        self._publish_dtype, self._bucket_bytes = publish_dtype, bucket_bytes
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_model(
            checkpoint or student.model,
            "float32",
            self._device,
            trust_remote_code=student.trust_remote_code,
            key="student.model",
        )
        self._body, self._weight, self._bias = response_head(self._model, "student.model")
        self._model.requires_grad_(True)
        if config.gradient_checkpointing:
            self._model.gradient_checkpointing_enable()
            self._model.train()
        self._optimizer = build_optimizer(self._model, config.optimizer)
        self._busy_seconds = 0.0
        self.policy_version = 0
        if checkpoint:
            training = Path(checkpoint, "training")
            self.policy_version = read_json(training / "learner.json")["policy_version"]
            load_optimizer_tensors(self._model, self._optimizer, load_file(training / "optimizer.safetensors"))

    def update(self, ids: np.ndarray, *batches: Trajectories | TeacherScores) -> dict[str, float]:
        """One optimiser step on the trajectories with these ids [B, 3]; returns its metrics.

        The batches hold the trajectories and their scores, in any order and perhaps with others. The step is a
        function of `ids` and of what was written and scored. NonFiniteLossError: nothing was changed.
        """
        start = time.perf_counter()
        batch = UpdateBatch.build(ids, batches, self._config.objective, self.policy_version, self._device)
        self._optimizer.zero_grad(set_to_none=True)
        sums = MetricSums()
        for microbatch in batch.microbatches(self._config.microbatch_tokens):
            with torch.autocast(self._device, torch.bfloat16, enabled=self._config.compute_dtype == "bfloat16"):
                loss = self._loss(batch, microbatch, sums)
            if not torch.isfinite(loss):
                self._refuse(f"the loss is {loss.item()}", batch.trajectories.ids[microbatch.rows])
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimizer.max_grad_norm)
        if not torch.isfinite(norm):
            self._refuse(f"the gradient's norm is {norm.item()}", batch.trajectories.ids)
        rate = learning_rate(self.policy_version + 1, self._total_updates, self._config.optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self.policy_version += 1
        seconds = time.perf_counter() - start
        self._busy_seconds += seconds
        return sums.means() | {"grad_norm": norm.item(), "learning_rate": rate, "busy_seconds": seconds}

    def publish(self) -> Iterator[np.ndarray | WeightVersion]:
        """The weights as buckets in the rollout dtype, each when it is filled, then the manifest."""
        names = [(name, parameter) for name, parameter in self._model.named_parameters(remove_duplicate=True)]
        yield from pack(self.policy_version, names, self._publish_dtype, self._bucket_bytes)

    def save(self, directory: str) -> None:
        """Writes the model directory, the optimiser's state and the policy version (learner/checkpoint.py)."""
        self._model.save_pretrained(directory)
        load_tokenizer(self._student.model, self._student.trust_remote_code, "student.model").save_pretrained(directory)
        training = Path(directory, "training")
        training.mkdir()
        save_file(optimizer_tensors(self._model, self._optimizer), training / "optimizer.safetensors")
        write_json(training / "learner.json", {"policy_version": self.policy_version})

    def status(self) -> dict[str, float]:
        """Policy version and busy seconds."""
        return {"policy_version": self.policy_version, "busy_seconds": self._busy_seconds}

    def _loss(self, batch: UpdateBatch, microbatch: Microbatch, sums: MetricSums) -> torch.Tensor:
        """The micro-batch's share of the update's loss."""
        objective = self._config.objective
        part = batch.part(microbatch)
        input_ids = torch.from_numpy(microbatch.input_ids).to(self._device)
        hidden = self._body(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)

        def reduce(logprobs_nV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
            sampled = token_logprobs(logprobs_nV, part.tokens[rows])
            kept = (sampled, entropy(logprobs_nV.detach()))
            if objective.estimator != "full":
                return kept
            return (*kept, part.divergence(logprobs_nV, rows))

        logprobs, entropies, *divergence = chunked_head(
            hidden[torch.from_numpy(microbatch.positions).to(self._device)],
            self._weight,
            self._bias,
            reduce,
            chunk_tokens=self._config.head_chunk_tokens,
            temperature=self._temperature,
        )
        log_ratio = (logprobs.detach() - part.teacher_logprobs).masked_fill(~part.mask, 0.0)
        if divergence:
            cost, clipped = divergence[0], torch.zeros_like(part.mask)
        else:
            coefficient = part.flat(ESTIMATORS[objective.estimator](part.padded(log_ratio), part.padded(part.mask)))
            cost, clipped = surrogate(
                logprobs, part.behaviour_logprobs, coefficient, objective.clip_low, objective.clip_high
            )
        forward_kl = k3(logprobs, part.behaviour_logprobs)
        cost = (cost + objective.trust_region.beta * forward_kl).masked_fill(~part.mask, 0.0)
        loss = (part.weights * cost).sum()
        with torch.no_grad():
            reverse_kl = divergence[0] if divergence else log_ratio
            sums.add(loss, part, logprobs, entropies, reverse_kl, forward_kl, clipped)
        return loss

    def _refuse(self, what: str, ids: np.ndarray) -> NoReturn:
        self._optimizer.zero_grad(set_to_none=True)
        names = ", ".join(str(TrajectoryId(*row)) for row in ids[:4].tolist()) + (" …" if len(ids) > 4 else "")
        raise NonFiniteLossError(
            f"update {self.policy_version + 1}: {what} (trajectories {names}); the weights are those of version "
            f"{self.policy_version}, and the last checkpoint is good"
        )
