"""Tests on a GPU, marked `gpu`, and the same ways with as little as a CPU can do, so that they run at once on a GPU.

.venv/bin/python -m pytest -m gpu
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "benchmarks")]


def pytest_runtest_setup(item):
    """Skip what needs a GPU where torch sees none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def place(request):
    """Where a test computes."""
    return request.param
