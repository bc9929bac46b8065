"""Runs made of records alone."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))

from made_runs import made_run  # noqa: F401
