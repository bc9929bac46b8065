"""Container images: what is inside, and the archive that they are loaded from."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.specs.fields import Boolean, Integer, ListOf, MapOf, Section, Text, key

VERSION = Text(r"\d+(\.\d+)*([a-z]*\.?[a-z0-9]+)?(\+[a-z0-9.]+)?", "a version such as 1.13.1", max_length=64)
ENV_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
IMAGE_TAG = r"[a-z0-9][a-z0-9._/-]*(:\d+/[a-z0-9._/-]+)?(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?"


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The tar file that `docker load` reads."""

    file: str = key(Text(r"[A-Za-z0-9][A-Za-z0-9._-]*", "a file name without folders"), "name of the tar file")
    bytes: int | None = key(Integer(1, 10**12), "its size in bytes; a smaller file is a broken download", None)
    sha256: str | None = key(Text(r"[0-9a-f]{64}", "64 hexadecimal digits"), "its SHA-256 digest", None)
    url: str | None = key(Text(r"https://\S+", "an https address"), "where the publisher offers it", None)


@dataclass(frozen=True, kw_only=True)
class Image:
    """A container image and the software in it."""

    tag: str = key(Text(IMAGE_TAG, "an image name such as cpmlive-flash:0.0.4"), "name and tag, as docker knows it")
    python: str | None = key(VERSION, "version of Python", None)
    torch: str | None = key(VERSION, "version of PyTorch", None)
    cuda: str | None = key(VERSION, "version of the CUDA runtime", None)
    sm: tuple[int, ...] = key(ListOf(Integer(30, 200)), "compute capabilities × 10 with machine code in torch", ())
    ptx: int | None = key(Integer(30, 200), "newest PTX in torch, × 10: newer cards compile it at start", None)
    min_driver: str | None = key(VERSION, "oldest NVIDIA driver that runs it", None)
    bmtrain: str | None = key(VERSION, "version of BMTrain", None)
    flash_attn: str | None = key(VERSION, "version of flash-attn", None)
    deepspeed: str | None = key(VERSION, "version of DeepSpeed", None)
    nccl: str | None = key(VERSION, "version of NCCL", None)
    packages: dict[str, str] = key(MapOf(Text(), r"[A-Za-z0-9._-]+", "a package name"), "other packages", factory=dict)
    env: dict[str, str] = key(MapOf(Text(), ENV_NAME, "a variable name"), "what its ENV lines set", factory=dict)
    archive: Archive | None = key(Section(Archive), "the tar file it is loaded from", None)
    gpu: bool = key(Boolean(), "false for a CPU-only stand-in", True)
    source: str = key(Text(max_length=400), "where these facts are from", "")

    def runs_on(self, sm: int) -> bool:
        """Whether its CUDA code runs on a card of compute capability sm/10.

        Machine code runs within a major version from its own minor upwards, PTX on anything newer
        (CUDA C++ Programming Guide, "Compute Capability Compatibility").
        """
        binary = any(code // 10 == sm // 10 and code <= sm for code in self.sm)
        return binary or (self.ptx is not None and self.ptx <= sm)
