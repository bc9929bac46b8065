"""The composed job as YAML: what a run was, after profile, cluster, model and image were filled in."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from cpm_cluster.specs.job import JobSpec

_NOT_WRITTEN = ("origins", "warnings")


def resolved_yaml(spec: JobSpec) -> str:
    """All values, sizes in bytes and times in seconds, as the names of the keys say."""
    values = {key: value for key, value in dataclasses.asdict(spec).items() if key not in _NOT_WRITTEN}
    return yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
