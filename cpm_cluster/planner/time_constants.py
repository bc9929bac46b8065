"""The fitted constants of step times. `benchmarks/fit_planner_time.py` fits them and prints this table again."""

from __future__ import annotations

from dataclasses import dataclass

FITTED = "fitted, see benchmarks/fit_planner_time.py"


@dataclass(frozen=True)
class Constants:
    """Few, and each of one mechanism; none belongs to a model or a row."""

    # Share of the dense 16-bit peak that large matrix products reach, by generation of the card.
    linear_volta: float = 0.539
    linear_ampere: float = 0.735
    linear_hopper: float = 0.65
    # The same for fused attention kernels, whose causal half isn't subtracted from the FLOPs (so up to 2):
    # FlashAttention 1 as llm-foundry's, 2 as all newer code's; on Hopper cuDNN's, which TransformerEngine takes.
    flash_ampere: float = 0.619
    flash2_ampere: float = 1.3
    flash_hopper: float = 0.322
    cudnn_hopper: float = 0.637
    # How often activations pass through memory, in units of one write of what a layer computes, for each pass.
    traffic_transformers: float = 7.96  # one kernel for each operation, norms and positions in fp32
    traffic_torch: float = 3.41  # modules written for FSDP or BMTrain: fewer kernels, no casts
    traffic_fused: float = 1.24  # Megatron's fused kernels
    traffic_compiled: float = 1.37  # torch.compile, as torchtitan, torchtune and fms-fsdp use it
    # fp8 matrix products beside 16-bit ones, at most 1.9: quantisation takes part of the double rate.
    fp8_gain: float = 1.9
    # Seconds that the CPU needs to launch the kernels of one layer in one pass.
    launch_transformers: float = 0.00174
    launch_lean: float = 0.0006  # all other code
    launch_gather: float = 0.0015  # more for each layer and pass, where DeepSpeed gathers its weights (ZeRO-3)
    launch_unpack: float = 0.000517  # more for each, where 4-bit weights are unpacked
    # Passes through memory of one 16-bit copy of the weights while 4-bit ones are unpacked, for each pass; not
    # bitsandbytes' NF4, which is counted.
    dequantise: float = 6.72
    # Attention whose head size is not a multiple of 8 elements, against an aligned one: no tensor cores.
    unaligned_heads: float = 24.1
    # Reached share of a link's nominal rate, within a node and between nodes.
    node_use: float = 0.374
    fabric_use: float = 0.612
    # Share of gathers, reductions and transfers that is hidden behind computation when both take equally long.
    overlap: float = 0.95
    overlap_deepspeed: float = 0.375  # with overlap_comm; without it nothing is hidden
    # Part by which a step is longer for each doubling of the nodes: ranks wait for the slowest.
    stragglers: float = 0.012


CONSTANTS = Constants()
