"""The configuration files, rendered from the templates in slurm/sandbox."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from string import Template

from cpm_cluster.sandbox import gpus
from cpm_cluster.sandbox.cgroups import Confinement
from cpm_cluster.sandbox.state import CPUS_PER_NODE, GPUS_PER_NODE, MEMORY_PER_NODE_MIB, Sandbox
from cpm_cluster.specs.catalogue import packaged_configs


@dataclass(frozen=True)
class Rendered:
    """A file to be; `owner` is a user name."""

    path: Path
    text: str
    mode: int = 0o644
    owner: str = "root"


def templates() -> Path:
    """The folder of the templates: beside the packaged configs, installed or in a checkout."""
    return packaged_configs().parent / "slurm" / "sandbox"


def render(state: Sandbox, confinement: Confinement) -> list[Rendered]:
    """All files of the sandbox."""
    values = _values(state, confinement)

    def text(name: str) -> str:
        return Template((templates() / name).read_text(encoding="utf-8")).substitute(values)

    files = [
        Rendered(state.slurm_conf, text("slurm.conf")),
        Rendered(state.etc / "gres.conf", text("gres.conf")),
        # slurmdbd insists on this mode
        Rendered(state.etc / "slurmdbd.conf", text("slurmdbd.conf"), 0o600, "slurm"),
        Rendered(state.etc / "mariadb.cnf", text("mariadb.cnf")),
        Rendered(state.gpu_table, gpus.table(state)),
        Rendered(state.bin / "nvidia-smi", text("nvidia-smi"), 0o755),
        Rendered(state.bin / "task-prolog", text("task-prolog"), 0o755),
    ]
    if confinement.proctrack == "proctrack/cgroup":
        files.append(Rendered(state.etc / "cgroup.conf", text("cgroup.conf")))
    return files


def write(files: list[Rendered]) -> bool:
    """Write what is not there already; whether anything was written."""
    stale = [file for file in files if not file.path.exists() or file.path.read_text(encoding="utf-8") != file.text]
    for file in stale:
        new = file.path.with_name(file.path.name + ".new")
        new.touch(mode=0o600)
        new.write_text(file.text, encoding="utf-8")
        account = pwd.getpwnam(file.owner)
        os.chown(new, account.pw_uid, account.pw_gid)
        new.chmod(file.mode)
        os.replace(new, file.path)
    return bool(stale)


def _values(state: Sandbox, confinement: Confinement) -> dict[str, str]:
    hardware = f"CPUs={CPUS_PER_NODE} RealMemory={MEMORY_PER_NODE_MIB} Gres=gpu:{GPUS_PER_NODE}"
    return {
        "head": state.head.name,
        "head_address": str(state.head.address),
        "root": str(state.root),
        "run": str(state.run),
        "bin": str(state.bin),
        "munge_socket": str(state.munge_socket),
        "database_socket": str(state.database_socket),
        "gpu_table": str(state.gpu_table),
        "proctrack": confinement.proctrack,
        "task_plugin": confinement.task_plugin,
        "constrain_memory": "yes" if confinement.memory else "no",
        "memory_per_cpu_mib": str(MEMORY_PER_NODE_MIB // CPUS_PER_NODE),
        "node_list": ",".join(state.node_names),
        "node_lines": "\n".join(f"NodeName={n.name} NodeAddr={n.address} {hardware}" for n in state.nodes),
        "gpu_lines": "\n".join(
            f"NodeName={node.name} Name=gpu File={path}" for node in state.nodes for path in node.devices
        ),
    }
