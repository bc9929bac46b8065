"""The fitted constants of the memory model, each of one mechanism; `benchmarks/fit_planner.py` fits them again."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
FITTED = "fitted, see planner/memory_constants.py"


@dataclass(frozen=True)
class MemoryConstants:
    """None belongs to a model or a row."""

    # MiB of a process outside torch's allocator: CUDA context, kernels, cuBLAS handles.
    context: float = 854.0
    # MiB of one NCCL communicator within a node, and across nodes: channels and buffers for each peer.
    communicator: float = 300.0
    communicator_across_nodes: float = 680.0
    # What eager torch keeps of a block beyond the tensors that are counted one by one.
    block: float = 1.18
    # The same for models written for FSDP: one kernel for a norm, no dropout.
    plain_block: float = 1.0
    # The same where torch.compile fuses and recomputes elementwise operations.
    compiled_block: float = 0.7
    # Copies of its inputs that a quantised linear layer keeps (bitsandbytes' MatMul4Bit, casts to the compute dtype).
    quantised_inputs: float = 1.0
    # Bytes for each logit at the start of the backward pass.
    logits_half: float = 6.0  # half precision throughout: logits, shifted copy, log-softmax or gradient
    logits_upcast: float = 18.0  # half, fp32 copy, shifted copy, log-softmax, gradient: where a model's code upcasts
    logits_autocast: float = 14.2  # the loss in fp32: 2 + 2 + 4 + 4
    logits_metrics: float = 22.7  # and the trainer keeps an fp32 copy for metrics
    logits_sharded: float = 16.1  # FSDP programs: logits, fp32 copy, log-softmax, gradient
    logits_megatron: float = 12.0  # half logits, fp32 copy, exponentials, half gradient; over tensor ranks
    logits_fused: float = 7.09  # in pieces: logits and their gradient in half
    # Reserved but not allocated, as a part of what comes and goes within a step.
    fragmentation: float = 0.05
    # The same for logits where lengths differ from step to step, at the usual length.
    ragged: float = 1.18
    # The same with the pipeline's many equal blocks of Megatron.
    pipeline_fragmentation: float = 0.402


CONSTANTS = MemoryConstants()
