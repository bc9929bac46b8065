"""The training program's own argv and environment on one node."""

from __future__ import annotations

from cpm_cluster.launch.plan import LaunchPlan, NodeFacts


def program_argv(plan: LaunchPlan, node: NodeFacts) -> list[str]:
    """What runs inside the container, or directly on the node.

    torchrun's static rendezvous is used: with a fixed set of nodes it gives each node its rank deterministically,
    where c10d ignores --node_rank. Option names have underscores because torch 1.13 knows no others.
    """
    program = plan.program
    if program.launcher == "none":
        return list(program.arguments)
    return [
        program.python,
        "-m",
        "torch.distributed.run",
        f"--nnodes={plan.nodes}",
        f"--nproc_per_node={program.processes_per_node}",
        f"--node_rank={node.index}",
        f"--master_addr={node.master_address}",
        f"--master_port={node.master_port}",
        "--max_restarts=0",
        *program.arguments,
    ]


def program_environment(plan: LaunchPlan, node: NodeFacts, log_dir: str) -> dict[str, str]:
    """The variables of the plan, and those that only the node can set.

    PET_* are torchrun's own (torch/distributed/argparse_util.py), so that a `command` may be a bare `torchrun`.
    """
    variables = {setting.name: setting.value or "" for setting in plan.environment}
    variables.update(
        CPM_RUN_ID=plan.run_id,
        CPM_RUN_DIR=plan.run_dir,
        CPM_LOG_DIR=log_dir,
        CPM_ATTEMPT=str(node.attempt),
        NODE_RANK=str(node.index),
    )
    if plan.program.launcher == "none":
        variables.update(
            MASTER_ADDR=node.master_address,
            MASTER_PORT=node.master_port,
            PET_NNODES=str(plan.nodes),
            PET_NPROC_PER_NODE=str(plan.program.processes_per_node),
            PET_NODE_RANK=str(node.index),
            PET_MASTER_ADDR=node.master_address,
            PET_MASTER_PORT=node.master_port,
        )
    return variables
