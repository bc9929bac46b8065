"""The torch engine: DDP or FSDP2, AdamW, autocast. It runs anywhere and is the reference for the others."""

from __future__ import annotations

import gc
import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ContextManager, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from cpm_cluster.training.engines import StepResult
from cpm_cluster.training.engines.fsdp import shard_model, whole
from cpm_cluster.training.engines.loss_scale import LossScale
from cpm_cluster.training.engines.process_group import announce, choose_device, join_group
from cpm_cluster.training.engines.torch_state import (
    load_generators,
    load_optimizer,
    load_trained,
    read_tensors,
    save_generators,
    save_optimizer,
    save_trained,
)
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.files import write_json
from cpm_cluster.training.lora import attach_lora
from cpm_cluster.training.model import CPM, initialise, load_weights
from cpm_cluster.training.packing import IGNORED, Batch
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
        if settings.deterministic:
            # cuBLAS reads this when it is first used.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        join_group(placement, self._device)

    def build(self) -> None:
        """Make the same weights on every rank, then distribute them."""
        settings = self._settings
        torch.manual_seed(settings.seed)
        self._model = CPM(settings.model, settings.training.recompute == "full")
        initialise(self._model)
        if settings.init_from is not None:
            load_weights(self._model, read_tensors(Path(settings.init_from)), settings.init_from)
        if isinstance(settings.method, LoraTuning):
            attach_lora(self._model, settings.method)
        self._replica: nn.Module = self._distribute()
        self._trained = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = adamw(self._trained, settings.training)
        # From here on randomness (dropout) differs between ranks.
        torch.manual_seed(settings.seed + 1 + self._placement.rank)

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """One optimizer step; losses are weighted so that the mean over ranks is the mean over tokens."""
        targets, tokens = self._sum_over_ranks(
            sum(batch.target_tokens for batch in micro_batches), sum(batch.tokens for batch in micro_batches)
        )
        weight = self._placement.world_size * self._loss_scale.value / targets
        self._replica.train()
        summed = torch.zeros((), device=self._device)
        for number, batch in enumerate(micro_batches, 1):
            with self._gradient_sync(number == len(micro_batches)):
                loss = self._summed_loss(batch)
                (loss * weight).backward()  # type: ignore[no-untyped-call]
            summed += loss.detach()
        (total,) = self._sum_over_ranks(summed.item())
        grad_norm, scale = self._clip(), self._loss_scale.value
        updated = self._update(total / targets, grad_norm, lr)
        return StepResult(total / targets, grad_norm if updated else None, int(tokens), scale)

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """Sum losses and target tokens over batches and ranks, then divide."""
        self._replica.eval()
        summed = 0.0
        with torch.no_grad():
            for batch in batches:
                summed += self._summed_loss(batch).item()
        loss, targets = self._sum_over_ranks(summed, sum(batch.target_tokens for batch in batches))
        return loss / targets

    def next_token_logits(self, ids: Sequence[int]) -> Tensor:
        """Run the last ``seq_len`` ids through the model."""
        self._model.eval()
        recent = torch.tensor([list(ids)[-self._settings.training.seq_len :]], device=self._device)
        positions = torch.arange(recent.shape[1], device=self._device)[None]
        with torch.no_grad(), self._autocast():
            logits: Tensor = self._model(recent, torch.zeros_like(recent), positions)
        return logits[0, -1].float().cpu()

    def save_state(self, directory: Path) -> None:
        """Rank 0 writes weights and optimizer, whole; every rank writes its generators."""
        save_trained(directory / "trained.pt", self._trained)
        save_optimizer(directory / "optimizer.pt", self._trained, self._optimizer)
        save_generators(directory, self._placement.rank, self._device)
        if self._placement.rank == 0:
            write_json(directory / "loss_scale.json", self._loss_scale.as_json())

    def load_state(self, directory: Path) -> None:
        """Every rank reads the whole and keeps its part."""
        load_trained(directory / "trained.pt", self._trained)
        load_optimizer(directory / "optimizer.pt", self._trained, self._optimizer)
        load_generators(directory, self._placement.rank, self._device)
        self._loss_scale.restore(json.loads((directory / "loss_scale.json").read_text(encoding="utf-8")))

    def export_weights(self, directory: Path) -> None:
        """Full tuning: all weights; LoRA: the updates alone."""
        if isinstance(self._settings.method, LoraTuning):
            save_trained(directory / "delta.pt", self._trained)
        else:
            save_trained(directory / "model.pt", dict(self._model.named_parameters()))

    def all_gather(self, value: int) -> list[int]:
        """Exchange one integer."""
        own = torch.tensor([value], dtype=torch.int64, device=self._device)
        values = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(values, own)
        return [int(item) for item in values]

    def any_flag(self, flag: bool) -> bool:
        """Exchange one flag."""
        return self._sum_over_ranks(float(flag))[0] > 0

    def barrier(self) -> None:
        """Wait for all ranks: none returns from an exchange before the last has come."""
        self._sum_over_ranks(0.0)

    def close(self) -> None:
        """Drop the model, then the process group.

        A DDP model that outlives the group destroys it while holding Python's lock, and deadlocks with the
        group's own thread when that is about to release a tensor.
        """
        del self._replica, self._model, self._optimizer, self._trained
        gc.collect()
        dist.destroy_process_group()

    def _distribute(self) -> nn.Module:
        if self._sharded:
            shard_model(self._model, self._device, self._compute_type, self._settings.training.zero_stage == 3)
            return self._model
        self._model.to(self._device)
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
        """Return the sum of the cross entropy over a batch's target tokens, in fp32."""
        with self._autocast():
            logits = self._replica(
                batch.input_ids.to(self._device),
                batch.documents.to(self._device),
                batch.positions.to(self._device),
            )
        targets = batch.targets.to(self._device)
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    def _sum_over_ranks(self, *values: float) -> tuple[float, ...]:
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return tuple(total.tolist())

    def _clip(self) -> float:
        """Undo the loss scale, clip, and return the norm before clipping."""
        parameters = list(self._trained.values())
        if self._loss_scale.enabled:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self._loss_scale.value)
        norm = nn.utils.clip_grad_norm_(parameters, self._settings.training.clip_grad_norm or math.inf)
        return float(whole(norm))

    def _update(self, loss: float, grad_norm: float, lr: float) -> bool:
        """Apply the gradient and clear it; return whether the weights changed."""
        overflowed = not math.isfinite(grad_norm)
        if not math.isfinite(loss) or (overflowed and not self._loss_scale.enabled):
            raise FloatingPointError(f"loss {loss} with gradient norm {grad_norm}: training diverged")
        if not overflowed:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._loss_scale.update(overflowed)
        self._optimizer.zero_grad(set_to_none=True)
        return not overflowed


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
