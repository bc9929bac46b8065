"""What a run was made with: software, machine and code, so that it can be made again."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import distributions
from typing import Any

import cpm_cluster
from cpm_cluster.runs.snapshot import Snapshot


def provenance(code: Snapshot | None) -> dict[str, Any]:
    """Facts of the submitting machine. Environment variables are left out: they may hold secrets."""
    return {
        "cpm_cluster": cpm_cluster.__version__,
        "submitted_at": time.time(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": dict(sorted(_packages())),
        "code": asdict(code) if code else None,
    }


def _packages() -> Iterator[tuple[str, str]]:
    """Names and versions; what pip left of a broken installation has neither."""
    for distribution in distributions():
        stated = distribution.metadata
        if "Name" in stated and "Version" in stated:
            yield stated["Name"], stated["Version"]
