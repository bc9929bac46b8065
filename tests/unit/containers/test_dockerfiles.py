"""What the Dockerfiles install, what their labels say, and what configs/images promises are the same."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[3]
# folder: entry of configs/images
IMAGES = {"cpmlive-flash": "cpmlive-flash-0.0.4", "cpmlive-flash-next": "cpmlive-flash-next-0.1"}
DOCKERFILES = sorted((CHECKOUT / "containers").glob("*/Dockerfile"))


def instructions(folder: str) -> list[str]:
    """Each instruction on one line, comments left out."""
    lines = (CHECKOUT / "containers" / folder / "Dockerfile").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ").splitlines()


def labels(folder: str) -> dict[str, str]:
    """The labels of the image."""
    (line,) = (line for line in instructions(folder) if line.startswith("LABEL "))
    return dict(re.findall(r'([\w.-]+)="([^"]*)"', line))


def installed(folder: str) -> dict[str, str]:
    """Name and version of what pip is told to install, without a build's own suffix (+cu116)."""
    runs = " ".join(line for line in instructions(folder) if line.startswith("RUN "))
    return dict(re.findall(r"(?<=\s)([A-Za-z][\w-]*)==([\w.]+)", runs))


def entry(folder: str) -> dict[str, object]:
    """What configs/images says of the image."""
    text = (CHECKOUT / "configs" / "images" / f"{IMAGES[folder]}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def test_every_dockerfile_has_an_entry() -> None:
    assert [path.parent.name for path in DOCKERFILES] == sorted(IMAGES)


@pytest.mark.parametrize("path", DOCKERFILES, ids=[path.parent.name for path in DOCKERFILES])
def test_a_dockerfile_is_clean_for_hadolint(path: Path) -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([str(hadolint), str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("folder", IMAGES)
def test_the_labels_say_what_is_installed(folder: str) -> None:
    said, pinned = labels(folder), installed(folder)
    for name in ("torch", "bmtrain", "flash-attn"):
        assert said[f"cpm.{name}"] == pinned[name]
    for package in said["cpm.packages"].split():
        name, version = package.split("==")
        assert pinned[name] == version


@pytest.mark.parametrize("folder", IMAGES)
def test_the_entry_promises_what_the_labels_say(folder: str) -> None:
    said, promised = labels(folder), entry(folder)
    for name in ("python", "torch", "cuda", "nccl", "bmtrain"):
        assert str(promised[name]) == said[f"cpm.{name}"]
    assert promised["flash_attn"] == said["cpm.flash-attn"]
    assert f"{said['org.opencontainers.image.title']}:{said['org.opencontainers.image.version']}" == promised["tag"]
    packages = dict(package.split("==") for package in said["cpm.packages"].split())
    # The published image of 0.0.4 leaves its packages' versions open; ours brings those that it names.
    assert isinstance(promised["packages"], dict)
    for name, version in promised["packages"].items():
        assert version in ("unpinned", packages[name])


@pytest.mark.parametrize("folder", IMAGES)
def test_bmtrain_never_brings_an_nccl_over_that_of_torch(folder: str) -> None:
    (run,) = (line for line in instructions(folder) if "bmtrain==" in line and line.startswith("RUN "))
    for command in run.split("&&"):
        if "pip install" in command and ("bmtrain" in command or command.split()[-1] == "."):
            assert "--no-deps" in command
