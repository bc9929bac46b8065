"""Who set a key of the job or of its cluster."""

from __future__ import annotations

from cpm_cluster.specs.job import JobSpec


def set_by(spec: JobSpec, key: str) -> str:
    """Who wrote a dotted key, and where: `job (lora.yaml:14:9)`; `default` where nobody did."""
    origin = spec.origins.get(key)
    return str(origin) if origin else "default"
