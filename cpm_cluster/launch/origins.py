"""Who set a key of the job."""

from __future__ import annotations

from cpm_cluster.specs.job import JobSpec


def set_by(spec: JobSpec, key: str) -> str:
    """Who wrote a dotted key, or the nearest written thing above it; `default` where nobody did."""
    parts = key.split(".")
    while parts:
        origin = spec.origins.get(".".join(parts))
        if origin is not None:
            return origin.set_by
        parts.pop()
    return "default"
