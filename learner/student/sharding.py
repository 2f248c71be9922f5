"""Shards the student over the learner's ranks, and holds the collectives and the split of an update between ranks.

    weights, moments, gradients   sharded by rows, one block of rows a rank (FSDP2); gathered layer by layer for a pass
    copies of these               one, over all ranks; or one for each node, where the ranks are on several and a node has
                                  room: layers are then gathered within a node, gradients summed between nodes once a step
    trajectories                  each trained on one rank, or on one group of ranks that share each row of tokens
                                  (actors/forward/slices.py); all have about the same number of tokens
    decisions                     taken from sums over all ranks, so every rank decides the same

A learner of one rank makes the same calls, which then do nothing. Every rank must make the same collective calls in the
same order: when one rank skips a call, the others wait for it. Shapes: B trajectories of the update, R ranks.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from actors.errors import UserError
from actors.forward.slices import KEY, Slices

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A collective that takes longer than this has failed: one of the ranks is lost."""


class Ranks:
    """This process's rank and the number of ranks R of its learner; by default rank 0 of 1."""

    def __init__(self, rank: int = 0, size: int = 1, nodes: Sequence[str] = (), *, sharded: bool = False):
        """nodes: the node of each rank. size > 1: torch.distributed must have been initialised with this rank and size.

        sharded: shards, and uses the process group, with one rank too. One card then tries what several need.
        """
        self.rank, self.size, self._nodes = rank, size, nodes
        self.sharded = sharded or size > 1
        self.copy, self.copies = 0, 1
        """The number of the copy of the weights that this rank has rows of, and how many there are."""
        self._same_rows: dist.ProcessGroup | None = None
        """The ranks of all copies that have the same rows."""
        self._slices: dict[int, Slices] = {}

    @classmethod
    def join(cls, store: dist.Store, rank: int, size: int, device: str, nodes: Sequence[str] = ()) -> "Ranks":
        """Initialises torch.distributed and waits for all ranks at the store. At most one learner a process."""
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
        return cls(rank, size, nodes)

    def shard(
        self,
        model: PreTrainedModel,
        device: str,
        compute_dtype: torch.dtype,
        fits: Callable[[int], bool] = lambda _: False,
        cast: Callable[[torch.nn.Module], None] = lambda _: None,
    ) -> None:
        """Shards every parameter by rows (FSDP2) and moves this rank's rows to its device.

        A layer is gathered while it computes: decoder layers in the compute dtype; embedding, last norm and head in
        float32, the dtypes of autocast on one rank. Gradients are summed in float32.
        fits: number of ranks that share the weights -> whether this rank has the memory for that. Where the ranks of each
        node do, every node has a copy of the weights, and `sum_over_copies` sums the gradients. cast: is called for each
        layer just before it is sharded, and then for the model, to give the weights that are left their dtype and device.
        UserError: the model does not name its layer classes.
        """
        if not self.sharded:
            return
        mesh = self._mesh(device, fits)
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
            cast(layer)  # here, and not for the whole model at once: a layer's weights are dropped once it is sharded
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
        # The body owns what no layer owns: embedding and last norm.
        body, head = model.base_model, model.get_output_embeddings()
        cast(model)
        # By default FSDP would keep the root gathered after the forward pass.
        fully_shard(body, mesh=mesh, reshard_after_forward=True)
        if head.weight is not model.get_input_embeddings().weight and not isinstance(head.weight, DTensor):
            model.tie_weights()  # sharding replaced the embedding's parameter; tie the head to the new one
        if not isinstance(head.weight, DTensor):
            fully_shard(head, mesh=mesh)  # its forward is never called: learner/forward.py reads its weight
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Sum, not mean: the loss weights already divide by the tokens of all ranks.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no mean reduction
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())

    def _mesh(self, device: str, fits: Callable[[int], bool]) -> DeviceMesh:
        """The ranks that share one copy of the weights."""
        of_node = [[r for r, node in enumerate(self._nodes) if node == name] for name in dict.fromkeys(self._nodes)]
        each = len(of_node[0]) if of_node else self.size
        if len(of_node) < 2 or any(len(ranks) != each for ranks in of_node):
            return dist.init_device_mesh(device, (self.size,))
        # One rank without room decides for all.
        if self.max(torch.tensor(float(not fits(each)), device=device)):
            return dist.init_device_mesh(device, (self.size,))
        mesh = DeviceMesh(device, of_node, mesh_dim_names=("copy", "rows"))
        self.copy, self.copies = mesh.get_local_rank("copy"), len(of_node)
        self._same_rows = mesh.get_group("copy")
        return mesh["rows"]

    def sum_over_copies(self, parameters: Sequence[Tensor]) -> None:
        """Sums the gradients of all copies of the weights; once a step, when all of its passes are done."""
        if self._same_rows is None:
            return
        # All ranks of a group have the same rows, and so leave out the same tensors.
        rows = [own_rows(parameter.grad)[0] for parameter in parameters if parameter.grad is not None]
        sums = [dist.all_reduce(one, group=self._same_rows, async_op=True) for one in rows if one.numel()]
        for one in sums:
            one.wait()

    def writes(self, number: int) -> bool:
        """Whether this rank writes its rows of the tensor with this number: the copies take turns."""
        return number % self.copies == self.copy

    def own_trajectories(
        self, costs_B: np.ndarray, steps: Sequence[np.ndarray], sequence_parallel: int = 1
    ) -> np.ndarray:
        """[B] bool: the trajectories that this rank trains on, or its group of `sequence_parallel` consecutive ranks.
        Other arguments: see `owners`."""
        return owners(costs_B, steps, self.size // sequence_parallel) == self.rank // sequence_parallel

    def slices(self, count: int) -> Slices | None:
        """This rank's place in its group of `count` consecutive ranks, which share each row; None where count is 1.

        UserError: count does not divide the ranks. A collective.
        """
        if self.size % count:
            raise UserError(KEY, count, f"a divisor of learner.replicas, {self.size}")
        if count > 1 and count not in self._slices:
            group, _ = dist.new_subgroups(count, timeout=COLLECTIVE_TIMEOUT)
            self._slices[count] = Slices(self.rank % count, count, group)
        return self._slices.get(count)

    def sum(self, values: Tensor) -> Tensor:
        """The element-wise sum over the ranks, without gradient."""
        if self.sharded:
            values = values.detach().clone()
            dist.all_reduce(values)
        return values

    def max(self, values: Tensor) -> Tensor:
        """The element-wise maximum over the ranks."""
        if self.sharded:
            values = values.clone()
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def concatenate(self, values: Tensor) -> Tensor:
        """[n_r, ...] on each rank r -> [sum_r n_r, ...] in the order of the ranks, on every rank."""
        if not self.sharded:
            return values
        counts = [torch.zeros((), dtype=torch.int64, device=values.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor(len(values), device=values.device))
        # all_gather needs equal shapes, so each rank pads to the longest; it does not take bool.
        longest = int(max(counts))
        dtype = torch.uint8 if values.dtype == torch.bool else values.dtype
        padded = values.new_zeros((longest, *values.shape[1:]), dtype=dtype)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(values.dtype)


def owners(costs_B: np.ndarray, steps: Sequence[np.ndarray], ranks: int) -> np.ndarray:
    """[B] the rank, or the group of ranks that share each row, that trains on each trajectory.

    ranks: their number, or that of the groups. costs_B: tokens of each trajectory, prompt and response. steps: the rows of
    each optimiser step. Within a step the longest trajectory goes first, to the rank with the fewest tokens so far, so all
    ranks get about the same cost. The driver calls the same function to send each rank the scores of its own trajectories.
    """
    owner = np.zeros(len(costs_B), np.int64)
    for rows in steps if ranks > 1 else ():
        load = np.zeros(ranks, np.int64)
        # A stable sort: the driver and every rank must break ties alike.
        for row in rows[np.argsort(-costs_B[rows], kind="stable")]:
            owner[row] = load.argmin()
            load[owner[row]] += costs_B[row]
    return owner


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The model's decoder layers, by the class names in its `_no_split_modules`; empty if it names none."""
    classes = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in classes]


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor with all its rows, gathered from all ranks. A collective; its gradient is summed over the ranks."""
    return tensor.full_tensor(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


def own_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """(this rank's rows of the tensor, the index of the first); all rows and 0 if the tensor is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    local = tensor.to_local()
    # FSDP splits rows as torch.chunk does: the last ranks may have fewer rows, or none.
    chunk = -(-tensor.shape[0] // tensor.device_mesh.size())
    return local, min(tensor.device_mesh.get_local_rank() * chunk, tensor.shape[0])
