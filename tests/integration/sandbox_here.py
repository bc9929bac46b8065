"""Whether this machine can have a sandbox; CPM_TEST_INSTALL=1 installs what is missing of Debian's packages first."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache

from cpm_cluster.sandbox import containers, requirements
from cpm_cluster.sandbox.state import SandboxError

PACKAGES = {**requirements.PACKAGES, **containers.PACKAGES}


@lru_cache(maxsize=1)
def reason_against() -> str:
    """Why there can be none; empty where there can."""
    if os.geteuid() != 0:
        return "the sandbox needs root"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"root can make no namespaces here: {tried.stderr.strip()}"
    return _without_packages()


def _without_packages() -> str:
    missing = requirements.missing_packages(PACKAGES)
    if not missing:
        return ""
    if os.environ.get("CPM_TEST_INSTALL") != "1":
        return f"packages are missing (CPM_TEST_INSTALL=1 installs them): {' '.join(missing)}"
    print(f"installing, for the tests on a real cluster: {' '.join(missing)}", file=sys.stderr, flush=True)
    try:
        requirements.require_packages(PACKAGES, install=True)
    except SandboxError as error:
        return str(error)
    return ""
