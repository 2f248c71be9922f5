"""What a checkpoint holds of the learner: weights, moments and averages, copied for a thread that writes them, and loaded."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from actors.memory import give_back
from learner.student.checkpoint import flush, write_json
from learner.student.checksums import write_part
from learner.student.lora import ADAPTER_FILE, adapter_tensors, merged_tensors
from learner.student.model_files import write_model_files
from learner.student.optimizer import OffloadedAdamW, load_optimizer_tensors, optimizer_tensors
from learner.student.publishing import MovingAverages
from learner.student.sharding import Ranks
from learner.student.tensor_files import StoredTensors, copies, dtype_of, model_tensors, sample, write_tensors


class State:
    """The tensors of one rank that training changes, in the files of a checkpoint (checkpoint.py lists them)."""

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.AdamW,
        averages: MovingAverages,
        adapter: Any,
        files: Mapping[str, bytes],
        ranks: Ranks,
    ):
        """adapter: the model with adapters, which peft saves; None without. files: of the student beside its weights, which
        each checkpoint holds as they are; the first rank writes them."""
        self._model, self._optimizer, self._averages = model, optimizer, averages
        self._adapter, self._files, self._ranks = adapter, files, ranks

    def load(self, training: Path) -> None:
        """Loads moments and averages of a checkpoint; the model was built with its weights."""
        self.load_moments(training)
        if self._averages.tensors():
            self._averages.load(StoredTensors(training / "averages.safetensors").like)

    def load_moments(self, training: Path) -> None:
        """Loads the moments of a checkpoint, where it has some."""
        moments = StoredTensors(training / "optimizer.safetensors")
        if len(moments):
            load_optimizer_tensors(self._model, self._optimizer, moments.like)

    def copied(self, directory: str, progress: Mapping[str, Any], sample_bytes: int | None) -> Callable[[], None]:
        """Copies the state, and returns the function that writes the copy.

        progress: the content of `learner.json`. sample_bytes: see `Learner.save`.
        """
        # Copies, since the next update changes the weights while the thread writes.
        first = self._ranks.rank == 0
        merged = merged_tensors(self._model) if self._adapter else None
        weights = copies(sample(model_tensors(self._model, self._ranks, merged), sample_bytes), self._ranks)
        offloaded = {"host_values": self._optimizer.host_values} if isinstance(self._optimizer, OffloadedAdamW) else {}
        moments = optimizer_tensors(self._model, self._optimizer)
        files = {
            "model.safetensors": weights,
            f"adapter/{ADAPTER_FILE}": copies(adapter_tensors(self._model), self._ranks) if self._adapter else {},
            "training/optimizer.safetensors": copies(sample(moments, sample_bytes), self._ranks, **offloaded),
            "training/averages.safetensors": copies(sample(self._averages.tensors(), sample_bytes), self._ranks),
        }
        dtype = dtype_of(weights)

        def write() -> None:
            training = Path(directory, "training")
            training.mkdir(parents=True, exist_ok=True)
            if first:
                write_model_files(self._files, Path(directory), dtype)
                write_json(training / "learner.json", progress)
            if self._adapter:
                self._adapter.save_pretrained(Path(directory, "adapter"))
            written = {
                name: write_tensors(Path(directory, name), tensors, begin=first)
                for name, tensors in files.items()
                # No moments before the first update: the file is there all the same.
                if tensors or name == "training/optimizer.safetensors"
            }
            write_part(Path(directory), self._ranks.rank, written)
            files.clear()  # the copies, before the flush: updates go on, and need memory themselves
            give_back()
            flush(Path(directory))

        return write

    def nbytes(self) -> int:
        """Bytes of the tensors of a checkpoint: weights, two moments of those that are trained, averages."""
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        tensors = [*self._model.parameters(), *trained, *trained, *self._averages.tensors().values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
