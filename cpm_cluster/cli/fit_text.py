"""What the planner found, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.planner.cost import Cost, Estimate
from cpm_cluster.planner.fit import Demand, Fit
from cpm_cluster.specs.values import format_duration, format_size

NOTHING_HELPS = "no three changes together make it fit: it needs a smaller model, or GPUs and nodes with more memory"


def demand_line(demand: Demand) -> str:
    """One demand with its parts."""
    have = f" of {format_size(demand.capacity_bytes)}" if demand.capacity_bytes is not None else ""
    parts = ", ".join(f"{c.name} {format_size(c.bytes)}" for c in demand.components)
    return (
        f"{demand.resource:<11} {demand.verdict}: {demand.size} for each {demand.per}{have}, {demand.instant} ({parts})"
    )


def time_lines(fit: Fit) -> Iterator[str]:
    """Steps and what they cost; nothing where no time is predicted."""
    if fit.time:
        time, step = fit.time, fit.time.step
        yield f"{'time':<11} {time.verdict}: {time.size}, {time.limit}"
        each = "GPU" if step.peak_flops else "rank"
        speed = f"{step.tokens_per_second_per_gpu:,.0f} tokens/s a {each}, {step.tokens_per_day:.3g} tokens a day"
        mfu = f", MFU {step.mfu:.0%}" if step.mfu is not None else ""
        yield f"{'step':<11} {_seconds(step.seconds)} × {time.steps:,} steps; {speed}{mfu}"
    if fit.cost:
        yield f"{'cost':<11} {cost_text(fit.cost)}"


def cost_text(cost: Cost) -> str:
    """`1,235 GPU hours, 4,236 USD (3,530 to 5,083; a usual on-demand price), 785 kWh (655 to 943)`."""
    price = f"{_range(cost.price_usd, 'USD', cost.price_source)}, " if cost.price_usd else f"{cost.price_source}; "
    return f"{cost.gpu_hours.value:,.0f} GPU hours, {price}{_range(cost.energy_kwh, 'kWh')}"


def headline(fit: Fit) -> str:
    """One line for the head of a submission: `fits: GPU memory 44.9 of 79.3 GiB, …, 19 h, 4,236 USD`."""
    found = [
        f"{demand.resource} {format_size(demand.bytes)} of {format_size(demand.capacity_bytes)}"
        for demand in fit.demands
        if demand.capacity_bytes is not None
    ]
    if fit.time:
        found.append(f"about {format_duration(fit.time.seconds)}")
    if fit.cost and fit.cost.price_usd:
        found.append(f"{fit.cost.price_usd.value:,.0f} USD")
    return f"{fit.told}: {', '.join(found)}" if found else fit.told


def refusal(fit: Fit) -> str:
    """Why a job is not submitted, and what would make it fit."""
    advice = [f"  {advice}\n    {' '.join(f'--set {text}' for text in advice.overrides)}" for advice in fit.advice]
    helps = ["what would make it fit:", *advice] if advice else [NOTHING_HELPS] if fit.nothing_helps else fit.notes
    lines = ["this job does not fit:", *(f"  {text}" for text in fit.shortages()), *helps]
    return "\n".join([*lines, "cpm plan JOB shows all figures; --force submits it nevertheless"])


def _range(estimate: Estimate, unit: str, why: str = "") -> str:
    return f"{estimate.value:,.0f} {unit} ({estimate.low:,.0f} to {estimate.high:,.0f}{'; ' + why if why else ''})"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.3g} s"
