"""Adam on a rank's parts of the parameters, and its state in units that do not depend on how it is kept.

BMTrain keeps the moments of fp16 in units of the scaled loss (``AdamOptimizer``) or of the loss (in host memory:
``AdamOffloadOptimizer``). Here they are in units of the loss, so that a run may be continued with the other.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping

import torch
from torch import Tensor, nn

from cpm_cluster.training.engines.bmtrain_layers import Part
from cpm_cluster.training.engines.bmtrain_versions import Package
from cpm_cluster.training.errors import UserError
from cpm_cluster.training.settings import TrainingSettings

_MASTER = "_param_fp32"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class PartOptimizer:
    """BMTrain's Adam, or torch's AdamW for fp32, where BMTrain's would decay weights as L2 regularisation does."""

    def __init__(self, bmt: Package, parts: Mapping[str, Part], training: TrainingSettings) -> None:
        """Make it for trained parts; raises UserError for fp32 on the host."""
        groups: list[dict[str, Any]] = [
            {"params": [part.parameter for part in parts.values() if len(part.shape) > 1]},
            {"params": [part.parameter for part in parts.values() if len(part.shape) <= 1], "weight_decay": 0.0},
        ]
        self.adam: Any = _adam(bmt, training)(
            [group for group in groups if group["params"]],
            lr=training.lr,
            betas=training.betas,
            eps=training.eps,
            weight_decay=training.weight_decay,
        )
        self.updates = 0
        self._parts = parts
        self._offloads = training.offload_optimizer
        self._scaled = training.precision == "fp16" and not training.offload_optimizer

    def set_lr(self, lr: float) -> None:
        """Use this learning rate from now on."""
        for group in self.adam.param_groups:
            group["lr"] = lr

    def state(self, loss_scale: float) -> Iterator[tuple[str, Tensor]]:
        """Yield ``NAME/weight`` and ``NAME/MOMENT`` of every part, fp32 and flat, wherever they are kept.

        Moments that are not there yet are zero.
        """
        for name, part in self._parts.items():
            parameter = part.parameter.detach()
            kept = self.adam.state.get(part.parameter, {})
            yield f"{name}/weight", kept.get(_MASTER, parameter).float()
            for key in _MOMENTS:
                moment = kept[key].float() if key in kept else torch.zeros_like(parameter, dtype=torch.float32)
                yield f"{name}/{key}", moment / loss_scale if self._scaled else moment

    def restore(self, name: str, state: Mapping[str, Tensor], loss_scale: float) -> None:
        """Take over, with its memory, what :meth:`state` yielded for one part; ``updates`` must be right already."""
        parameter = self._parts[name].parameter
        parameter.detach().copy_(state["weight"])
        self.adam.state.pop(parameter, None)
        if self.updates == 0 or parameter.numel() == 0:
            return
        self.adam.state[parameter] = self._as_kept(parameter, state, loss_scale if self._scaled else 1.0)

    def _as_kept(self, parameter: nn.Parameter, state: Mapping[str, Tensor], unit: float) -> dict[str, Any]:
        where = torch.device("cpu") if self._offloads else parameter.device
        first, second = (state[key].mul(unit).to(where) for key in _MOMENTS)
        if parameter.dtype == torch.float32:
            return {"step": torch.tensor(float(self.updates)), "exp_avg": first, "exp_avg_sq": second}
        kept = {
            "step": self.updates,
            "exp_avg": first.half() if self._scaled else first,
            "exp_avg_sq": second,
            _MASTER: state["weight"].to(where),
        }
        if self._offloads:
            for key in ("_param_fp16", "_grad_fp16"):  # where transfers to and from the GPU land, bf16 ones, too
                kept[key] = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=True)
        return kept


def _adam(bmt: Package, training: TrainingSettings) -> Any:
    if training.precision != "fp32":
        return bmt.optim.AdamOffloadOptimizer if training.offload_optimizer else bmt.optim.AdamOptimizer
    if training.offload_optimizer:
        raise UserError("training.offload_optimizer: BMTrain does it for fp16 and bf16; use one, or turn it off")
    return torch.optim.AdamW
