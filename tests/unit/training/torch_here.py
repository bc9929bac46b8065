"""What the torch at hand lacks: 1.13, which the cpmlive-flash image has, knows neither DCP, FSDP2 nor SDPA."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.fsdp
from torch.nn import functional

from cpm_cluster.training.engines.sharded_state import require_dcp
from cpm_cluster.training.errors import UserError


def _refusal() -> str:
    """Why the trainer does not train with engine torch here; empty where it does."""
    try:
        require_dcp()
    except UserError as error:
        return str(error)
    return ""


def _has_varlen() -> bool:
    try:
        from torch.nn.attention import varlen  # noqa: F401
    except ImportError:
        return False
    return True


DCP_REFUSAL = _refusal()
SHARDS = hasattr(torch.distributed.fsdp, "fully_shard")
HAS_VARLEN = _has_varlen()
HAS_SDPA = hasattr(functional, "scaled_dot_product_attention")

needs_torch_engine = pytest.mark.skipif(bool(DCP_REFUSAL), reason=DCP_REFUSAL or "-")


def require_torch_for(settings: dict) -> None:
    """Skip a test with a run that is refused for the age of torch alone."""
    if settings["engine"] != "torch":
        return
    if DCP_REFUSAL and settings["task"] in ("finetune", "pretrain"):
        pytest.skip(DCP_REFUSAL)
    if not SHARDS and settings["training"]["zero_stage"] > 0:
        pytest.skip(f"torch {torch.__version__} has no FSDP2")
