"""Fit the constants of planner/step_time.py to measured speeds, and say how well they do on what they have not seen.

    python benchmarks/fit_planner_time.py ROWS.csv [--evaluate-only]

Prints the fitted `Constants`, the errors by engine, card and source, and the same where whole sources and whole models
were left out of the fit. Only rows with use_time are taken. A source of many rows weighs as the square root of their
number, so that no single table decides.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cpm_cluster.planner.accelerators import accelerator
from cpm_cluster.planner.rows import Row, read_rows
from cpm_cluster.planner.step_time import step_time
from cpm_cluster.planner.time_constants import CONSTANTS, Constants

# Where every fit starts: round values from data sheets, kernel papers and counted bytes, not the outcome of a fit.
START = Constants(
    linear_volta=0.55,
    linear_ampere=0.7,
    linear_hopper=0.65,
    flash_ampere=0.65,
    flash2_ampere=1.0,
    flash_hopper=0.35,
    cudnn_hopper=0.5,
    traffic_transformers=6,
    traffic_torch=3,
    traffic_fused=1.2,
    traffic_compiled=1.2,
    fp8_gain=1.6,
    launch_transformers=1.5e-3,
    launch_lean=0.6e-3,
    launch_gather=1.5e-3,
    launch_unpack=0.6e-3,
    dequantise=6,
    unaligned_heads=16,
    node_use=0.6,
    fabric_use=0.6,
    overlap=0.6,
    overlap_deepspeed=0.4,
    stragglers=0.01,
)
PRIOR_WEIGHT = 0.004  # of the squared logarithms of all moves: keeps a constant that no row speaks of
STEPS = (0.3, 0.12, 0.05, 0.02)
TOLERANCE = 1e-5
UPPER = {"node_use": 0.95, "fabric_use": 0.95, "overlap": 0.95, "fp8_gain": 1.9, "flash2_ampere": 1.3}


@dataclass(frozen=True)
class Sample:
    row: Row
    tokens_per_s: float
    weight: float


def samples(path: Path) -> list[Sample]:
    """Rows with a usable speed; where only an MFU is published, the speed that it means."""
    timed = [row for row in read_rows(path) if row.use_time]
    rows = [row for row in timed if accelerator(row.setup.gpu).known]
    if len(rows) < len(timed):
        print(f"left aside: {len(timed) - len(rows)} rows of a card that isn't known")
    size: dict[str, int] = defaultdict(int)
    for row in rows:
        size[row.source] += 1
    return [Sample(row, _speed(row), 1 / math.sqrt(size[row.source])) for row in rows]


def _speed(row: Row) -> float:
    if row.reading.tokens_per_s_per_gpu:
        return row.reading.tokens_per_s_per_gpu
    setup, shape = row.setup, row.setup.shape
    per_token = 6 * shape.parameters + 6 * shape.layers * shape.hidden * setup.seq_len  # as Megatron's tables: causal
    return (row.reading.mfu or math.nan) * accelerator(setup.gpu).peak(setup.precision) / per_token


def error(sample: Sample, constants: Constants) -> float:
    """Predicted over measured speed, less one."""
    predicted = step_time(sample.row.setup, constants=constants).tokens_per_second_per_gpu
    return predicted / sample.tokens_per_s - 1


def fit(data: Sequence[Sample], start: Constants = START) -> Constants:
    """Least absolute logarithms, by a search along one constant after the other with ever smaller factors."""
    total = sum(sample.weight for sample in data)

    def loss(at: Constants) -> float:
        misfit = sum(s.weight * abs(math.log1p(error(s, at))) for s in data) / total
        moved = sum(math.log(value / asdict(start)[name]) ** 2 for name, value in asdict(at).items())
        return misfit + PRIOR_WEIGHT * moved

    best, lowest = start, loss(start)
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for name in asdict(start):
                for factor in (1 + step, 1 / (1 + step)):
                    value = min(asdict(best)[name] * factor, UPPER.get(name, math.inf))
                    trial = replace(best, **{name: value})
                    at = loss(trial)
                    if at < lowest - TOLERANCE:
                        best, lowest, improved = trial, at, True
                        break
    return best


def left_out(data: Sequence[Sample], group: Callable[[Row], str], folds: int) -> Iterator[tuple[Sample, float]]:
    """Each row's error by a fit that saw nothing of its group. Groups are dealt into folds by size."""
    members: dict[str, list[Sample]] = defaultdict(list)
    for sample in data:
        members[group(sample.row)].append(sample)
    ordered = sorted(members, key=lambda name: -len(members[name]))
    for fold in range(min(folds, len(ordered))):
        out = set(ordered[fold::folds])
        constants = fit([s for s in data if group(s.row) not in out])
        for name in sorted(out):
            yield from ((sample, error(sample, constants)) for sample in members[name])


def topology(row: Row) -> str:
    setup = row.setup
    return f"tp{setup.tp} pp{setup.pp} on {setup.gpus}"


def report(title: str, errors: Sequence[tuple[Sample, float]], group: Callable[[Row], str] | None = None) -> None:
    """MAPE of the step time (measured over predicted speed) and of the speed, and the shares within 10, 20 %."""
    groups: dict[str, list[float]] = defaultdict(list)
    for sample, value in errors:
        groups[group(sample.row) if group else "all"].append(value)
    print(f"\n{title}\n{'rows':>5} {'time':>7} {'speed':>7} {'bias':>7} {'10 %':>6} {'20 %':>6}")
    for name, values in sorted(groups.items()):
        count = len(values)
        time = sum(abs(1 / (1 + v) - 1) for v in values) / count
        speed = sum(map(abs, values)) / count
        within = [sum(abs(v) <= limit for v in values) / count for limit in (0.1, 0.2)]
        shares = " ".join(f"{share:6.0%}" for share in within)
        print(f"{count:5} {time:7.1%} {speed:7.1%} {sum(values) / count:+7.1%} {shares}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--evaluate-only", action="store_true", help="the constants as they are, nothing fitted")
    options = parser.parse_args()
    data = samples(options.rows)
    constants = CONSTANTS
    if not options.evaluate_only:
        constants = fit(data)
        for name, value in asdict(constants).items():
            print(f"    {name}: float = {value:.3g}")
    errors = [(sample, error(sample, constants)) for sample in data]
    report("in sample", errors)
    report("in sample, by engine, mode and card", errors, lambda r: f"{r.setup.engine} {r.setup.mode} {r.setup.gpu}")
    report("in sample, by source", errors, lambda row: row.source)
    if not options.evaluate_only:
        for name, group in (("sources", lambda r: r.source), ("models", lambda r: r.model), ("topologies", topology)):
            unseen = list(left_out(data, group, folds=6))
            report(f"left out: whole {name}", unseen)
            report(f"left out: whole {name}, by engine and card", unseen, lambda r: f"{r.setup.engine} {r.setup.gpu}")


if __name__ == "__main__":
    main()
