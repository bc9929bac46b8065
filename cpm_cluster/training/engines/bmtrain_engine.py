"""The BMTrain engine: ZeRO-2 or -3 over NCCL on GPUs, weights in half precision, Adam on the GPU or on the host.

It computes what the torch engine computes, in the precision of its weights: gradients have it, too, as they are summed
over micro batches and ranks, and the optimizer alone keeps fp32 copies.
"""

from __future__ import annotations

import gc
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch
from torch import Tensor

from cpm_cluster.training.data.packing import Batch
from cpm_cluster.training.engines import Accept, StepResult, Update
from cpm_cluster.training.engines.bmtrain_layers import BMTrainLayers, parts_of
from cpm_cluster.training.engines.bmtrain_optimizer import PartOptimizer
from cpm_cluster.training.engines.bmtrain_state import (
    Index,
    Stage,
    StagedParts,
    load_generators,
    load_parts,
    random_states,
    read_index,
)
from cpm_cluster.training.engines.bmtrain_versions import (
    always_recomputes,
    chain,
    check_precision,
    import_bmtrain,
    join,
    version,
)
from cpm_cluster.training.engines.bmtrain_weights import export, fill
from cpm_cluster.training.engines.determinism import compute_deterministically
from cpm_cluster.training.engines.forward_clock import ForwardClock
from cpm_cluster.training.engines.loss_scale import FIRST, LARGEST, SMALLEST, STEPS_TO_DOUBLE
from cpm_cluster.training.engines.passes import decide, last_logits, mean_loss, summed_loss, vector
from cpm_cluster.training.engines.process_group import announce, choose_device
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.model.attention import open_kernel
from cpm_cluster.training.model.decoder import CPM
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import LoraTuning, Settings

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class BMTrainEngine:
    """See :class:`cpm_cluster.training.engines.Engine`."""

    def __init__(self, settings: Settings, placement: Placement) -> None:
        """Choose the GPU and join the ranks.

        Raises UserError without a GPU or a BMTrain that can do what the settings ask for.
        """
        self._settings = settings
        self._placement = placement
        self._device = choose_device(placement)
        if self._device.type != "cuda":
            raise UserError("engine bmtrain needs GPUs and torch sees none; on CPUs use engine torch")
        if settings.training.zero_stage not in (2, 3):
            raise UserError(f"training.zero_stage: BMTrain has 2 and 3, not {settings.training.zero_stage}")
        announce(placement, self._device)
        self._bmt = import_bmtrain()
        check_precision(self._bmt, settings.training.precision)
        if settings.deterministic:
            compute_deterministically()
        join(self._bmt, placement, settings.seed, settings.training.zero_stage)
        self._type = _TYPES[settings.training.precision]
        self._stage = Stage()

    def build(self) -> None:
        """Make the model, of which each rank keeps its parts, and the optimizer."""
        settings, training = self._settings, self._settings.training
        kernel = open_kernel(settings, self._placement.rank, self._device, self._type)
        self._model = CPM(settings.model, make=BMTrainLayers(self._bmt, settings, self._type), kernel=kernel)
        blocks: Any = self._model.encoder.layers
        self._forward_clock = ForwardClock([block._module for block in blocks], self._device)
        self._model.encoder.layers = chain(self._bmt, blocks)  # type: ignore[assignment]
        parts = parts_of(self._bmt, self._model)
        fill(self._bmt, parts, settings, self.any_flag)
        self._trained = {name: part for name, part in parts.items() if part.parameter.requires_grad}
        self._optimizer = PartOptimizer(self._bmt, self._trained, training)
        self._manager = self._bmt.optim.OptimManager(
            loss_scale=FIRST if training.precision == "fp16" else None,
            loss_scale_factor=2,
            loss_scale_steps=STEPS_TO_DOUBLE,
            min_loss_scale=SMALLEST,
            max_loss_scale=LARGEST,
        )
        self._manager.add_optimizer(self._optimizer.adam)
        self._say_what_runs()
        self._await_copies()
        # From here on randomness (dropout) differs between ranks.
        torch.manual_seed(settings.seed + 1 + self._placement.rank)

    def train_step(
        self, micro_batches: Sequence[Batch], lr: float, accept: Accept, wants_to_stop: Callable[[], bool]
    ) -> StepResult:
        """One optimizer step.

        OptimManager divides each rank's loss by the number of ranks and BMTrain sums the gradients over them: a loss
        that is weighted by ranks / target tokens of all ranks gives the mean over tokens.
        """
        counts = self._summed(
            sum(batch.target_tokens for batch in micro_batches), sum(batch.tokens for batch in micro_batches)
        )
        weight = (self._placement.world_size / counts[0]).float()
        scale = float(self._manager.loss_scale)
        self._model.train()
        own_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, batch in enumerate(micro_batches, 1):
            with self._forward_clock if number == 1 else nullcontext():
                loss = self._summed_loss(batch)
            self._manager.backward(loss * weight)
            own_loss += loss.detach()
        limit = self._settings.training.clip_grad_norm or math.inf
        norm = self._manager.clip_grad_norm(self._optimizer.adam.param_groups, limit)
        sums = self._summed(own_loss, float(wants_to_stop()))
        targets, tokens, total, stop, grad_norm = torch.cat((counts, sums, norm.double().reshape(1))).tolist()
        update = self._update(total / targets, grad_norm, lr, accept)
        seconds = self._forward_clock.seconds()
        return StepResult(total / targets, grad_norm, int(tokens), scale, update, stop > 0, seconds)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Sum losses and target tokens over batches and ranks, then divide."""
        self._model.eval()
        return mean_loss(batches, self._summed_loss, self._summed, self._device)

    def next_token_logits(self, ids: Sequence[int]) -> Tensor:
        """Run the last ``seq_len`` ids through the model."""
        self._model.eval()
        return last_logits(self._model, ids, self._settings.training.seq_len, self._device)

    def stage_state(self, directory: Path) -> StagedParts:
        """Copy this rank's parts; what AdamOffload keeps in CPU memory is not doubled there, but written at once."""
        manager = self._manager
        scale, since = float(manager.loss_scale), int(manager.steps_since_last_scale)
        # Without a scale: what fp16 begins with if the next attempt takes that.
        kept = scale if manager.loss_scale_enabled else FIRST
        index = Index(self._placement.world_size, self._optimizer.updates, kept, since)
        live, state = self._settings.training.offload_optimizer, self._optimizer.state(scale)
        tensors = dict(state) if live else self._stage.copy(state)
        return StagedParts(directory, self._placement.rank, index, tensors, random_states(), live)

    def load_state(self, directory: Path) -> None:
        """Read this rank's parts out of what any number of ranks wrote."""
        index = read_index(directory)
        rank, world_size = self._placement.rank, self._placement.world_size
        self._optimizer.updates = index.updates
        if self._manager.loss_scale_enabled:
            self._manager.loss_scale = index.loss_scale
            self._manager.steps_since_last_scale = index.steps_since_last_scale
        load_parts(directory, index, self._trained, self._optimizer, rank, world_size)
        load_generators(directory, rank)
        self._await_copies()

    def export_weights(self, directory: Path) -> None:
        """Full tuning: all weights; LoRA: the updates alone."""
        self._stage = Stage()
        lora = isinstance(self._settings.method, LoraTuning)
        export(self._bmt, self._trained, directory / ("delta.pt" if lora else "model.pt"))

    def all_gather(self, value: int) -> list[int]:
        """Exchange one integer."""
        own = torch.tensor([value], dtype=torch.int64, device=self._device)
        return [int(item) for item in self._bmt.distributed.all_gather(own).flatten().tolist()]

    def exchange(self, values: Sequence[float]) -> list[tuple[float, ...]]:
        """Exchange some numbers."""
        return [tuple(of_rank) for of_rank in self._bmt.distributed.all_gather(vector(values, self._device)).tolist()]

    def all_gather_text(self, text: str) -> list[str]:
        """Exchange a text of each rank, as bytes of equal number."""
        encoded = text.encode("utf-8")
        lengths = self.all_gather(len(encoded))
        padded = encoded.ljust(max(1, *lengths), b"\0")
        own = torch.tensor(list(padded), dtype=torch.uint8, device=self._device)
        gathered = self._bmt.distributed.all_gather(own).cpu()
        return [bytes(row[:length].tolist()).decode("utf-8") for row, length in zip(gathered, lengths)]

    def any_flag(self, flag: bool) -> bool:
        """Exchange one flag."""
        return float(self._summed(float(flag))) > 0

    def close(self) -> None:
        """Drop the model, if it was built; then, once no rank exchanges anything any more, the communicator."""
        for name in ("_model", "_trained", "_optimizer", "_manager", "_stage"):
            self.__dict__.pop(name, None)
        gc.collect()
        self._bmt.synchronize()
        self._bmt.nccl.commDestroy(self._bmt.config["comm"])

    def _await_copies(self) -> None:
        """Have weights in place: BMTrain gathers them on a stream of its own, which does not wait for copies."""
        torch.cuda.synchronize()

    def _say_what_runs(self) -> None:
        if self._placement.rank > 0:
            return
        training = self._settings.training
        adam = f"{type(self._optimizer.adam).__module__.split('.')[0]} {type(self._optimizer.adam).__name__}"
        note = ""
        if always_recomputes(self._bmt) and training.recompute == "none":
            note = "; this version always recomputes activations, whatever training.recompute says"
        print(f"BMTrain {version()}: ZeRO-{training.zero_stage}, {training.precision}, {adam}{note}", flush=True)

    def _summed_loss(self, batch: Batch) -> Tensor:
        return summed_loss(self._model, batch, self._device)

    def _summed(self, *values: float | Tensor) -> Tensor:
        """Return each value's sum over the ranks, float64 on the device."""
        total: Tensor = self._bmt.distributed.all_reduce(vector(values, self._device), "sum")
        return total

    def _update(self, loss: float, grad_norm: float, lr: float, accept: Accept) -> Update:
        """Apply the gradient unless it overflowed or is refused, and clear it; it stays where blocks expect it."""
        can_halve = self._manager.loss_scale_enabled and self._manager.loss_scale > SMALLEST
        update = decide(can_halve, loss, grad_norm, accept)
        if update != "refused":
            # After an overflow OptimManager halves the scale and leaves the weights alone.
            self._optimizer.set_lr(lr)
            self._manager.step()
            self._optimizer.updates += update == "applied"
        self._manager.zero_grad()
        return update
