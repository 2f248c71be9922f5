"""The learner trains the student: it is the one role that changes weights. A plain class, values in, values out.

An update takes B trajectories with their teacher scores through one or more optimiser steps. Shapes: N response tokens of
the update, n of a micro-batch, V vocabulary, K support; [B, T] is padded by trajectory. A learner may have several ranks,
each a process with this class (student/sharding.py). With one rank, "this rank" has everything.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from actors.accelerator import settle_algorithms, torch_device
from actors.config import StudentConfig, TeacherConfig, publishes_adapter
from actors.data.models import find_model, load_head
from actors.data.trajectory_shards import Row, Shard, opened, write_shard
from actors.errors import CheckpointError, GivenUpError, NonFiniteLossError, UserError
from actors.forward.packing import is_packed
from actors.memory import give_back
from actors.processor_time import ProcessorTime
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories, TrajectoryId, select_trajectories
from actors.weights.buckets import WeightVersion
from actors.weights.delta import DeltaVersion
from learner.collate import Step, UpdateBatch, collate, minibatch_rows, steps_of, tokens_of
from learner.config import LearnerConfig
from learner.costs import check_own_functions
from learner.forward import Forward
from learner.hidden_states import Head, same_rows
from learner.metrics import NOT_OF_DATA, UpdateMetrics, groups_of, response_metrics
from learner.objective.policy_gradient import effective_sample_size
from learner.objective.trust_region import adapted_beta, backed_off
from learner.old_policy import OldPolicy
from learner.schedule import Plan, learning_rate
from learner.scores import certain
from learner.student.build import build_student
from learner.student.checkpoint import read_json
from learner.student.lora import adapter_tensors, merged_tensors
from learner.student.model_files import read_model_files
from learner.student.optimizer import build_optimizer
from learner.student.publishing import MovingAverages, Publisher
from learner.student.sharding import Ranks, full_tensor
from learner.student.state import State
from learner.student.tensor_files import BackgroundWrite, checkpoint_error
from learner.validation import starts_at_learner


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
        keep_published: bool = False,
        teachers: Mapping[str, TeacherConfig] | None = None,
        masked_role_token_ids: Sequence[int] = (),
        turn_ends: Mapping[str, tuple[int, int]] | None = None,
        vocabulary: int | None = None,
        plans: Sequence[Plan] = (),
        records: bool = False,
        of_data: bool = False,
        ranks: Ranks | None = None,
    ):
        """Loads the student, or, where `checkpoint` names a directory, the state that was saved there.

        teachers: by name. The learner loads the heads of those that send hidden states, and keeps the averages of those
        that follow the student. masked_role_token_ids: the tokens of `objective.masked_token_roles`. vocabulary: number of
        the student's tokens; further rows of its head are padding. turn_ends: by teacher, (student's, teacher's) token
        where they end a turn with different ones. plans: of a learning rate that was planned anew. records: `record` is
        called after each update. of_data: responses are of a data set, so that nobody has sampled or scored them. ranks: this
        process among those of the learner; all other arguments, and all calls, are the same on every rank. UserError: a
        function of the user's own fails.
        """
        check_own_functions(config.objective)
        settle_algorithms()
        self._student, self._config = student, config
        self._total_updates, self._plans = total_updates, plans
        self._publish_dtype = publish_dtype
        self._ranks = ranks or Ranks()
        self._publisher = Publisher(bucket_bytes, keep=keep_published)
        self._device = torch_device()
        self._masked_token_ids = [*config.objective.masked_token_ids, *masked_role_token_ids]
        self._busy_seconds, self._processor = 0.0, ProcessorTime()
        self._records = records
        self._last: tuple[Trajectories, list[TeacherScores], np.ndarray] | None = None
        """The last update's trajectories, the scores of some, and [B] which are this rank's own; until it is recorded."""
        self._stepped_from = -1
        """The policy version of the last optimiser step; the current one within an update that has not ended."""
        self._gives_up = False
        """Whether `give_up` was called."""
        self._write = BackgroundWrite()
        self._checkpoint = bool(checkpoint)
        """Whether there is a checkpoint to go on from."""
        self._teachers = dict(teachers or {})
        self._of_data = of_data
        following = {name: t.ema_decay for name, t in self._teachers.items() if t.ema_decay is not None}
        self._model, body, self._pass_tokens, self._adapter = build_student(
            student, config, checkpoint, self._ranks, self._device, averages=len(following)
        )
        self._slices = self._ranks.slices(config.sequence_parallel)
        head: Any = self._model.get_output_embeddings()
        self._vocabulary = min(len(head.weight), vocabulary or len(head.weight))
        files = self._other_files() if self._ranks.rank == 0 else {}
        self._optimizer = build_optimizer(self._model, config.optimizer, offload=config.offload_optimizer)
        sampling: dict[str, Any] = {"temperature": temperature, "vocabulary": self._vocabulary}
        named = any(teacher.signal == "student_topk" for teacher in self._teachers.values())
        own_pi_old = starts_at_learner(config.objective, publish_dtype, config.compute_dtype)
        sampling |= {"named_by_student": named, "own_pi_old": own_pi_old, "slices": self._slices}
        self._forward = Forward(body, head.weight, head.bias, config, self._device, **sampling)
        self._old_policy = OldPolicy(self._forward, config, self._ranks, self._device, own_pi_old=own_pi_old)
        self._heads = same_rows(self._load_heads(), self._vocabulary, turn_ends or {})
        self._averages = MovingAverages(self._model, following)
        self._state = State(self._model, self._optimizer, self._averages, self._adapter, files, self._ranks)
        self.policy_version, self._beta = 0, config.objective.trust_region.beta
        if checkpoint:
            self._restore(Path(checkpoint, "training"))
        elif student.optimizer == "keep":
            source = find_model(student.source, "student.model", code=student.trust_remote_code)
            self._state.load_moments(source / "training")

    def _restore(self, training: Path) -> None:
        """Loads what a checkpoint has besides the weights: version, beta, moments, averages."""
        state = read_json(training / "learner.json")
        self.policy_version = state["policy_version"]
        region = self._config.objective.trust_region
        # One that was adapted goes on, unless the campaign goes on with another `trust_region.beta`.
        if region.target_kl is not None and state.get("configured_beta", region.beta) == region.beta:
            self._beta = state["beta"]
        self._state.load(training)

    def update(
        self,
        ids: np.ndarray,
        *batches: Trajectories | TeacherScores | Shard,
        rate_scale: float = 1.0,
        domains: Sequence[str | None] | None = None,
        of_each: bool = False,
    ) -> dict[str, Any]:
        """Trains on the trajectories with these ids [B, 3]; returns the metrics of the update (docs/metrics.md).

        The update has `epochs_per_update` times `minibatches_per_update` AdamW steps on the loss of `Forward.loss`, which
        ratio and trust region keep near the weights that it starts from. A step without a token to learn from is not
        taken. The policy version grows by one, also where no step was taken.
        batches: hold the trajectories and their scores, in any order and perhaps with others. With several ranks, each is
        given all trajectories, and the scores of those that it trains on (`owners` in student/sharding.py). A Shard stands for
        the recorded trajectories and scores in its file. rate_scale: factor of the schedule's learning rate.
        domains: [B] of the prompts, to measure each. of_each: also return the reverse KL of each trajectory, `reverse_kl_of_each` [B].
        The result depends on `ids`, trajectories and scores, not on how they are batched.
        KeyError: a trajectory is missing. CampaignError: scores are missing. NonFiniteLossError: loss or gradient is not
        finite; that step was not taken. GivenUpError: `give_up` was called before the first step.
        """
        start = time.perf_counter()
        given = opened(batches)
        written = select_trajectories(ids, [b for b in given if isinstance(b, Trajectories)])
        scores = [b for b in given if isinstance(b, TeacherScores)] if not self._of_data else [certain(written)]
        steps, this_rank_B = self._steps(written)
        batch = collate(
            written,
            scores,
            this_rank_B,
            tokens_of(steps, len(written.response_tokens)),
            self.policy_version,
            self._config.objective,
            self._device,
            masked_token_ids=self._masked_token_ids,
            vocabulary=self._vocabulary,
            heads=self._heads,
            ranks=self._ranks,
            sliced=self._slices is not None,
        )
        begun = self._old_policy.look_ahead(batch, steps, self._go_on)
        rate = rate_scale * learning_rate(
            self.policy_version + 1, self._total_updates, self._config.optimizer, self._plans
        )
        # Set here, by no scheduler: the rate is a function of the version, so a resumed run has the same.
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        collected = UpdateMetrics()
        taken = self._take_steps(batch, steps, begun, collected)
        self.policy_version += 1
        self._averages.follow()
        groups = self._groups(ids, scores, domains)
        metrics = collected.means(groups, self._ranks) | response_metrics(batch.trajectories)
        metrics |= {**taken, "learning_rate": rate, "beta": self._beta} | (NOT_OF_DATA if self._of_data else {})
        if self._config.objective.truncated == "mask":
            metrics["truncated_masked"] = int(written.truncated.sum())
        if of_each:
            metrics["reverse_kl_of_each"] = collected.reverse_kl_of_each(len(ids), self._ranks)
        if self._config.objective.mismatch.correction != "none":  # of the weights as they were cut
            cut = batch.tensors["importance"].log()
            metrics["mismatch_ess"] = effective_sample_size(cut, batch.tensors["mask"]).item()
        target = self._config.objective.trust_region.target_kl
        if target is not None:
            # After the last step: before it, a single on-policy step has not moved yet.
            assert begun is not None
            self._beta = adapted_beta(self._beta, self._old_policy.forward_kl(begun, steps), target)
        if self._records:
            self._last = written, scores, this_rank_B
        metrics["busy_seconds"] = (time.perf_counter() - start) * self._ranks.size  # summed over the role's processes
        self._busy_seconds += metrics["busy_seconds"]
        metrics["processor_seconds"] = self._processor.since_report() * self._ranks.size
        give_back()
        return metrics

    def record(self, directory: str, rows: Sequence[Row]) -> None:
        """Writes what the last update has trained on to a shard (actors/data/trajectory_shards.py), each rank its own part.

        rows: of all trajectories of the update, in its order. It may be called again after an error. CheckpointError: it
        could not be written; DiskFullError, because the disk is full.
        """
        together = self._config.sequence_parallel
        if self._last is None or self._ranks.rank % together:  # ranks that share rows have the same trajectories
            return
        written, scores, own_B = self._last
        own = select_trajectories(written.ids[own_B], [written])
        part = (self._ranks.rank // together, self._ranks.size // together)
        rows = [rows[place] for place in np.flatnonzero(own_B)]
        try:
            write_shard(Path(directory), self.policy_version, *part, own, scores, rows)
        except OSError as error:
            raise checkpoint_error(error) from error
        self._last = None

    def give_up(self) -> None:
        """Called beside `update`, in another thread: the campaign ends, and waits for a checkpoint only.

        The update under way ends with GivenUpError before its next pass; so does every later one. An update that has
        taken an optimiser step is finished: to go back from there would take a copy of weights and moments.
        """
        self._gives_up = True

    def publish(self, delta: bool = False) -> Iterator[np.ndarray | WeightVersion | DeltaVersion]:
        """This rank's rows of the weights as buckets in the rollout dtype, each when it is filled, then their manifest.

        delta: what changed since the version that was published before, as one bucket, unless that saves nothing. For
        this each rank keeps a copy of what it published, where `keep_published` was given.
        """
        self._optimizer.zero_grad(set_to_none=True)  # the step is taken: nobody reads them any more
        if publishes_adapter(self._student):
            named: Any = list(adapter_tensors(self._model).items())
        else:
            named = list(merged_tensors(self._model) if self._adapter else self._model.named_parameters())
        named = [pair for number, pair in enumerate(named) if self._ranks.writes(number)]
        yield from self._publisher.full_or_delta(self.policy_version, named, self._publish_dtype, delta=delta)
        give_back()

    def publish_average(self, teacher: str) -> Iterator[np.ndarray | WeightVersion]:
        """The same of the moving average that this teacher is, in its dtype."""
        dtype = self._teachers[teacher].dtype
        averages = [pair for i, pair in enumerate(self._averages.weights_of(teacher)) if self._ranks.writes(i)]
        yield from self._publisher.full(self.policy_version, averages, dtype)

    def save(self, directory: str, sample_bytes: int | None = None) -> None:
        """Copies the state as it is now, which a thread then writes to `directory` (learner/student/checkpoint.py).

        Each rank its own rows, all into the same files: they must see the same file system.
        sample_bytes: for a trial before the first update, write no more than about this of weights and moments each.
        CheckpointError: the write before failed, there is no memory for the copy, or an update ended with an error after
        some of its steps, so that the weights belong to no version. The learner is well after it.
        """
        if self._stepped_from == self.policy_version:
            raise CheckpointError("the last update was broken off between its steps: the weights belong to no update")
        try:
            configured = self._config.objective.trust_region.beta
            progress = {"policy_version": self.policy_version, "beta": self._beta, "configured_beta": configured}
            self._write.start(self._state.copied(directory, progress, sample_bytes))
        except Exception as error:
            raise checkpoint_error(error) from error

    def checkpoint_bytes(self) -> int:
        """Bytes of the tensors of a checkpoint: weights, two moments of those that are trained, averages."""
        return self._state.nbytes()

    def saved(self) -> bool:
        """Whether what `save` copied is on disk. CheckpointError: it cannot be written."""
        done = self._write.done()
        self._checkpoint |= done and self.policy_version > 0
        return done

    def status(self) -> dict[str, float]:
        """Policy version and busy seconds."""
        return {"policy_version": self.policy_version, "busy_seconds": self._busy_seconds}

    def _groups(
        self, ids: np.ndarray, scores: Sequence[TeacherScores], domains: Sequence[str | None] | None
    ) -> dict[str, np.ndarray]:
        """The groups of trajectories that are measured by themselves, by teacher and by domain."""
        reference = self._config.objective.reference_teacher
        teaching = [batch for batch in scores if batch.teacher != reference]
        names = self._teachers.keys() - {reference}
        return groups_of(ids, teaching, domains, teachers=names, ranks=self._ranks, device=self._device)

    def _steps(self, written: Trajectories) -> tuple[list[Step], np.ndarray]:
        """(the steps of one epoch; [B] bool, the trajectories that this rank, or its group, trains on)."""
        if written.begins.size and not is_packed(self._model):
            found = (
                "an episode of several conversations, and a student in which more than attention passes between tokens"
            )
            raise UserError(
                "environment.command", found, "one conversation, or a student whose attention can be replaced"
            )
        rows = minibatch_rows(len(written), self._config.minibatches_per_update)
        costs = np.diff(written.prompt_offsets) + written.lengths
        this_rank_B = self._ranks.own_trajectories(costs, rows, self._config.sequence_parallel)
        cut = (this_rank_B, self._pass_tokens, self._slices, self._ranks, self._device)
        return steps_of(written, rows, *cut), this_rank_B

    def _go_on(self) -> None:
        """Before each pass until the first step. GivenUpError: the update is to be given up; all ranks raise it together."""
        if self._stepped_from == self.policy_version:
            return
        asked = self._gives_up
        if self._ranks.size > 1:  # the call reaches the ranks at different times
            asked = bool(self._ranks.max(torch.tensor(int(asked), device=self._device)))
        if asked:
            self._optimizer.zero_grad(set_to_none=True)
            raise GivenUpError(f"update {self.policy_version + 1} was given up before its first step")

    def _take_steps(
        self, batch: UpdateBatch, steps: Sequence[Step], begun: UpdateBatch | None, collected: UpdateMetrics
    ) -> dict[str, float]:
        """Takes the steps of all epochs and minibatches; returns what is measured of steps.

        begun: the batch with the weights before the update as pi_old, where the trust region measures the KL to them.
        """
        found = {"grad_norm": 0.0, "step_scale": 1.0, "steps_taken": 0, "steps_skipped": 0}
        for epoch in range(self._config.epochs_per_update):
            for step in steps:
                size = batch.weigh(step.rows, self._config.objective, self._beta)
                if not size:
                    # Not even with a gradient of 0: moments and weight decay would move the weights.
                    found["steps_skipped"] += 1
                    continue
                moved = found["steps_taken"] > 0
                collected.begin_step(size, again=epoch > 0, moved=moved)
                if moved and self._config.objective.trust_region.max_kl is not None:
                    begun, _ = self._old_policy.now(batch, [step], self._go_on)
                found["grad_norm"] = self._accumulate(batch, step, collected, starts_here=begun is None)
                found["step_scale"] = self._step(begun, step)
                found["steps_taken"] += found["step_scale"] > 0
                if found["step_scale"] < 1:
                    return found  # cut at the KL limit: a further step would go beyond it
        return found

    def _accumulate(self, batch: UpdateBatch, step: Step, collected: UpdateMetrics, *, starts_here: bool) -> float:
        """Accumulates the gradient of the loss of this step, and clips it; returns its norm before clipping.

        starts_here: the batch does not hold the learner's own log-probs at the start of the update.
        """
        self._optimizer.zero_grad(set_to_none=True)
        for microbatch in step.passes:
            self._go_on()
            part = batch.part(microbatch)
            loss = self._forward.loss(part, microbatch, self._beta, collected, starts_here=starts_here)
            # The sum, so that all ranks refuse together: one that raised alone would leave the others in `backward`.
            total = self._ranks.sum(loss.detach())
            if not torch.isfinite(total):
                rows_here = torch.from_numpy(microbatch.rows if not torch.isfinite(loss) else microbatch.rows[:0])
                # Ranks that share a row may name the same trajectories.
                wrong = np.unique(self._ranks.concatenate(rows_here.to(self._device)).cpu().numpy())
                self._refuse(f"the loss is {total.item()}", batch.trajectories.ids[wrong])
            loss.backward()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._ranks.sum_over_copies(trained)
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(trained, self._config.optimizer.max_grad_norm)).item()
        if not math.isfinite(norm):
            self._refuse(f"the gradient's norm is {norm}", batch.trajectories.ids[step.rows])
        return norm

    def _step(self, begun: UpdateBatch | None, step: Step) -> float:
        """Takes the step, shortened where it goes beyond `trust_region.max_kl`; returns the share taken, in [0, 1].

        The line search of TRPO (arXiv 1502.05477, appendix C), on a straight line between the weights before and after.
        The KL is to the weights before the step (`begun`), in the learner's own numerics: at a share of 0 it is 0,
        whatever engine sampled. A step that is taken back keeps its gradient in AdamW's moments.
        """
        limit = self._config.objective.trust_region.max_kl
        parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        before = [p.detach().clone() for p in parameters] if limit is not None else []
        self._stepped_from = self.policy_version
        self._optimizer.step()
        if limit is None:
            return 1.0
        assert begun is not None
        after = [p.detach().clone() for p in parameters]  # each trial starts from both ends: rounding does not add up

        def measure(scale: float) -> float:
            with torch.no_grad():
                for parameter, a, b in zip(parameters, before, after, strict=True):
                    # The ends exactly: rounding, or an infinite step, must not change the weights that are gone back to.
                    parameter.copy_({0.0: a, 1.0: b}.get(scale, a + scale * (b - a)))
            return self._old_policy.forward_kl(begun, [step])

        scale, _ = backed_off(measure, limit)
        return scale

    def _other_files(self) -> dict[str, bytes]:
        """The files of the student beside its weights, which each checkpoint holds as they are."""
        student = self._student
        return read_model_files(
            find_model(student.model, "student.model", code=student.trust_remote_code), "student.model"
        )

    def _load_heads(self) -> dict[str, Head]:
        """The heads of the teachers that send hidden states: the learner computes the product with them."""
        sending = {name: teacher for name, teacher in self._teachers.items() if teacher.signal == "hidden"}
        return {name: self._head_of(teacher, f"teachers.{name}.model") for name, teacher in sending.items()}

    def _head_of(self, teacher: TeacherConfig, key: str) -> Head:
        head = load_head(teacher.model, teacher.dtype, self._device, teacher.trust_remote_code, key)
        return Head(*head, 1.0 if teacher.temperature is None else teacher.temperature)

    def _refuse(self, what: str, ids: np.ndarray) -> NoReturn:
        """Raises NonFiniteLossError with the first of these trajectories; the gradient is dropped, so no step follows."""
        self._optimizer.zero_grad(set_to_none=True)
        saved = self._checkpoint or (self.policy_version > 0 and self._write.good())
        good = "the last checkpoint is good" if saved else "there is no checkpoint before it"
        names = ", ".join(str(TrajectoryId(*row)) for row in ids[:4].tolist()) + (" …" if len(ids) > 4 else "")
        weights = f"the weights are those of version {self.policy_version}, and"
        if self._stepped_from == self.policy_version:
            weights = "some of the update's optimiser steps were taken, so the weights belong to no version;"
        raise NonFiniteLossError(f"update {self.policy_version + 1}: {what} (trajectories {names}); {weights} {good}")
