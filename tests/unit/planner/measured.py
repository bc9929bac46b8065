"""Runs as they would be measured where the planner's terms are off by known factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cpm_cluster.planner.calibrate import MeasuredRun, Models
from cpm_cluster.planner.calibration import Subject
from cpm_cluster.planner.gpu_memory import gpu_memory
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.setup import Setup, Shape
from cpm_cluster.planner.step_time import step_time
from cpm_cluster.planner.term_groups import gpu_groups, time_groups

SUBJECT = Subject("cpmlive-flash:0.0.4", "a100-80g", "bmtrain")
SHAPE = Shape(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=14336, vocab=119696)
SETUP = Setup(
    shape=SHAPE,
    engine="bmtrain",
    engine_version="0.2.3.post2 torch 1.13.1",
    zero_stage=3,
    precision="fp16",
    seq_len=2048,
    recompute="full",
    dp=8,
    pin_memory=True,
    gpu="a100-80g",
    gpu_memory_mib=81251,
)
MODELS = Models(gpu_memory=gpu_memory)
EXACT = (1.0, 1.0, 1.0, 1.0)


def sweep() -> list[Setup]:
    """Setups that tell the groups apart: sizes, ranks, nodes, micro batches, offloading, recomputing."""
    small = replace(SHAPE, hidden=2048, layers=24, heads=16, kv_heads=16, ffn=8192, vocab=32000)
    tiny = replace(SHAPE, hidden=1024, layers=12, heads=8, kv_heads=8, ffn=4096, vocab=32000)
    return [
        replace(
            SETUP, shape=shape, dp=dp, nodes=nodes, micro_batch=micro, recompute=recompute, offload_optimizer=offload
        )
        for recompute, offload in (("full", False), ("none", True))
        for dp, nodes, micro in ((1, 1, 2), (4, 1, 8), (8, 1, 16), (64, 8, 1))
        for shape in (SHAPE, small, tiny)
    ]


def measured_run(
    setup: Setup,
    name: str = "run",
    gpu: Sequence[float] = EXACT,
    time: Sequence[float] = (1.0, 1.0, 1.0),
    subject: Subject = SUBJECT,
) -> MeasuredRun:
    """Of a machine on which the groups of terms are multiplied by `gpu` and `time`."""
    peak = max(sum(m * x for m, x in zip(gpu, grouped.sums, strict=True)) for grouped in gpu_groups(setup, gpu_memory))
    step = step_time(setup)
    seconds = sum(m * x for m, x in zip(time, time_groups(step), strict=True))
    return MeasuredRun(
        name=name,
        subject=subject,
        setup=setup,
        gpu_memory_mib=peak / MIB,
        gpu_total_mib=10_000_000.0,  # no reading is censored
        host_memory_bytes=None,
        tokens_per_s_per_gpu=step.tokens / step.gpus / seconds,
    )
