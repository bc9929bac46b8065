"""One line on what a run has used at most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cpm_cluster.specs.values import format_size


def peaks_line(telemetry: dict[str, Any]) -> str:
    """`peak: shm 307.2 MiB of 4 GiB · GPU 61 GiB of 79.3 GiB · host 12 GiB`, then what is wrong, if anything is."""
    return " · ".join(("peak: " + " · ".join(_peaks(telemetry)), *_troubles(telemetry)))


def _peaks(telemetry: dict[str, Any]) -> Iterator[str]:
    shm, gpu, host = telemetry["shm"], telemetry["gpu"], telemetry["host"]
    if shm:
        yield f"shm {format_size(shm['used_bytes'])} of {format_size(shm['size_bytes'])}"
    if gpu:
        yield f"GPU {format_size(int(gpu['used_mib']) << 20)} of {format_size(int(gpu['total_mib'] or 0) << 20)}"
    yield f"host {format_size(host['rss_bytes'])}" if host else "host not measured"


def _troubles(telemetry: dict[str, Any]) -> Iterator[str]:
    kills, errors, differs = (telemetry[key] for key in ("oom_kills", "ecc_uncorrected", "environment_differs"))
    if kills:
        yield f"{kills} {'process' if kills == 1 else 'processes'} killed for want of memory"
    if errors:
        yield f"{errors} uncorrected ECC {'error' if errors == 1 else 'errors'}"
    if differs:
        yield f"environment of the ranks is not as planned: {', '.join(differs)}"
