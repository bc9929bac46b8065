"""The container of a job: image, shared memory, and what is mounted where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from cpm_cluster.launch.origins import set_by
from cpm_cluster.launch.plan import Archive, Container, Mount
from cpm_cluster.planner.shared_memory import shared_memory
from cpm_cluster.specs.checks.container import HIDDEN_BY_MOUNTS
from cpm_cluster.specs.checks.runtime import ROOTLESS_HOST_NETWORK_SINCE
from cpm_cluster.specs.image import Image
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.values import version_tuple

_OF_THE_IMAGE = HIDDEN_BY_MOUNTS | {"/home", "/root", "/tmp"}


def container(spec: JobSpec, image: Image, runtime: str, run_dir: str, user: str) -> Container:
    """What the runtime is told; `user` is `uid:gid` of who submits."""
    size = shared_memory(spec)
    host_ipc = spec.container.ipc == "host"
    network = version_tuple(spec.cluster.runtimes[runtime].version)[:2] >= ROOTLESS_HOST_NETWORK_SINCE
    return Container(
        image=image.tag,
        archive=_archive(spec, image),
        shm_bytes=None if host_ipc else size.bytes,
        shm_set_by=set_by(spec, "container.ipc") if host_ipc else size.set_by,
        shm_why="container.ipc: host takes the node's /dev/shm" if host_ipc else size.why,
        infiniband=spec.cluster.network.infiniband,
        host_sys=runtime == "docker-rootless" and network,
        user=user if runtime == "docker" else None,
        mounts=tuple(_mounts(spec, run_dir)),
        min_driver=image.min_driver,
        sm=image.sm,
        ptx=image.ptx,
    )


def _archive(spec: JobSpec, image: Image) -> Archive | None:
    if image.archive is None or spec.cluster.image_folder is None:
        return None
    path = str(PurePosixPath(spec.cluster.image_folder) / image.archive.file)
    return Archive(path, image.archive.bytes, image.archive.sha256)


def _mounts(spec: JobSpec, run_dir: str) -> Iterator[Mount]:
    yield Mount(run_dir, run_dir, False, "computed")
    targets = [PurePosixPath(run_dir)]
    for host, written in spec.mounts.items():
        target, _, mode = written.partition(":")
        targets.append(PurePosixPath(target))
        yield Mount(host, target, mode == "ro", set_by(spec, f"mounts.{host}"))
    if spec.cluster.network.topology_file:
        file = spec.cluster.network.topology_file
        yield Mount(file, file, True, set_by(spec, "cluster.network.topology_file"))
    for place in _places_read(spec):
        if not any(place.is_relative_to(target) for target in targets):
            targets.append(place)
            yield Mount(str(place), str(place), True, "computed")


def _places_read(spec: JobSpec) -> list[PurePosixPath]:
    """Folders of the files that the trainer reads, which it sees under the same path as you.

    A file in a folder that the container has itself (/opt, /tmp) is mounted alone, so that it hides nothing.
    """
    sources = [source.path for source in (*spec.data.train, *spec.data.eval)] if spec.data else []
    prompts = [spec.generation.prompts] if spec.generation else []
    files = [*sources, *spec.evaluation.choices, *prompts, *filter(None, [spec.init_from]), spec.tokenizer]
    paths = [_to_first_wildcard(PurePosixPath(file)) for file in files if file.startswith("/")]
    folders = {path if str(path.parent) in _OF_THE_IMAGE else path.parent for path in paths}
    adapter = spec.method.init_from if spec.method else None
    return sorted(folders | ({_place_of_adapter(PurePosixPath(adapter))} if adapter else set()))


def _place_of_adapter(path: PurePosixPath) -> PurePosixPath:
    """The folder that is an adapter, or has it; of a run the whole: its trainer.json knows alpha."""
    if path.suffix not in (".pt", ".safetensors"):
        return path
    folder = path.parent.parent if path.parts[-2:] == ("weights", "delta.pt") else path.parent
    return path if str(folder) in _OF_THE_IMAGE else folder


def _to_first_wildcard(path: PurePosixPath) -> PurePosixPath:
    """`/data/*/rows.jsonl` as `/data/*`: a pattern reads below the folder before its first wildcard."""
    number = next((number for number, part in enumerate(path.parts) if set(part) & set("*?[")), len(path.parts))
    return PurePosixPath(*path.parts[: number + 1])
