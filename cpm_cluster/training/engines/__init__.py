"""The engine seam: what the trainer asks of whatever computes.

An engine is picked by name, never by what happens to be installed.

``torch`` is the reference (DDP and FSDP2). Another engine is one more module here and one more line in
``_ENGINES``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol, Sequence

from torch import Tensor

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.packing import Batch
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import Settings

_ENGINES = {"torch": "cpm_cluster.training.engines.torch_engine:TorchEngine"}


class StepResult(NamedTuple):
    """One optimizer step over the global batch.

    ``loss`` in nats per target token; ``grad_norm`` before clipping, None when fp16 overflowed and the step
    was skipped; ``tokens`` are inputs without padding, of all ranks; ``loss_scale`` is 1 but for fp16.
    """

    loss: float
    grad_norm: float | None
    tokens: int
    loss_scale: float


class Engine(Protocol):
    """A model, its optimizer and a group of ranks.

    All methods but ``close`` are collective: every rank calls them in the same order. Results are equal on
    all ranks.
    """

    def build(self) -> None:
        """Make model and optimizer from the settings; raises UserError when given weights do not fit."""

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """Accumulate over this rank's micro batches, weigh by tokens over all ranks, clip, update.

        Raises FloatingPointError when loss or gradient is not finite; an fp16 gradient that overflows skips
        the step and halves the scale instead.
        """

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Return the loss in nats per target token over all ranks' batches; equally many on each rank."""

    def next_token_logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits [vocab] (fp32, on the CPU) after one document's ids."""

    def save_state(self, directory: Path) -> None:
        """Write into a directory what :meth:`load_state` needs: trained weights, optimizer, generators."""

    def load_state(self, directory: Path) -> None:
        """Continue a saved state, possibly of another number of ranks; raises UserError when it cannot."""

    def export_weights(self, directory: Path) -> None:
        """Write ``model.pt`` (CPM-9G names) or, for LoRA, ``delta.pt`` atomically."""

    def all_gather(self, value: int) -> list[int]:
        """Return every rank's value (below 2^63) in the order of ranks."""

    def any_flag(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def close(self) -> None:
        """Leave the group."""


def open_engine(settings: Settings, placement: Placement) -> Engine:
    """Join the ranks with the engine that the settings name; raises UserError for an unknown name."""
    if settings.engine not in _ENGINES:
        raise UserError("engine: expected {}, got {}".format(" or ".join(sorted(_ENGINES)), settings.engine))
    module, _, name = _ENGINES[settings.engine].partition(":")
    engine: Engine = getattr(import_module(module), name)(settings, placement)
    return engine
