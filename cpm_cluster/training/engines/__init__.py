"""The engine seam: what the trainer asks of whatever computes.

An engine is picked by name, never by what happens to be installed.

``torch`` is the reference (DDP and FSDP2); ``bmtrain`` is what CPM's images have. Another engine is one more module
here and one more line in ``_ENGINES``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Callable, Iterable, Literal, NamedTuple, Protocol, Sequence

from torch import Tensor

from cpm_cluster.training.data.packing import Batch
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import Settings

_ENGINES = {
    "torch": "cpm_cluster.training.engines.torch_engine:TorchEngine",
    "bmtrain": "cpm_cluster.training.engines.bmtrain_engine:BMTrainEngine",
}


Update = Literal["applied", "overflow", "refused"]


class StepResult(NamedTuple):
    """One optimizer step over the global batch.

    ``loss`` in nats per target token and ``grad_norm`` before clipping are not finite where the step says so itself;
    ``tokens`` are inputs without padding, of all ranks; ``loss_scale`` (of this step) is 1 but for fp16. ``update``:
    the weights changed, or fp16 overflowed, or :data:`Accept` refused. ``stop``: some rank wants to stop.
    ``forward_seconds``: this rank's own layers in the forward pass of the first micro batch, without waiting for
    other ranks; alone of all fields it differs between ranks, and is None where an engine does not measure it.
    """

    loss: float
    grad_norm: float
    tokens: int
    loss_scale: float
    update: Update
    stop: bool
    forward_seconds: float | None


# Whether to update the weights, from the loss and the gradient norm of a step; the answer is equal on all ranks. It
# may raise instead: then the weights are those from before the step.
Accept = Callable[[float, float], bool]


class StagedState(Protocol):
    """A copy of this rank's part of the state in CPU memory, to be written while training goes on.

    ``live``: no copy but the state itself, which is in CPU memory already; it must be written before the next update.
    """

    live: bool

    def write(self) -> list[Path]:
        """Write and sync this rank's files into the directory, which is there by then, and return them.

        In a thread, so it must not talk to other ranks. Raises OSError that names the file.
        """

    def gather_index(self) -> Callable[[], list[Path]]:
        """Once every rank has written: bring to rank 0 what describes the parts together. Collective, short.

        Returns what writes and syncs it, and returns the files; rank 0 calls that in a thread, other ranks do not.
        """


class Engine(Protocol):
    """A model, its optimizer and a group of ranks.

    All methods but ``close`` are collective: every rank calls them in the same order. Results are equal on
    all ranks.
    """

    def build(self) -> None:
        """Make model and optimizer from the settings; raises UserError when given weights do not fit."""

    def train_step(
        self, micro_batches: Sequence[Batch], lr: float, accept: Accept, wants_to_stop: Callable[[], bool]
    ) -> StepResult:
        """Accumulate over this rank's micro batches, weigh by tokens over all ranks, clip, update where accepted.

        ``accept`` is asked once a step, before the update, but for an fp16 gradient that overflows while the scale
        can still be halved: that skips the step. ``wants_to_stop`` is asked once, as late as the exchange of the
        loss allows, so that it costs no exchange of its own.
        """

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the loss in nats per target token over all ranks' batches; equally many on each rank."""

    def next_token_logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits [vocab] (fp32, on the CPU) after one document's ids."""

    def stage_state(self, directory: Path) -> StagedState:
        """Copy to the CPU what :meth:`load_state` needs, for a directory: trained weights, optimizer, generators.

        Training may go on at once. One copy is in use at a time, so an engine may keep its memory for the next.
        """

    def load_state(self, directory: Path) -> None:
        """Continue a saved state, possibly of another number of ranks; raises UserError when it cannot.

        The files of the directory are whole: their sums have been compared with the manifest.
        """

    def export_weights(self, directory: Path) -> None:
        """Write ``model.pt`` (CPM-9G names) or, for LoRA, ``delta.pt`` atomically; no save may be in flight.

        Rank 0 gathers the weights, so the memory of staged copies is given back before.
        """

    def all_gather(self, value: int) -> list[int]:
        """Return every rank's value (below 2^63) in the order of ranks."""

    def exchange(self, values: Sequence[float]) -> list[tuple[float, ...]]:
        """Return every rank's values (float64, equally many) in the order of ranks."""

    def all_gather_text(self, text: str) -> list[str]:
        """Return every rank's text, of any length, in the order of ranks."""

    def any_flag(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""

    def close(self) -> None:
        """Leave the group."""


def open_engine(settings: Settings, placement: Placement) -> Engine:
    """Join the ranks with the engine that the settings name; raises UserError for an unknown name."""
    if settings.engine not in _ENGINES:
        raise UserError("engine: expected {}, got {}".format(" or ".join(sorted(_ENGINES)), settings.engine))
    module, _, name = _ENGINES[settings.engine].partition(":")
    engine: Engine = getattr(import_module(module), name)(settings, placement)
    return engine
