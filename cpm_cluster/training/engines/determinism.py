"""Deterministic mode: the same bits from the same seed, data, ranks, hardware and libraries."""

from __future__ import annotations

import os

import torch


def compute_deterministically() -> None:
    """Have torch take deterministic kernels, or raise RuntimeError in an operation that has none.

    Call it before the first CUDA operation. That autotuning is off matters as much: a faster algorithm sums in another
    order. Not covered: NCCL chooses its own order of summation where the network between the nodes changes.
    """
    # cuBLAS reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
