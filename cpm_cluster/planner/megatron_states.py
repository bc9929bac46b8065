"""What Megatron-LM and Megatron-DeepSpeed keep on one GPU. Symbols as in states.py."""

from __future__ import annotations

from cpm_cluster.planner.deepspeed_states import DEEPSPEED_BUCKET, STAGE_2
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import Stage
from cpm_cluster.planner.states import DTYPE, ZERO, States, frozen_weights, over, part, trained_in_stage

FITTED_PARTS = "fitted: half gradients and weights of the part, as they are reduced and gathered"


def megatron_states(setup: Setup, stage: Stage) -> States:
    """Half-precision weights of the stage; states over n with the distributed optimizer or ZeRO-1."""
    local, n = stage.parameters, setup.shards if setup.zero_stage else 1
    if setup.trains_adapters:
        adapters = part("adapters", "18T'", 18 * trained_in_stage(setup, stage), ZERO)
        return States((*frozen_weights(setup, stage), adapters))
    weights = part("weights", "2N'", 2 * local, DTYPE)
    states = part("master copy and moments", "12N'" + over(n), 12 * local / n, ZERO)
    if "DeepSpeed" not in setup.engine_version:
        return States((weights, states, part("gradients", "4N'", 4 * local, "Megatron-LM, docs/…/dist_optimizer.md")))
    if setup.precision == "bf16_fp32grad":
        return States(
            (weights, states, part("gradients in fp32", "4N'", 4 * local, "deepspeed/runtime/bf16_optimizer.py")),
            (part("gradients and their flat copy", "4N'", 4 * local, "bf16_optimizer.py: 2N'; the copy is assumed"),),
        )
    at_rest = [weights, states]
    if setup.pp == 1:
        bucket = min(local, DEEPSPEED_BUCKET)
        at_rest.append(
            part("reduce and gather buckets", "4 × bucket", 4 * bucket, "assumed: one to reduce, one to gather")
        )
    flat = (
        part("fp32 gradients", "4N'" + over(n), 4 * local / n, STAGE_2),
        part("gathered parts", "4N'" + over(n), 4 * local / n, FITTED_PARTS),
    )
    return States(tuple(at_rest), (part("gradients", "2N'", 2 * local, DTYPE),), flat_in_step=flat)
