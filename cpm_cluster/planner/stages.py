"""What the fullest stages of a pipeline hold: parameters, blocks, micro batches in flight."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.planner.setup import Setup


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, for one tensor-parallel rank."""

    name: str
    parameters: float  # N': of the model, on one GPU before data-parallel sharding
    blocks: int
    micro_batches: float  # whose activations it holds at once
    has_head: bool
    vocabulary_share: float  # of a whole matrix of the vocabulary


def stages(setup: Setup) -> tuple[Stage, ...]:
    """The first and the last stage; the whole model without a pipeline.

    1F1B (Narayanan et al. 2021): the first stage holds as many micro batches as there are stages; interleaving with v
    chunks holds 1 + (p - 1)/(p v) times that.
    """
    shape, p, tp = setup.shape, setup.pp, setup.tp
    litgpt = setup.engine == "none" and setup.engine_version.startswith("litgpt")
    vocabulary = shape.vocabulary_matrices * shape.embedding_parameters
    if p == 1:
        whole = vocabulary if litgpt else 0  # generate/tp.py splits the blocks alone
        return (Stage("", whole + (shape.parameters - whole) / tp, shape.layers, 1.0, True, 1 if litgpt else 1 / tp),)
    if setup.embeddings_count_as_layers:
        blocks = max(1, -(-(shape.layers + 2) // p) - 1)
    else:
        blocks = -(-shape.layers // p)
    parameters = (blocks * shape.parameters_per_layer + shape.embedding_parameters) / tp
    if litgpt:  # generate/sequentially.py: all that is not a block is on the first card
        return (Stage("first card", blocks * shape.parameters_per_layer + vocabulary, blocks, 1.0, True, 1),)
    if setup.engine == "none":  # one card after another, one micro batch
        return (Stage("last card", parameters, blocks, 1.0, True, 1 / tp),)
    micro_batches = setup.grad_accum if setup.grad_accum_stated else p  # unstated: as many as fill the pipeline
    in_flight = float(min(p, micro_batches)) * (1 + (p - 1) / (p * setup.virtual_stages) * (setup.virtual_stages > 1))
    first = Stage("first stage", parameters, blocks, in_flight, False, 1 / tp)
    return (first, Stage("last stage", parameters, blocks, 1.0, True, 1 / tp))
