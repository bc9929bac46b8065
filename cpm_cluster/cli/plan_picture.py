"""The picture of a plan in a terminal: a bar of where the bytes go for each resource, verdicts, time, cost, advice."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from cpm_cluster.cli.fit_text import NOTHING_HELPS, time_lines
from cpm_cluster.planner.fit import Component, Demand, Fit, Verdict
from cpm_cluster.planner.suggest import Option, Suggestions
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.values import format_duration, format_size

BAR = 60  # cells
PIPE = 160  # columns of what is no terminal
SHOWN = 12  # suggestions
COLOURS = ("blue", "cyan", "magenta", "yellow", "bright_blue", "bright_cyan", "bright_magenta", "bright_yellow")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # tell parts apart where there are no colours
STYLES: dict[Verdict, str] = {
    "fits": "bold green",
    "tight": "bold yellow",
    "does not fit": "bold red",
    "capacity unknown": "bold",
}


def show(spec: JobSpec, fit: Fit) -> None:
    """Print the plan of a job; rich follows NO_COLOR and leaves colours out of pipes."""
    _print(_picture(spec, fit))


def show_suggestions(spec: JobSpec, found: Suggestions) -> None:
    """Print the Pareto set as a table, and how to type its first line."""
    _print(_suggestions(spec, found))


def _print(lines: Iterable[RenderableType]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE
    for line in lines:
        console.print(line, soft_wrap=isinstance(line, (str, Text)) and not console.is_terminal)


def _picture(spec: JobSpec, fit: Fit) -> Iterator[RenderableType]:
    yield Text(f"{spec.name} on {spec.cluster_name}: {_where(spec)}", style="bold")
    for demand in fit.demands:
        yield ""
        yield from _demand(demand)
    yield ""
    yield from map(Text, time_lines(fit))
    yield from (Text(note, style="dim") for note in fit.notes)
    yield Text.assemble("verdict     ", Text(fit.told, style=STYLES[fit.verdict]))
    if fit.does_not_fit and fit.nothing_helps:
        yield Text(f"  {NOTHING_HELPS}")
    for advice in fit.advice:
        yield Text.assemble("  would fit: " if fit.does_not_fit else "  to be safe: ", str(advice))
        yield Text("    " + " ".join(f"--set {text}" for text in advice.overrides), style="dim")


def _where(spec: JobSpec) -> str:
    resources = spec.resources
    if not resources.gpus_per_node:
        return f"{resources.nodes} node(s), CPUs only, {resources.world_size} rank(s)"
    card = spec.gpu.product if spec.gpu else "GPUs of unknown type"
    return f"{resources.nodes} node(s) × {resources.gpus_per_node} × {card}"


def _demand(demand: Demand) -> Iterator[RenderableType]:
    have = f" of {format_size(demand.capacity_bytes)}" if demand.capacity_bytes is not None else ""
    yield Text.assemble(
        Text(f"{demand.resource:<11} ", style="bold"),
        Text(demand.verdict, style=STYLES[demand.verdict]),
        f"  {demand.size}{have} for each {demand.per}, {demand.instant}",
    )
    parts = sorted((part for part in demand.components if part.bytes), key=lambda part: -part.bytes)
    if len(parts) > 1:
        yield _bar(demand, parts)
        yield _legend(parts)


def _bar(demand: Demand, parts: list[Component]) -> Text:
    """The capacity or the demand, whichever is larger; what is free are dots, what is too much follows a `|`."""
    capacity = demand.capacity_bytes or demand.bytes
    scale = BAR / max(capacity, demand.bytes)
    bar, edge, whole = Text("  "), 0, 0
    for number, part in enumerate(parts):
        whole += part.bytes
        for position in range(edge, round(whole * scale)):
            if position == round(capacity * scale):
                bar.append("|", style="bold red")
            bar.append(LETTERS[number % 26], style=_colour(number))
        edge = round(whole * scale)
    bar.append("·" * (BAR - edge), style="dim")
    return bar


def _colour(number: int) -> str:
    return f"{COLOURS[number % len(COLOURS)]} reverse"


def _legend(parts: list[Component]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    for _ in range(4):
        table.add_column(no_wrap=False)
    for number, part in enumerate(parts):
        basis = f"{part.formula} ({part.source})" if part.source else part.formula
        letter = Text.assemble("  ", Text(LETTERS[number % 26], style=_colour(number)))
        table.add_row(letter, Text(part.name), Text(format_size(part.bytes), justify="right"), Text(basis, style="dim"))
    return table


def _suggestions(spec: JobSpec, found: Suggestions) -> Iterator[RenderableType]:
    told = f"{found.considered:,} configurations considered"
    if not found.options:
        yield Text(f"{spec.name}: {told}, none of which surely fits")
        return
    yield Text(f"{spec.name} on {spec.cluster_name}: {told}; no other one beats these", style="bold")
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    for title in (
        "GPUs",
        "micro × accum.",
        "ZeRO",
        "offload",
        "recompute",
        "rank",
        "GPU memory",
        "time",
        "GPU h",
        "USD",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for option in found.options[:SHOWN]:
        table.add_row(*_row(option))
    yield table
    if len(found.options) > SHOWN:
        yield Text(f"… and {len(found.options) - SHOWN} more: --json lists all")
    changes = " ".join(f"--set {text}" for text in found.options[0].overrides)
    yield Text(f"the first: {changes or 'the job as it stands'}")


def _row(option: Option) -> Iterator[str]:
    yield f"{option.gpus}"
    yield f"{option.micro_batch} × {option.grad_accum}"
    yield f"{option.zero_stage}"
    yield "optimizer" if option.offload_optimizer else "none"
    yield option.recompute
    yield f"{option.lora_rank or '-'}"
    yield f"{format_size(option.gpu_bytes)}"
    yield format_duration(option.seconds)
    yield f"{option.gpu_hours:,.0f}"
    yield "-" if option.price_usd is None else f"{option.price_usd:,.0f}"
