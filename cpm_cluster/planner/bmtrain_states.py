"""What BMTrain keeps on one GPU. Symbols as in states.py."""

from __future__ import annotations

from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import Stage
from cpm_cluster.planner.states import States, over, part, trained_in_stage, weight_bytes

BLOCKS = "bmtrain/block_layer.py"
BLOCK_CONTEXT = "bmtrain/zero_context.py"


def bmtrain_states(setup: Setup, stage: Stage) -> States:
    """All sharded at rest in both stages; blocks are gathered one after another, the head's matrix on its own.

    Gradients are there from the second step on: zero_grad keeps them (optim_manager.py), and those of a block belong to
    its storage, also where its weights were frozen once it was made, as OpenDelta does it. Before 1.0 the code of
    zero_context.py is in block_layer.py.
    """
    n, shape = setup.shards, setup.shape
    width, trained, whole = weight_bytes(setup), trained_in_stage(setup, stage), stage.parameters
    frozen_vocabulary = setup.trains_adapters and not setup.fully_trained_vocabulary
    at_rest = [part("weights", f"{width}N" + over(n), width * whole / n, BLOCKS)]
    outside = shape.vocabulary_matrices * shape.embedding_parameters if frozen_vocabulary else 0
    stored, what = (whole - outside, "(N - vocabulary)") if outside else (whole, "N")
    if setup.trains_adapters and setup.frozen_first:
        stored, what = trained, "T"
    at_rest.append(part("gradients", f"{width}{what}" + over(n), width * stored / n, BLOCK_CONTEXT))
    if not setup.offload_optimizer:
        moments = 6 if setup.precision.startswith("fp16") else 8  # fp16: the first moment in half
        states = moments + (4 if width == 2 else 0)
        at_rest.append(
            part("master copy and moments", f"{states}T" + over(n), states * trained / n, "bmtrain/optim/adam.py")
        )
    each = width if frozen_vocabulary else 2 * width
    head = part(
        "the head, gathered" if frozen_vocabulary else "the head, gathered, and its gradient",
        f"{each}Vh",
        each * shape.embedding_parameters,
        "bmtrain/parameter.py, OpAllGather",
    )
    computing, reducing = _bmtrain_blocks(setup, width)
    return States(tuple(at_rest), in_head=(head,), computing=computing, reducing=reducing)


def _bmtrain_blocks(setup: Setup, width: int) -> tuple[tuple[Component, ...], tuple[Component, ...]]:
    """(in both passes, in the backward pass on top).

    The next block is gathered while the GPU still computes the one before; in the backward pass it is entered, with its
    gradients, before the one before is released (release_next_module; before 1.0 exit_prev). Stage 2 keeps gathered
    weights to the backward pass.
    """
    block = width * setup.shape.parameters_per_layer
    held, what = float(block), "block"
    if setup.trains_adapters and setup.frozen_first:
        held, what = width * setup.trained_parameters / setup.shape.layers, "T of a block"
    gradients = part("gradients of two blocks", f"2 × {width} × {what}", 2 * held, BLOCK_CONTEXT)
    if setup.zero_stage == 2:
        kept = setup.shape.layers * block
        return (part("weights kept to the backward pass", f"{width} × blocks", kept, BLOCK_CONTEXT),), (gradients,)
    return (part("two gathered blocks", f"2 × {width} × block", 2 * block, BLOCK_CONTEXT),), (gradients,)
