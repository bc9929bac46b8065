"""What the tests of the trainer are given."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# The ranks inherit these: one thread each, and this folder, where training_ranks and tiny_runs lie.
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

from tiny_runs import TINY, TinyRun, changed, source  # noqa: E402 - after the path

from cpm_cluster.training.settings_file import parse_settings  # noqa: E402


@pytest.fixture
def tiny_run(tmp_path):
    """Make runs: ``tiny_run("name", **{"training.steps": 3})``."""
    return lambda name="run", **changes: TinyRun(tmp_path / name, changes)


@pytest.fixture
def tiny_settings():
    """Return parsed tiny settings with dotted keys changed."""
    return lambda **changes: parse_settings(changed(TINY, {"data.train": [source("some.jsonl")], **changes}))


@pytest.fixture
def tiny_json():
    """Return tiny settings as raw JSON with dotted keys changed."""
    return lambda **changes: changed(TINY, {"data.train": [source("some.jsonl")], **changes})
