"""The CPU stand-in for cpmlive-flash: built from Debian's packages and PyPI, kept as an archive with its manifest.

Recipe: containers/cpu/recipe.yaml. No daemon and no base image takes part, so that it can be built anywhere, first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cpm_cluster.runs.records import read_json, write_json, write_text
from cpm_cluster.sandbox.commands import SYSTEM_PATH, run
from cpm_cluster.sandbox.image_archive import sha256_of, write_archive
from cpm_cluster.sandbox.state import Sandbox, SandboxError

PACKAGES = {"mmdebstrap": "mmdebstrap", "strip": "binutils"}
PATIENCE_S = 900.0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What the archive is: size and digest of the file, and what is inside."""

    tag: str
    image_id: str = field(metadata={"meaning": "digest of the image's configuration, by which docker knows it"})
    file: str
    bytes: int
    sha256: str
    stand_in: str
    software: dict[str, str]
    recipe: str = field(metadata={"meaning": "digest of the recipe that it was built from"})


def folder(state: Sandbox) -> Path:
    """Where archive and manifest are; `image_folder` of configs/clusters/sandbox.yaml."""
    return state.root / "images"


def archive(state: Sandbox, manifest: Manifest) -> Path:
    """The tar file that `docker load` and `podman load` read."""
    return folder(state) / manifest.file


def read_manifest(state: Sandbox) -> Manifest | None:
    """The manifest of an archive that is there in its full length; None otherwise."""
    found = read_json(folder(state) / f"{stem(_read_recipe()['tag'])}.json")
    try:
        manifest = Manifest(**found) if found else None
        complete = manifest is not None and archive(state, manifest).stat().st_size == manifest.bytes
    except (TypeError, FileNotFoundError):
        return None
    return manifest if complete else None


def ensure(state: Sandbox) -> Manifest:
    """The archive of the present recipe, built unless it is there.

    Raises:
        SandboxError: packages cannot be fetched, or what was built cannot train.
    """
    manifest = read_manifest(state)
    if manifest is None or manifest.recipe != _recipe_digest():
        manifest = _build(state, _read_recipe())
    # beside the archive, for all; the ordinary user has a copy among the configs
    write_text(folder(state) / f"{stem(manifest.tag)}.yaml", catalogue_entry(manifest))
    return manifest


def catalogue_entry(manifest: Manifest) -> str:
    """The stand-in as a file of configs/images; a user's own files win over the packaged ones by name.

    So a job file that names cpmlive-flash:0.0.4 gets the stand-in here, and the original on a real cluster, unchanged.
    """
    software = dict(manifest.software)
    entry = {
        "tag": manifest.tag,
        "gpu": False,
        "python": software.pop("python"),
        "torch": software.pop("torch"),
        "packages": software,
        "archive": {"file": manifest.file, "bytes": manifest.bytes, "sha256": manifest.sha256},
        "source": "CPU stand-in of the sandbox, written by cpm sandbox up",
    }
    return yaml.safe_dump(entry, sort_keys=False)


def _build(state: Sandbox, recipe: dict[str, Any]) -> Manifest:
    work = folder(state) / "build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        rootfs = work / "rootfs"
        _install_debian(rootfs, recipe["debian"])
        _install_python_packages(work, rootfs, recipe["python_packages"])
        _prune(rootfs, recipe)
        software = _first_step(rootfs)
        return _save(state, recipe, work, software)
    finally:
        shutil.rmtree(work)


def _install_debian(rootfs: Path, debian: dict[str, Any]) -> None:
    """Debian's essential packages and those of the recipe; several times as fast as debootstrap."""
    argv = ["mmdebstrap", "--variant=essential", f"--include={','.join(debian['packages'])}"]
    # with /bin merged into /usr at once, usr-is-merged stands for usrmerge, which brings the whole of perl
    argv += ["--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr", "--aptopt=Apt::Install-Recommends false"]
    environment = {"PATH": SYSTEM_PATH, **_settings_of_site()}
    done = subprocess.run([*argv, debian["suite"], str(rootfs)], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        # its last line says only that it failed
        errors = [line.removeprefix("E: ").strip() for line in done.stderr.splitlines() if line.startswith("E: ")]
        raise SandboxError(f"the image cannot be built, mmdebstrap says: {errors[0] if errors else 'nothing'}")


def _install_python_packages(work: Path, rootfs: Path, packages: list[str]) -> None:
    """With a pip of its own, for this one may be missing; for the image's Python, whatever runs this program."""
    pip = work / "pip"
    run([sys.executable, "-m", "venv", str(pip)])
    target = _dist_packages(rootfs)
    version = target.parent.name.removeprefix("python")
    argv = [str(pip / "bin" / "pip"), "--disable-pip-version-check", "install", "--no-compile", f"--target={target}"]
    argv += [f"--python-version={version}", "--only-binary=:all:"]
    run([*argv, *packages], environment=_settings_of_site(), patience_s=PATIENCE_S)


def _settings_of_site() -> dict[str, str]:
    """The caller's own settings of pip and proxies: where packages come from is for the site to say."""
    proxies = {"http_proxy", "https_proxy", "no_proxy", "all_proxy", "ssl_cert_file", "home"}
    return {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.lower() in proxies}


def _dist_packages(rootfs: Path) -> Path:
    """Where Debian's Python looks for what does not come from Debian."""
    (python,) = (rootfs / "usr" / "lib").glob("python3.*")
    return rootfs / "usr" / "local" / "lib" / python.name / "dist-packages"


def _prune(rootfs: Path, recipe: dict[str, Any]) -> None:
    for pattern in recipe["pruned"]:
        for path in rootfs.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for pattern in recipe["stripped"]:
        for path in rootfs.glob(pattern):
            run(["strip", "--strip-unneeded", str(path)])


def _first_step(rootfs: Path) -> dict[str, str]:
    """Train one step inside, which also leaves the bytecode of what it loaded; the versions of what is inside."""
    script = (_recipe_folder() / "first_step.py").read_text()
    mounts = ["unshare", "--mount", "--pid", "--fork", f"--mount-proc={rootfs / 'proc'}"]
    inside = ["chroot", str(rootfs), "python3", "-W", "ignore", "-"]
    try:
        printed = run([*mounts, *inside], stdin=script, patience_s=PATIENCE_S)
    except SandboxError as error:
        raise SandboxError(f"the CPU stand-in was built, but cannot train: {error}") from error
    software: dict[str, str | None] = json.loads(printed.splitlines()[-1])
    if software.pop("cuda") is not None:
        raise SandboxError(
            "pip has installed torch for CUDA, which is several GB larger: let PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS"
            " name a place with PyTorch's CPU builds"
        )
    debian = (rootfs / "etc" / "debian_version").read_text().strip()
    return {**{name: str(version) for name, version in software.items()}, "debian": debian}


def _save(state: Sandbox, recipe: dict[str, Any], work: Path, software: dict[str, str]) -> Manifest:
    tag = recipe["tag"]
    config = {
        "Env": [f"{name}={value}" for name, value in recipe["environment"].items()],
        "Cmd": recipe["command"],
        "Labels": recipe["labels"],
    }
    written = work / "image.tar"
    image_id = write_archive(work / "rootfs", config, tag, written)
    manifest = Manifest(
        tag=tag,
        image_id=f"sha256:{image_id}",
        file=f"{stem(tag)}.tar",
        bytes=written.stat().st_size,
        sha256=sha256_of(written),
        stand_in=recipe["labels"]["cpm.stand-in"],
        software=software,
        recipe=_recipe_digest(),
    )
    os.replace(written, archive(state, manifest))
    write_json(folder(state) / f"{stem(tag)}.json", asdict(manifest))
    return manifest


def _read_recipe() -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load((_recipe_folder() / "recipe.yaml").read_text())
    return recipe


def _recipe_digest() -> str:
    files = (_recipe_folder() / name for name in ("recipe.yaml", "first_step.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _recipe_folder() -> Path:
    """Inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "containers" / "cpu"
    return inside if inside.is_dir() else package.parent / "containers" / "cpu"


def stem(tag: str) -> str:
    """Name of an image's files, as the catalogue names them."""
    return tag.replace("/", "-").replace(":", "-")
