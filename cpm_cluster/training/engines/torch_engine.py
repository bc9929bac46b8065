"""The torch engine: DDP or FSDP2, AdamW, autocast. It runs anywhere and is the reference for the others."""

from __future__ import annotations

import gc
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Callable, ContextManager, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cpm_cluster.training.data.packing import Batch
from cpm_cluster.training.engines import Accept, StepResult, Update
from cpm_cluster.training.engines.determinism import compute_deterministically
from cpm_cluster.training.engines.forward_clock import ForwardClock
from cpm_cluster.training.engines.fsdp import shard_model, shards_mixed_types, whole
from cpm_cluster.training.engines.initial_weights import InitialWeights, fill, open_initial_weights
from cpm_cluster.training.engines.loss_scale import LossScale
from cpm_cluster.training.engines.passes import decide, last_logits, mean_loss, summed_loss, vector
from cpm_cluster.training.engines.process_group import announce, choose_device, gather, join_group
from cpm_cluster.training.engines.sharded_state import Stager, require_dcp
from cpm_cluster.training.engines.torch_state import (
    StagedTraining,
    load_generators,
    load_loss_scale,
    load_training_tensors,
    save_trained,
    training_tensors,
)
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.model.attention import open_kernel
from cpm_cluster.training.model.decoder import CPM
from cpm_cluster.training.model.layers import UninitialisedLayers
from cpm_cluster.training.model.lora import attach_lora
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import LoraTuning, Settings, TrainingSettings

_COMPUTE_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """See :class:`cpm_cluster.training.engines.Engine`."""

    def __init__(self, settings: Settings, placement: Placement) -> None:
        """Choose the device and join the process group.

        Raises UserError for fp16 on a CPU and for a rank without a GPU.
        """
        self._settings = settings
        self._placement = placement
        self._sharded = settings.training.zero_stage > 0
        self._device = choose_device(placement)
        announce(placement, self._device)
        self._compute_type = _COMPUTE_TYPES[settings.training.precision]
        self._loss_scale = LossScale(settings.training.precision == "fp16")
        if self._loss_scale.enabled and self._device.type == "cpu":
            raise UserError("precision fp16 needs a GPU and torch sees none; use bf16 or fp32")
        require_dcp()
        if settings.deterministic:
            compute_deterministically()
        join_group(placement, self._device)

    def build(self) -> None:
        """Make the model without memory, distribute it, then give each rank its weights."""
        settings = self._settings
        compute_type = self._compute_type or torch.float32
        kernel = open_kernel(settings, self._placement.rank, self._device, compute_type)
        layers = UninitialisedLayers(torch.float32, self._linear_type())
        self._model = CPM(settings.model, settings.training.recompute == "full", layers, kernel)
        if isinstance(settings.method, LoraTuning):
            attach_lora(self._model, settings.method)
        weights = open_initial_weights(self._model, settings)
        self._forward_clock = ForwardClock(self._model.encoder.layers, self._device)
        self._replica: nn.Module = self._distribute(weights)
        self._trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = adamw(self._trained, settings.training)
        self._stager = Stager()
        # From here on randomness (dropout) differs between ranks.
        torch.manual_seed(settings.seed + 1 + self._placement.rank)

    def train_step(
        self, micro_batches: Sequence[Batch], lr: float, accept: Accept, wants_to_stop: Callable[[], bool]
    ) -> StepResult:
        """One optimizer step; losses are weighted so that the mean over ranks is the mean over tokens.

        Two exchanges beside the gradient's, and one wait for the GPU: when loss and norm are looked at.
        """
        counts = self._summed(
            sum(batch.target_tokens for batch in micro_batches), sum(batch.tokens for batch in micro_batches)
        )
        scale = self._loss_scale.value
        weight = (self._placement.world_size * scale / counts[0]).float()
        self._replica.train()
        own_loss = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, batch in enumerate(micro_batches, 1):
            with self._gradient_sync(number == len(micro_batches)):
                with self._forward_clock if number == 1 else nullcontext():
                    loss = self._summed_loss(batch)
                (loss * weight).backward()  # type: ignore[no-untyped-call]
            own_loss += loss.detach()
        norm = self._clip()
        sums = self._summed(own_loss, float(wants_to_stop()))
        targets, tokens, total, stop, grad_norm = torch.cat((counts, sums, norm.double().reshape(1))).tolist()
        update = self._update(total / targets, grad_norm, lr, accept)
        seconds = self._forward_clock.seconds()
        return StepResult(total / targets, grad_norm, int(tokens), scale, update, stop > 0, seconds)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Sum losses and target tokens over batches and ranks, then divide."""
        self._replica.eval()
        return mean_loss(batches, self._summed_loss, self._summed, self._device)

    def next_token_logits(self, ids: Sequence[int]) -> Tensor:
        """Run the last ``seq_len`` ids through the model."""
        self._model.eval()
        with self._autocast():
            return last_logits(self._model, ids, self._settings.training.seq_len, self._device)

    def stage_state(self, directory: Path) -> StagedTraining:
        """Copy what this rank is to write."""
        tensors = self._stager.stage(training_tensors(self._trained, self._optimizer))
        return StagedTraining(directory, self._placement.rank, tensors, self._device, self._loss_scale.as_json())

    def load_state(self, directory: Path) -> None:
        """Every rank reads its part of the tensors."""
        load_training_tensors(directory, self._trained, self._optimizer)
        load_generators(directory, self._placement.rank, self._device)
        self._loss_scale.restore(load_loss_scale(directory))

    def export_weights(self, directory: Path) -> None:
        """Full tuning: all weights; LoRA: the updates alone."""
        self._stager = Stager()
        if isinstance(self._settings.method, LoraTuning):
            save_trained(directory / "delta.pt", self._trained)
        else:
            save_trained(directory / "model.pt", dict(self._model.named_parameters()))

    def all_gather(self, value: int) -> list[int]:
        """Exchange one integer."""
        return [int(item) for item in gather(torch.tensor([value], dtype=torch.int64, device=self._device))]

    def exchange(self, values: Sequence[float]) -> list[tuple[float, ...]]:
        """Exchange some numbers."""
        if self._placement.world_size == 1:
            return [tuple(values)]
        return [tuple(of_rank.tolist()) for of_rank in gather(vector(values, self._device))]

    def all_gather_text(self, text: str) -> list[str]:
        """Exchange a text of each rank."""
        texts = [""] * dist.get_world_size()
        dist.all_gather_object(texts, text)
        return texts

    def any_flag(self, flag: bool) -> bool:
        """Exchange one flag."""
        return float(self._summed(float(flag))) > 0

    def close(self) -> None:
        """Drop the model, if it was built, then the process group.

        A DDP model that outlives the group destroys it while holding Python's lock, and deadlocks with the
        group's own thread when that is about to release a tensor.
        """
        for name in ("_replica", "_model", "_optimizer", "_trained", "_stager"):
            self.__dict__.pop(name, None)
        gc.collect()
        dist.destroy_process_group()

    def _linear_type(self) -> torch.dtype:
        """Frozen matrices have the compute type: they would be cast to it at each use, and it is half the memory."""
        frozen = isinstance(self._settings.method, LoraTuning)
        if frozen and self._compute_type is not None and (not self._sharded or shards_mixed_types()):
            return self._compute_type
        return torch.float32

    def _distribute(self, weights: InitialWeights) -> nn.Module:
        if self._sharded:
            shard_model(self._model, self._device, self._compute_type, self._settings.training.zero_stage == 3)
        self._model.to_empty(device=self._device)
        fill(self._model, weights, self._settings)
        if self._sharded or self._placement.world_size == 1:
            return self._model
        devices = [self._device] if self._device.type == "cuda" else None
        return DistributedDataParallel(self._model, device_ids=devices, gradient_as_bucket_view=True)

    def _gradient_sync(self, last: bool) -> ContextManager[Any]:
        """Let DDP reduce once a step; FSDP2 reduces every micro batch, so that gradients stay sharded."""
        if isinstance(self._replica, DistributedDataParallel) and not last:
            return self._replica.no_sync()
        return nullcontext()

    def _autocast(self) -> ContextManager[Any]:
        if self._compute_type is None or self._sharded:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._compute_type)

    def _summed_loss(self, batch: Batch) -> Tensor:
        with self._autocast():
            return summed_loss(self._replica, batch, self._device)

    def _summed(self, *values: float | Tensor) -> Tensor:
        """Return each value's sum over the ranks, float64 on the device."""
        total = vector(values, self._device)
        if self._placement.world_size > 1:
            dist.all_reduce(total)
        return total

    def _clip(self) -> Tensor:
        """Undo the loss scale, clip, and return the norm before clipping."""
        parameters = list(self._trained.values())
        if self._loss_scale.enabled:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self._loss_scale.value)
        norm = nn.utils.clip_grad_norm_(parameters, self._settings.training.clip_grad_norm or math.inf)
        return whole(norm)

    def _update(self, loss: float, grad_norm: float, lr: float, accept: Accept) -> Update:
        """Apply the gradient unless it overflowed or is refused, and clear it."""
        update = decide(self._loss_scale.can_halve, loss, grad_norm, accept)
        if update == "applied":
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        if update != "refused":
            self._loss_scale.update(overflowed=update == "overflow")
        self._optimizer.zero_grad(set_to_none=True)
        return update


def adamw(trained: dict[str, nn.Parameter], training: TrainingSettings) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) with decoupled decay on matrices and none on norms."""
    decayed = [p for p in trained.values() if p.dim() > 1]
    plain = [p for p in trained.values() if p.dim() <= 1]
    groups = [
        {"params": decayed, "weight_decay": training.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=training.lr, betas=training.betas, eps=training.eps
    )
