"""Jobs without GPUs: what each rank computes with is a CPU, and everything is in the memory of its node.

No published rate would hold for the next machine's CPU: time is predicted only where runs were measured.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cpm_cluster.planner.calibration import SIDE, Calibration
from cpm_cluster.planner.demands import CPU_SPREAD, cpu_demand
from cpm_cluster.planner.fit import Demand, RunTime
from cpm_cluster.planner.flops import (
    adapter_flops,
    attention_forward,
    head_forward,
    linear_forward,
    model_flops,
    passes,
)
from cpm_cluster.planner.host_memory import HostInstant, HostMemory
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.step_time import StepTime, TimeTerm
from cpm_cluster.planner.term_groups import host_groups, scaled_host, scaled_terms, time_groups
from cpm_cluster.specs.job import JobSpec

# Where calibration starts from: what jobs/quickstart.yaml reaches on a core that others use too, 10 to 30.
RANK_GFLOP_S = 20.0
SPREAD = 3.0  # uncalibrated; never shown
# Standard deviations that are expected of the logarithms of the multipliers of time, of which the first alone is there.
TIME_EXPECTED = (math.log(4), 0.5, 0.5)
NOISE = 0.2  # of both memory and time: cores are shared with whatever else runs


def host_memory(setup: Setup) -> HostMemory:
    """What a node holds while its ranks compute."""
    demand = cpu_demand(setup, None)
    instant = HostInstant(demand.instant, demand.components)
    return HostMemory((instant, instant))  # a save adds nothing: the fullest instant is the one observed


def step_time(setup: Setup) -> StepTime:
    """One step at the rate that calibration starts from."""
    shape, done = setup.shape, passes(setup)
    per_token = (
        done.linear * linear_forward(shape)
        + done.attention * attention_forward(shape, setup.seq_len)
        + done.head * head_forward(shape)
        + adapter_flops(setup)
    )
    tokens = setup.micro_batch * setup.grad_accum * setup.seq_len
    seconds = per_token * tokens / (RANK_GFLOP_S * 1e9)
    formula = f"{per_token:.3g} FLOP × {tokens} tokens / ({RANK_GFLOP_S:g} GFLOP/s)"
    return StepTime(
        terms=(TimeTerm("computing", seconds, formula, "Kaplan et al. 2020; the rate is calibrated"),),
        spread=SPREAD,
        gpus=setup.gpus,
        tokens=tokens * setup.dp,
        model_flops_per_token=model_flops(setup),
        masked_flops_per_token=0.0,
        peak_flops=0.0,
        mfu_limit=0.0,
    )


def calibrated_demand(calibration: Calibration | None, setup: Setup, demand: Demand) -> Demand:
    """The host memory of a job without GPUs, scaled as runs were measured; as it is where none were."""
    scaling = calibration.host_memory if calibration and calibration.is_of(setup) else None
    if calibration is None or scaling is None:
        return demand
    scaled = scaled_host(HostInstant(demand.instant, demand.components), scaling.multipliers)
    spread = math.expm1(SIDE * scaling.deviation(host_groups(scaled)))
    spread = (min if calibration.narrows(scaling, NOISE, setup) else max)(spread, CPU_SPREAD)
    low, high = round(scaled.bytes / (1 + spread)), round(scaled.bytes * (1 + spread))
    return replace(demand, components=scaled.components, low_bytes=low, high_bytes=high)


def calibrated_run_time(calibration: Calibration | None, setup: Setup, spec: JobSpec) -> RunTime | None:
    """None where no run was measured."""
    scaling = calibration.step_time if calibration and calibration.is_of(setup) else None
    if scaling is None:
        return None
    step = step_time(setup)
    step = replace(step, terms=scaled_terms(step, scaling.multipliers))
    step = replace(step, spread=math.expm1(SIDE * scaling.deviation(time_groups(step))))
    return RunTime(
        step=step,
        steps=spec.training.steps,
        limit_s=spec.time_limit_s,
        warning_s=spec.signal_lead_s or spec.cluster.signal_lead_s,
        starts_again=spec.cluster.scheduler == "slurm",
    )
