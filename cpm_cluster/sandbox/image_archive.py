"""A container image as one tar file, as `docker save` writes it and `docker load` and `podman load` read it.

Format: Docker Image Specification v1.2, "Combined Image JSON + Filesystem Changeset Format": a configuration named by
its digest (which is the image's id), one tar of files per layer, and manifest.json, which joins the two to a tag. Here
all files are one layer; its tar is written straight into the archive, so that nothing is written twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}  # uname -m: Go's names, which images use


class HashingWriter:
    """A file that is written once, from front to back; knows the size and SHA-256 of what went in."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)


def write_archive(rootfs: Path, config: dict[str, Any], tag: str, path: Path) -> str:
    """Write the files below `rootfs` as an image with the given `config` (Env, Cmd, Labels); return the image's id.

    Contents of the folders proc, sys and dev are left out: every runtime mounts its own, and an ordinary user cannot
    make device nodes.
    """
    with open(path, "wb") as file:
        layer = _write_layer(file, rootfs)
        image = _image_json(config, layer)
        image_id = hashlib.sha256(image).hexdigest()
        manifest = [{"Config": f"{image_id}.json", "RepoTags": [tag], "Layers": [_layer_name(layer)]}]
        _write_member(file, f"{image_id}.json", image)
        _write_member(file, "manifest.json", json.dumps(manifest).encode())
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    return image_id


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _write_layer(file: IO[bytes], rootfs: Path) -> str:
    """Write the layer's tar as a member of the archive; its digest, which the member's header gets last."""
    start = file.tell()
    file.write(bytes(tarfile.BLOCKSIZE))
    writer = HashingWriter(file)
    with tarfile.open(fileobj=writer, mode="w|", format=tarfile.GNU_FORMAT, bufsize=1 << 20) as layer:  # type: ignore[call-overload]
        for path in _in_order(rootfs):
            layer.add(path, arcname=str(path.relative_to(rootfs)), recursive=False)
    digest = writer.digest.hexdigest()
    _pad(file, writer.size)
    end = file.tell()
    file.seek(start)
    file.write(_header(_layer_name(digest), writer.size))
    file.seek(end)
    return digest


def _in_order(folder: Path, top: bool = True) -> Iterator[Path]:
    """Everything below a folder, folders before what is in them."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        yield path
        if entry.is_dir(follow_symlinks=False) and not (top and entry.name in {"proc", "sys", "dev"}):
            yield from _in_order(path, top=False)


def _image_json(config: dict[str, Any], layer: str) -> bytes:
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    image = {
        "created": created,
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer}"]},
        "history": [{"created": created, "created_by": "cpm sandbox"}],
    }
    return json.dumps(image).encode()


def _write_member(file: IO[bytes], name: str, data: bytes) -> None:
    file.write(_header(name, len(data)))
    file.write(data)
    _pad(file, len(data))


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.mtime = int(time.time())
    return member.tobuf(tarfile.GNU_FORMAT)


def _pad(file: IO[bytes], size: int) -> None:
    file.write(bytes(-size % tarfile.BLOCKSIZE))


def _layer_name(digest: str) -> str:
    return f"{digest}.tar"
