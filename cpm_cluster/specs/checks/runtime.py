"""Which of the cluster's runtimes can run the job."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.specs.checks.rules import Finding, reads
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.problems import listed
from cpm_cluster.specs.values import version_tuple

CONTAINER_RUNTIMES = ("docker-rootless", "docker", "podman", "pyxis")
ROOTLESS_HOST_NETWORK_SINCE = (29, 5)  # moby#47103


@reads("runtime", "image", "resources", "cluster")
def _runtime(spec: JobSpec) -> Iterator[Finding]:
    offered, asked = spec.cluster.runtimes, spec.runtime
    fitting = [name for name in offered if runtime_obstacle(spec, name) is None]
    if asked is not None and asked not in offered:
        others = "; the job names no cluster: name the one that is meant" if _is_detected(spec) else ""
        yield "runtime", f"{asked} is not offered by {spec.cluster_name}, which has {listed(offered)}{others}"
    elif asked is not None and asked not in fitting:
        others = f"write {listed(fitting)}" if fitting else f"no other runtime of {spec.cluster_name} can run it either"
        yield "runtime", f"{asked} cannot run this job: it {runtime_obstacle(spec, asked)}; {others}"
    elif spec.image is None and not fitting and all(name in CONTAINER_RUNTIMES for name in offered):
        what = f"is missing: {spec.cluster_name} runs jobs in containers ({listed(offered)})"
        yield "image", f"{what}; name one in configs/images"
    elif spec.image is not None and not fitting and not any(name in CONTAINER_RUNTIMES for name in offered):
        what = f"{spec.image.tag} needs a container runtime, but cluster {spec.cluster_name} has {listed(offered)}"
        yield "image", f"{what}; leave the image out, or name another cluster"
    elif not fitting:
        reasons = "; ".join(f"{name} {runtime_obstacle(spec, name)}" for name in offered)
        yield "runtime", f"no runtime of {spec.cluster_name} can run this job: {reasons}"


def _is_detected(spec: JobSpec) -> bool:
    origin = spec.origins.get("cluster")
    return origin is not None and origin.set_by == "detected"


def runtime_obstacle(spec: JobSpec, runtime: str) -> str | None:
    """Why this job cannot use a runtime of its cluster; None where it can."""
    if runtime in CONTAINER_RUNTIMES and spec.image is None:
        return "needs an image"
    if runtime not in CONTAINER_RUNTIMES and spec.image is not None:
        return f"cannot run the image {spec.image.tag}"
    version = spec.cluster.runtimes[runtime].version
    old_docker = version_tuple(version)[:2] < ROOTLESS_HOST_NETWORK_SINCE
    if runtime == "docker-rootless" and spec.resources.nodes > 1 and old_docker:
        return (
            f"has no host network in Docker {version or 'before 29.5, which this may be'}"
            " (29.5 is the first, moby#47103), so that ranks on several nodes cannot reach each other"
        )
    if runtime == "conda" and spec.cluster.runtimes[runtime].environment is None:
        return "has no environment in the cluster file"
    return None
