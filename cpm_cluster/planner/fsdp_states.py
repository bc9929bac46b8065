"""What FSDP keeps on one GPU, the first and the second. Symbols as in states.py."""

from __future__ import annotations

import re

from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import Stage
from cpm_cluster.planner.states import (
    QUANTISED_BYTES,
    ZERO,
    States,
    foreach_temporaries,
    moments,
    over,
    part,
    sharded_weights,
    trained_in_stage,
    weight_bytes,
)

FSDP_REDUCES = "torch/distributed/fsdp/_runtime_utils.py"
FSDP_STAGE_2 = "torch/distributed/fsdp/api.py, SHARD_GRAD_OP"
# Between the micro batches of a step transformers' trainer and accelerate reduce nothing (sync_each_batch=False).
NO_SYNC = "accelerate, concept_guides/gradient_synchronization: no_sync"


def fsdp_states(setup: Setup, stage: Stage) -> States:
    """Shards in the precision of the checkpoint (fp32, or half where that is pure); half-precision units in flight.

    Stage 2 keeps units gathered from the forward to the backward pass. Weights on the host take their gradients along.
    """
    shape, n = setup.shape, setup.shards if setup.zero_stage else 1
    width = 2 if setup.precision.endswith("_pure") or setup.trains_adapters else 4
    used = weight_bytes(setup)
    trained = trained_in_stage(setup, stage)
    weights_over = n if setup.zero_stage >= 2 else 1
    at_rest: list[Component] = []
    if not setup.offload_param:
        at_rest += sharded_weights(setup, stage, width, weights_over)
    if not setup.zero_init:
        whole = 2 * stage.parameters
        at_rest.append(part("the unsharded weights", "2N", whole, "assumed: read before sharding, and kept"))
    if not setup.offload_optimizer:
        at_rest.append(moments(setup, width, trained, n))
    gradients = []
    if not setup.offload_param:
        gradients.append(part("gradients", f"{width}T" + over(n), width * trained / n, ZERO))
    if setup.accumulates and not written_for_fsdp(setup):
        gradients.append(part("gradients not yet reduced", "2T", 2 * trained, NO_SYNC))
    block = shape.parameters_per_layer / setup.tp
    held = QUANTISED_BYTES.get(setup.precision, used)
    if setup.zero_stage == 2:
        kept = held * stage.parameters
        computing = [part("weights kept to the backward pass", f"{held:g}N", kept, FSDP_STAGE_2)]
    else:
        computing = [part("gathered blocks", "2 × block", 2 * held * block, "torch/distributed/fsdp, BACKWARD_PRE")]
        if setup.zero_init:  # else they are counted with the unsharded weights
            root = used * shape.vocabulary_matrices * shape.embedding_parameters / setup.tp
            computing.append(part("gathered embeddings", f"{used}Vh for each", root, "torch/distributed/fsdp, root"))
    if not setup.trains_adapters:
        computing.append(part("gradients of a block", f"{used} × block", used * block, FSDP_REDUCES))
    return States(
        tuple(at_rest), tuple(gradients), tuple(computing), stepping=foreach_temporaries(setup, width, trained / n)
    )


def written_for_fsdp(setup: Setup) -> bool:
    """Programs with models and loops of their own, not those of transformers in FSDP."""
    return setup.engine == "fsdp" and not re.search(r"transformers|trl|accelerate", setup.engine_version)


def records_streams(setup: Setup) -> bool:
    """The first FSDP, whose memory one stream frees and another may not have yet; the second one waits instead.

    torch/distributed/fsdp/_runtime_utils.py, record_stream; pytorch#114299 of fully_shard.
    """
    second = "torchtitan" in setup.engine_version or setup.torch_version >= (2, 6)
    return setup.engine == "fsdp" and not second
