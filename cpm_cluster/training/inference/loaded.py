"""A model for reading alone, for evaluation and generation: whole on every rank, or sharded over the ranks (FSDP2).

Weights have the compute precision and are read without a copy of the whole in memory, so that a model of 100B
parameters needs 200 GB, spread over the ranks, and little on the host.
"""

from __future__ import annotations

import gc
from typing import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from cpm_cluster.training.attempt import attempt, write_outcome
from cpm_cluster.training.data.packing import IGNORED, Batch
from cpm_cluster.training.engines.determinism import compute_deterministically
from cpm_cluster.training.engines.fsdp import shard_model
from cpm_cluster.training.engines.initial_weights import fill, open_initial_weights
from cpm_cluster.training.engines.process_group import announce, choose_device, gather, join_group
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.model.attention import KeyValueCache, open_kernel, segments_of
from cpm_cluster.training.model.decoder import CPM
from cpm_cluster.training.model.layers import UninitialisedLayers
from cpm_cluster.training.model.lora import attach_lora
from cpm_cluster.training.placement import Placement, confirm_world
from cpm_cluster.training.reporting.heartbeat import Heartbeat
from cpm_cluster.training.reporting.progress import Progress
from cpm_cluster.training.settings import LoraTuning, Settings
from cpm_cluster.training.stop import StopRequest

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Inference:
    """The ranks, and on each the model or its shard. All methods but ``close`` are collective if ``sharded``."""

    def __init__(self, settings: Settings, placement: Placement) -> None:
        """Join the ranks; raises UserError for settings that only training has a use for."""
        _require_inference(settings)
        self.placement, self.rank, self.world_size = placement, placement.rank, placement.world_size
        self.sharded = settings.training.zero_stage > 0
        self.device = choose_device(placement)
        announce(placement, self.device)
        self._settings, self._type = settings, _TYPES[settings.training.precision]
        if self._type == torch.float16 and self.device.type == "cpu":
            raise UserError("precision fp16 needs a GPU and torch sees none; use bf16 or fp32")
        if settings.deterministic:
            compute_deterministically()
        join_group(placement, self.device)

    def build(self) -> None:
        """Read the weights of ``init_from``, and those of ``adapter``; raises UserError when they do not fit.

        LoRA layers stay beside the base, which is read as it lies there.
        """
        settings = self._settings
        kernel = open_kernel(settings, self.rank, self.device, self._type)
        model = CPM(settings.model, make=UninitialisedLayers(self._type), kernel=kernel)
        if isinstance(settings.method, LoraTuning):
            attach_lora(model, settings.method)
            model.to(self._type)
        weights = open_initial_weights(model, settings)
        model.requires_grad_(False)
        if self.sharded:
            shard_model(model, self.device, None, settings.training.zero_stage == 3)
        model.to_empty(device=self.device)
        fill(model, weights, settings)
        self._model = model.eval()

    def continue_cache(self, input_ids: Tensor, documents: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the logits [B, 1, vocab] of the last of the tokens [B, Q] that continue the cache."""
        with torch.no_grad():
            logits: Tensor = self._model(input_ids, documents, positions, cache=cache)
        return logits

    def token_losses(self, batch: Batch) -> Tensor:
        """Return -log p of each target [B, T] in nats, fp32 on the CPU, 0 where there is none."""
        here = [tensor.to(self.device) for tensor in (batch.input_ids, batch.documents, batch.positions)]
        with torch.no_grad():
            logits = self._model(*here, segments_of(batch.documents))
        targets = batch.targets.to(self.device)
        losses = [
            functional.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none")
            for row, target in zip(logits, targets)
        ]
        return torch.stack(losses).cpu()

    def summed(self, values: Tensor) -> Tensor:
        """Return the sums of the values (float64) over the ranks. Collective."""
        total = values.to(self.device, torch.float64)
        dist.all_reduce(total)
        return total.cpu()

    def from_rank_0(self, values: Sequence[bool]) -> list[bool]:
        """Return rank 0's values, equally many on each rank. Collective."""
        theirs = torch.tensor(list(values), dtype=torch.uint8, device=self.device)
        if len(values):
            dist.broadcast(theirs, 0)
        return [bool(value) for value in theirs.tolist()]

    def all_gather(self, value: int) -> list[int]:
        """Return every rank's value, in the order of ranks. Collective."""
        return [int(item) for item in gather(torch.tensor([value], dtype=torch.int64, device=self.device))]

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. Collective."""
        return bool(self.summed(torch.tensor([float(flag)]))[0] > 0)

    def close(self) -> None:
        """Drop the model, if it was built, then leave the group."""
        self.__dict__.pop("_model", None)
        gc.collect()
        dist.destroy_process_group()


def _require_inference(settings: Settings) -> None:
    if settings.engine != "torch":
        raise UserError(f"task {settings.task} runs on engine torch, not on {settings.engine}; write engine: torch")
    if isinstance(settings.method, LoraTuning) and settings.adapter is None:
        raise UserError(f"method.lora.init_from: task {settings.task} needs the trained updates; or write method: full")
    if settings.init_from is None:
        raise UserError(f"init_from: task {settings.task} needs trained weights")


# What a task does with a model; it ends with "finished" or "stopped". The last argument notes how far it has come.
Work = Callable[[Settings, Inference, StopRequest, "Advance"], str]


class Advance:
    """Tells the live display and the heartbeat how many of how many things are done."""

    def __init__(self, phase: str, progress: Progress, heartbeat: Heartbeat) -> None:
        self._phase, self._progress, self._heartbeat = phase, progress, heartbeat
        self.done = self.of = 0

    def begin(self, done: int, of: int) -> None:
        """Begin, or go on with, ``of`` things of which some are done."""
        self.of = of
        self._progress.enter(self._phase, steps=of)
        self.note(done)

    def note(self, done: int, **values: object) -> None:
        """Note how many are done."""
        self.done = done
        self._progress.note(step=done, **values)
        self._heartbeat.enter("compute", done)

    def alive(self) -> None:
        """Note that reading the data goes on."""
        self._heartbeat.enter("data", self.done)


def run_inference(
    settings: Settings, placement: Placement, settings_text: bytes, phase: str, unit: str, work: Work
) -> str:
    """Do a task on this rank and return its outcome; ``unit`` is what the steps of ``progress.json`` count."""
    with attempt(settings, placement, steps=0) as begun:
        inference = Inference(settings, placement)
        confirm_world(inference.all_gather, placement, settings.expected_world_size, settings_text)
        advance = Advance(phase, begun.progress, begun.heartbeat)
        outcome = work(settings, inference, begun.stop, advance)
        inference.close()
        if placement.rank == 0:
            write_outcome(begun.output_dir, outcome, advance.done)
            print(f"{outcome} after {advance.done} of {advance.of} {unit}", flush=True)
        begun.progress.enter("done" if outcome == "finished" else "stopped")
        begun.heartbeat.close(outcome)
        return outcome
