"""Pretend GPUs: device nodes that Slurm gives and denies, and the table that the stand-in nvidia-smi reads.

Character devices of major 60, which the kernel keeps for local use: nothing is behind them. Opening one fails
with ENXIO where the control group allows it and with EPERM where not, which is how the stand-in tells them apart.
"""

from __future__ import annotations

import os
import stat
import uuid

from cpm_cluster.sandbox.state import GPUS_PER_NODE, Node, Sandbox

MAJOR = 60


def gpu_uuid(node: Node, index: int) -> str:
    """The same for a node's GPU each time, and another for each GPU."""
    return f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{index}.{node.name}.cpm-sandbox')}"


def make_devices(state: Sandbox) -> None:
    """The device nodes of all pretend GPUs, readable and writable by all, as those of NVIDIA are."""
    for node in state.nodes:
        node.devices[0].parent.mkdir(exist_ok=True)
        for index, path in enumerate(node.devices):
            if not path.exists():
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(MAJOR, node.index * GPUS_PER_NODE + index))
            path.chmod(0o666)


def table(state: Sandbox) -> str:
    """Lines `host index uuid device`."""
    return "".join(
        f"{node.name} {index} {gpu_uuid(node, index)} {path}\n"
        for node in state.nodes
        for index, path in enumerate(node.devices)
    )
