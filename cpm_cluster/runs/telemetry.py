"""What the agents measured while the ranks ran: telemetry/<node>.jsonl. Standard library only: the agent uses it, too.

A line a sample, {time, kind: "sample", attempt, shm, gpus, ranks, rss_bytes, cgroup, disk, environment_differs, unread,
peaks}: what the functions of `agent/telemetry.py` measure. What could not be read is null, and `unread` says why.
`peaks` are those of the run on this node so far, so that the last line is enough to tell them. Once an attempt there is
a line {time, kind: "nccl_environment", attempt, ranks, differs}: see `agent/nccl_environment.py`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Mapping

# Longer than any sample of a node of 16 GPUs and 16 ranks, with the record of its environment.
TAIL_BYTES = 1 << 16


def run_telemetry(folder: Path) -> dict[str, Any] | None:
    """The summary of a run's telemetry folder; None without a sample."""
    samples = {path.stem: last_sample(path) for path in sorted(folder.glob("*.jsonl"))}
    return summary({node: sample for node, sample in samples.items() if sample is not None})


def last_sample(path: Path) -> dict[str, Any] | None:
    """The last whole sample in a file, whatever the length of it; None where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    return next((sample for sample in map(_sample, reversed(lines)) if sample is not None), None)


def raised(peaks: Mapping[str, Any], sample: Mapping[str, Any]) -> dict[str, Any]:
    """The peaks after one more sample: {shm, gpus: by uuid, rss_bytes, ecc_uncorrected}, each where it is known."""
    found = dict(peaks)
    shm = sample.get("shm")
    if shm and shm["used_bytes"] >= found.get("shm", {}).get("used_bytes", 0):
        found["shm"] = {name: shm[name] for name in ("used_bytes", "size_bytes")}
    found["rss_bytes"] = max(found.get("rss_bytes", 0), sample.get("rss_bytes") or 0)
    gpus = dict(found.get("gpus", {}))
    for gpu in sample.get("gpus") or ():
        used, before = gpu["memory_used_mib"], gpus.get(gpu["uuid"], {}).get("used_mib", 0)
        if used is not None and used >= before:
            gpus[gpu["uuid"]] = {"used_mib": used, "total_mib": gpu["memory_total_mib"]}
        if gpu["ecc_uncorrected"]:
            found["ecc_uncorrected"] = max(found.get("ecc_uncorrected", 0), gpu["ecc_uncorrected"])
    return {**found, "gpus": gpus} if gpus else found


def summary(samples: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The peaks of a run, from the last sample of each node; None without any.

    `shm`, `gpu` and `host` are those of the node, or GPU, that came nearest to its end: {node, …}. `gpus` are all:
    node, uuid, used_mib, total_mib. Then the sums of oom_kills and ecc_uncorrected, and the variables of NCCL that
    are not as they should be.
    """
    if not samples:
        return None
    peaks = {node: sample.get("peaks", {}) for node, sample in samples.items()}
    shms = [{"node": node, **peak["shm"]} for node, peak in peaks.items() if "shm" in peak]
    gpus = [{"node": node, "uuid": uuid, **gpu} for node, p in peaks.items() for uuid, gpu in p.get("gpus", {}).items()]
    hosts = [{"node": node, "rss_bytes": peak["rss_bytes"]} for node, peak in peaks.items() if peak.get("rss_bytes")]
    differs = {name for sample in samples.values() for name in sample.get("environment_differs", ())}
    return {
        "time": max(sample["time"] for sample in samples.values()),
        "shm": max(shms, key=lambda shm: shm["used_bytes"] / (shm["size_bytes"] or 1), default=None),
        "gpu": max(gpus, key=lambda gpu: gpu["used_mib"] / (gpu["total_mib"] or 1), default=None),
        "gpus": gpus,
        "host": max(hosts, key=lambda host: host["rss_bytes"], default=None),
        "oom_kills": sum(peak.get("oom_kills", 0) for peak in peaks.values()),
        "ecc_uncorrected": sum(peak.get("ecc_uncorrected", 0) for peak in peaks.values()),
        "environment_differs": sorted(differs),
    }


def _sample(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.get("kind") == "sample" else None
