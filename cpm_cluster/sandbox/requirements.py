"""What the machine must have: Linux, root, Debian's packages, control groups."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cpm_cluster.sandbox.commands import SYSTEM_PATH
from cpm_cluster.sandbox.progress import note
from cpm_cluster.sandbox.state import SandboxError

# a program each, and the Debian package that has it
PACKAGES = {
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "slurmdbd": "slurmdbd",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sinfo": "slurm-client",
    "ip": "iproute2",
    "iptables": "iptables",
    "python3": "python3-minimal",
}
POLICY = Path("/usr/sbin/policy-rc.d")
POLICY_TEXT = "#!/bin/sh\n# cpm sandbox: while packages are installed, no daemon of theirs is started\nexit 101\n"


def require_root() -> None:
    """Raises SandboxError unless this is Linux, and the caller is root."""
    if platform.system() != "Linux":
        raise SandboxError(f"the sandbox needs Linux, and this is {platform.system()}")
    if os.geteuid() != 0:
        raise SandboxError(f"the sandbox needs root: sudo {shutil.which('cpm') or 'cpm'} sandbox …")


def require_packages(packages: Mapping[str, str], install: bool) -> None:
    """Raises SandboxError where programs are missing that are not to be installed, or cannot be."""
    missing = missing_packages(packages)
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise SandboxError(f"missing: {', '.join(missing)} (names of Debian's packages; there is no apt-get here)")
    if not install:
        raise SandboxError(f"packages are missing: {' '.join(missing)}; cpm sandbox up --install installs them")
    _install(missing)
    still = missing_packages(packages)
    if still:
        raise SandboxError(f"apt-get has installed {' '.join(still)}, and yet their programs are not there")


def missing_packages(packages: Mapping[str, str]) -> list[str]:
    """Debian packages whose program is not there."""
    return sorted({package for program, package in packages.items() if not shutil.which(program, path=SYSTEM_PATH)})


def _install(packages: list[str]) -> None:
    note(f"apt-get install {' '.join(packages)}")
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text(POLICY_TEXT)
        POLICY.chmod(0o755)
    try:
        _apt_get("update")
        _apt_get("install", "--yes", "--no-install-recommends", *packages)
    finally:
        if ours:
            POLICY.unlink()


def _apt_get(*words: str) -> None:
    argv = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", *words]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        last = done.stdout.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise SandboxError(f"{' '.join(argv)} ended with code {done.returncode}: {''.join(last)}")
