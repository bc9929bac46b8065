"""What a dry run prints: the fit, the very script and command lines of a submission, and who set the environment."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from cpm_cluster.cli.fit_text import demand_line, time_lines
from cpm_cluster.launch.prepare import Prepared
from cpm_cluster.launch.runtimes import SYMBOLIC_NODE, run_argv
from cpm_cluster.launch.sbatch import agent_argv, batch_script, by_hand, wrapped
from cpm_cluster.planner.fit import Fit
from cpm_cluster.specs.problems import printable


def as_data(prepared: Prepared, expected_start: str = "") -> dict[str, Any]:
    """Everything, for programs. `node_argv` has names such as $NODE_RANK where only the node knows the value.

    `expected_start` is what the scheduler says of it, empty where there is none to ask.
    """
    plan = prepared.plan
    return {
        "plan": json.loads(plan.to_json()),
        **fit_data(prepared.fit),
        "script": batch_script(plan) if plan.scheduler == "slurm" else None,
        "agent_argv": agent_argv(plan),
        "node_argv": run_argv(plan, SYMBOLIC_NODE),
        "by_hand": by_hand(plan),
        "expected_start": expected_start or None,
    }


def fit_data(fit: Fit) -> dict[str, Any]:
    """The planner's answer, for programs."""
    time = fit.time
    return {
        "verdict": fit.verdict,
        "as_described": fit.as_described,
        "fit": [asdict(demand) | {"bytes": demand.bytes, "verdict": demand.verdict} for demand in fit.demands],
        "time": time
        and {
            **asdict(time),
            "seconds": time.seconds,
            "low_s": time.low_s,
            "high_s": time.high_s,
            "segments": time.segments,
            "verdict": time.verdict,
            "step_seconds": time.step.seconds,
            "tokens_per_second_per_gpu": time.step.tokens_per_second_per_gpu,
            "tokens_per_day": time.step.tokens_per_day,
            "mfu": time.step.mfu,
        },
        "cost": fit.cost and asdict(fit.cost),
        "advice": [asdict(advice) for advice in fit.advice],
        "notes": list(fit.notes),
    }


def as_text(prepared: Prepared, expected_start: str = "") -> str:
    """The same, for people."""
    return "\n".join(_lines(prepared, expected_start)) + "\n"


def _lines(prepared: Prepared, expected_start: str) -> Iterator[str]:
    spec, plan = prepared.spec, prepared.plan
    ranks = spec.resources.world_size
    gpus = f"{plan.nodes * plan.gpus_per_node} GPUs" if plan.gpus_per_node else "CPUs only"
    yield f"{plan.job_name} on {spec.cluster_name}: {plan.nodes} node(s), {gpus}, {ranks} rank(s), {plan.runtime}"
    yield f"run directory: {plan.run_dir} (not made by a dry run)"
    if expected_start:
        yield expected_start
    for warning in plan.warnings:
        yield f"warning: {printable(warning)}"
    yield from _section("Does it fit?", _fit(prepared.fit))
    if plan.scheduler == "slurm":
        yield from _section("Batch script", batch_script(plan).splitlines(), indent="")
    else:
        yield from _section("Every node runs, held by the node agent", wrapped(run_argv(plan, SYMBOLIC_NODE)))
    yield from _section("Environment of the training", map(_variable, plan.environment))
    yield from _section("The same by hand on one node, with a shell in place of the program", by_hand(plan))


def _section(title: str, lines: Any, indent: str = "  ") -> Iterator[str]:
    found = [indent + line for line in lines]
    if found:
        yield ""
        yield f"── {title} " + "─" * max(0, 90 - len(title))
        yield from found


def _fit(fit: Fit) -> Iterator[str]:
    yield from map(demand_line, fit.demands)
    yield from time_lines(fit)
    yield from fit.notes
    yield from (f"would fit: {advice}" for advice in fit.advice)


def _variable(setting: Any) -> str:
    return f"{printable(setting.name)}={printable(setting.value or '')}  # {setting.set_by}"
