"""What the engines do alike, however their models are distributed: losses, logits, what becomes of a step."""

from __future__ import annotations

import math
from typing import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from cpm_cluster.training.data.packing import IGNORED, Batch
from cpm_cluster.training.engines import Accept, Update
from cpm_cluster.training.model.attention import segments_of


def summed_loss(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the sum of the cross entropy over a batch's target tokens, in fp32."""
    logits = model(
        _there(batch.input_ids, device),
        _there(batch.documents, device),
        _there(batch.positions, device),
        segments_of(batch.documents),
    )
    targets = _there(batch.targets, device)
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def mean_loss(
    batches: Iterable[Batch],
    loss_of: Callable[[Batch], Tensor],
    summed: Callable[..., Tensor],
    device: torch.device,
) -> float:
    """Return the loss per target token over all ranks' batches; ``loss_of`` sums one's, ``summed`` over the ranks."""
    total, targets = torch.zeros((), dtype=torch.float64, device=device), 0
    with torch.no_grad():
        for batch in batches:
            total += loss_of(batch)
            targets += batch.target_tokens
    loss, count = summed(total, targets).tolist()
    return float(loss / count)


def last_logits(model: nn.Module, ids: Sequence[int], seq_len: int, device: torch.device) -> Tensor:
    """Return the logits [vocab] (fp32, on the CPU) after the last ``seq_len`` of the ids."""
    recent = torch.tensor([list(ids)[-seq_len:]], device=device)
    positions = torch.arange(recent.shape[1], device=device)[None]
    with torch.no_grad():
        logits: Tensor = model(recent, torch.zeros_like(recent), positions)
    return logits[0, -1].float().cpu()


def vector(values: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Return the values in a row, float64 on the device; to copy a number there would wait for what that computes."""
    row = torch.zeros(len(values), dtype=torch.float64, device=device)
    for number, value in enumerate(values):
        row[number] = value
    return row


def decide(can_halve: bool, loss: float, grad_norm: float, accept: Accept) -> Update:
    """Say what to do with a step.

    An overflow is no reason to ask while halving the loss scale may cure it, which it cannot for the loss.
    """
    if can_halve and math.isfinite(loss) and not math.isfinite(grad_norm):
        return "overflow"
    return "applied" if accept(loss, grad_norm) else "refused"


def _there(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a batch's tensor on the device; the copy to a GPU does not wait for what that computes."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
