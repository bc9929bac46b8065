"""JSON Schema of what people write, for editors."""

from __future__ import annotations

from typing import Any

from cpm_cluster.specs.cluster import Cluster
from cpm_cluster.specs.fields import Section
from cpm_cluster.specs.gpu import Gpu
from cpm_cluster.specs.image import Image
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.model import Model
from cpm_cluster.specs.profile import Profile

KINDS: dict[str, type[Any]] = {
    "job": JobSpec,
    "profile": Profile,
    "cluster": Cluster,
    "model": Model,
    "image": Image,
    "gpu": Gpu,
}


def json_schema(kind: str) -> dict[str, Any]:
    """The schema (draft 2020-12) of one kind of file; `gpu` describes gpus.yaml as a whole."""
    schema = Section(KINDS[kind]).schema()
    if kind == "gpu":
        schema = {"type": "object", "additionalProperties": schema}
    if kind == "job":
        # the profile brings the resources; the cluster is detected where it is left out
        schema["required"] = ["name"]
        schema["properties"]["resources"].pop("required", None)
        schema["properties"]["resources"]["type"] = ["object", "null"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"cpm-cluster {kind} file"}
    return head | schema
