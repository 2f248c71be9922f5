"""The ranks of one learner: processes that hold a share of every tensor each, and take a share of every update.

    weights, moments, gradients   in rows, one block of rows a rank (FSDP2); gathered layer by layer for a pass
    trajectories                  each on one rank, so that the ranks have about as many tokens
    what is decided               from sums over all ranks, on every rank alike

A learner of one rank goes through the same calls, which do nothing then. Every rank makes the same calls in the same
order: a collective that one of them leaves out keeps the others waiting. Shapes: B trajectories of the update, R ranks.
"""

from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from actors.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that the others do not hear from for so long has failed."""


class Ranks:
    """This process among the R of its learner; by default the only one."""

    def __init__(self, rank: int = 0, size: int = 1):
        """With several, torch.distributed has been initialised with this rank and size."""
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, store: dist.Store, rank: int, size: int, device: str) -> "Ranks":
        """Waits until all ranks of a learner have met at the store. One learner a process."""
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        return cls(rank, size)

    def shard(self, model: PreTrainedModel, device: str, compute_dtype: torch.dtype) -> None:
        """Leaves this rank its rows of every tensor, on its device; a layer is gathered for as long as it computes.

        Layers are gathered in the compute dtype, embedding, last norm and head in float32, as autocast has them on one
        rank; gradients are added up in float32. UserError: the model does not say what its layers are.
        """
        if self.size == 1:
            return
        mesh = dist.init_device_mesh(device, (self.size,))
        layers = decoder_layers(model)
        if not layers:
            raise UserError(
                "learner.replicas", f"{self.size} and {type(model).__name__}", "1, or a model of known layers"
            )
        exact = compute_dtype == torch.float32
        mixed = MixedPrecisionPolicy(
            param_dtype=None if exact else compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
        body, head = model.base_model, model.get_output_embeddings()
        fully_shard(body, mesh=mesh, reshard_after_forward=True)
        if head.weight is not model.get_input_embeddings().weight and not isinstance(head.weight, DTensor):
            model.tie_weights()  # a tied head is given the sharded embedding
        if not isinstance(head.weight, DTensor):
            fully_shard(head, mesh=mesh)  # never run as a module: learner/forward.py takes its weight
        for module in model.modules():
            if isinstance(module, FSDPModule):  # sums: the loss is weighed by the tokens of all ranks
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())

    def share(self, costs_B: np.ndarray, steps: Sequence[np.ndarray]) -> np.ndarray:
        """[B] bool: the trajectories that are this rank's, as `owners` has them."""
        return owners(costs_B, steps, self.size) == self.rank

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, of the same shape."""
        if self.size > 1:
            values = values.detach().clone()
            dist.all_reduce(values)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest over the ranks, element by element."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def concatenate(self, values: Tensor) -> Tensor:
        """[n_r, ...] of each rank -> [sum n_r, ...], in the order of the ranks."""
        if self.size == 1:
            return values
        counts = [torch.zeros((), dtype=torch.int64, device=values.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor(len(values), device=values.device))
        most = int(max(counts))
        kind = torch.uint8 if values.dtype == torch.bool else values.dtype
        padded = values.new_zeros((most, *values.shape[1:]), dtype=kind)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(values.dtype)


def owners(costs_B: np.ndarray, steps: Sequence[np.ndarray], ranks: int) -> np.ndarray:
    """[B] the rank that trains on each trajectory. costs_B: what each takes, in tokens; steps: the rows of each optimiser
    step. Every rank gets about the same cost of each step: longest first, to the rank with the least so far. The driver
    uses the same function to send each rank the scores of its own trajectories."""
    owner = np.zeros(len(costs_B), np.int64)
    for rows in steps if ranks > 1 else ():
        load = np.zeros(ranks, np.int64)
        for row in rows[np.argsort(-costs_B[rows], kind="stable")]:
            owner[row] = load.argmin()
            load[owner[row]] += costs_B[row]
    return owner


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers, as the model says what they are; none where it does not."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from the rows of all ranks; its gradient is the sum over the ranks."""
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """(rows that this rank holds, number of the first) along the first axis: all of them where nothing is sharded."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    local = tensor.to_local()
    chunk = -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk cuts
    return local, min(tensor.device_mesh.get_local_rank() * chunk, tensor.shape[0])
