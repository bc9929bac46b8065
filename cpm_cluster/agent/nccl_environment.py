"""What NCCL goes by: the variables that the ranks were really started with, against the plan and each other.

An image's ENV, an entry point or a conda environment may have set what nobody asked for (NeMo-Run#128), and one
variable that differs between two ranks makes both wait for ever. What a program sets itself is not seen here.
"""

from __future__ import annotations

from typing import Any, Mapping

from cpm_cluster.launch.plan import LaunchPlan, NodeFacts

PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_")
NAMES = ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
# torch/distributed/elastic/agent/server/local_elastic_agent.py: given to each rank where they are not set
OF_TORCHRUN = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "NCCL_ASYNC_ERROR_HANDLING": "1"}


def is_recorded(plan: LaunchPlan, name: str) -> bool:
    """Whether a variable is of interest, and nobody's secret."""
    return (name.startswith(PREFIXES) or name in NAMES) and name not in plan.secrets


def planned(plan: LaunchPlan, node: NodeFacts) -> dict[str, str]:
    """What the ranks of this node should have, as far as the plan says: the launcher adds the rest.

    A program of the user's own may meet as it likes: torchrun with the c10d rendezvous gives its ranks another name
    of the first node and another port than it was told.
    """
    found = {setting.name: setting.value or "" for setting in plan.environment if is_recorded(plan, setting.name)}
    if plan.program.launcher == "torchrun":
        world_size = str(plan.nodes * plan.program.processes_per_node)
        found.update(MASTER_ADDR=node.master_address, MASTER_PORT=node.master_port, WORLD_SIZE=world_size)
    return found


def differences(ranks: Mapping[int, Mapping[str, str]], asked: Mapping[str, str]) -> list[dict[str, Any]]:
    """The variables that are not the same for all ranks, not as asked, or not asked for, by name; see `how`.

    Each with its value by rank and the value asked for, None where there is none.
    """
    names = sorted({name for variables in (asked, *ranks.values()) for name in variables} - {"RANK"})
    found = []
    for name in names:
        values = {rank: variables.get(name) for rank, variables in ranks.items()}
        how = _how(name, set(values.values()), asked.get(name))
        if how:
            found.append({"variable": name, "how": how, "planned": asked.get(name), "ranks": values})
    return found


def _how(name: str, values: set[str | None], asked: str | None) -> str:
    if len(values) > 1:
        return "differs between ranks"
    if asked is not None:
        return "" if values == {asked} else "not as planned"
    expected = name in NAMES or values == {OF_TORCHRUN.get(name)}
    return "" if expected else "not planned"
