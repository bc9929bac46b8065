"""Fit the constants of the planner's memory model to a table of measured runs, and predict what was held out.

    python benchmarks/fit_planner.py ROWS.csv [MORE.csv …] [--hold-out source|model|engine]

Coordinate descent on the mean absolute log error, each source weighted by the root of its rows. Censored readings and
runs that fitted count where the prediction lies above them. With --hold-out every group is predicted by constants that
were fitted without it, from START, which no fit has touched.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from cpm_cluster.planner.gpu_memory import gpu_memory, gpu_need, reading
from cpm_cluster.planner.host_memory import host_memory
from cpm_cluster.planner.memory_constants import MIB, MemoryConstants
from cpm_cluster.planner.rows import Row, read_rows

GROUPS: dict[str, Callable[[Row], str]] = {
    "source": lambda row: row.source,
    "model": lambda row: row.model,
    "engine": lambda row: row.setup.engine,
}
# Where every fit starts, and where it stays without rows: counted bytes and round numbers, not the outcome of a fit.
START = MemoryConstants(
    context=800,
    communicator=300,
    communicator_across_nodes=600,
    block=1.0,
    plain_block=1.0,
    compiled_block=0.7,
    quantised_inputs=1.0,
    logits_half=6,  # logits, shifted copy, log-softmax
    logits_upcast=18,  # half logits; fp32 ones, shifted copy, log-softmax, gradient
    logits_autocast=12,  # two in half, log-softmax and gradient
    logits_metrics=22,  # as upcast, and the copy of the trainer
    logits_sharded=14,  # half logits; fp32 ones, log-softmax, gradient
    logits_megatron=12,  # two in half, two in fp32
    logits_fused=4,  # logits and gradient
    fragmentation=0.05,
    ragged=1.0,
    pipeline_fragmentation=0.3,
)
STEPS = (0.3, 0.1, 0.03)
ROUNDS = 6
PRIOR = 2e-3  # for each e-fold away from START


def log_error(row: Row, constants: MemoryConstants) -> float | None:
    """Of the prediction against the reading; above a bound only, where there is but a bound."""
    expected = reading(gpu_memory(row.setup, constants), row.setup).bytes / MIB
    if row.use_gpu and row.reading.gpu_memory_mib:
        return math.log(expected / row.reading.gpu_memory_mib)
    if row.use_fit and row.reading.outcome == "ok" and row.setup.gpu_memory_mib:
        return max(0.0, math.log(expected / row.setup.gpu_memory_mib))
    return None


def loss(rows: list[Row], weights: dict[str, float], constants: MemoryConstants) -> float:
    total = sum(weights[row.source] * abs(log_error(row, constants) or 0.0) for row in rows)
    moved = sum(abs(math.log(getattr(constants, f.name) / getattr(START, f.name))) for f in fields(constants))
    return total / sum(weights[row.source] for row in rows) + PRIOR * moved


def fit(rows: list[Row]) -> MemoryConstants:
    rows = [row for row in rows if log_error(row, START) is not None]
    weights = {source: count**-0.5 for source, count in Counter(row.source for row in rows).items()}
    best, constants = loss(rows, weights, START), START
    for step in STEPS:
        for _ in range(ROUNDS):
            before = best
            for field in fields(constants):
                for factor in (1 + step, 1 / (1 + step)):
                    tried = replace(constants, **{field.name: getattr(constants, field.name) * factor})
                    now = loss(rows, weights, tried)
                    if now < best:
                        best, constants = now, tried
            if best > before - 1e-5:
                break
    return constants


def show(name: str, rows: list[Row], constants: MemoryConstants) -> list[float]:
    errors = [abs(math.expm1(log_error(row, constants) or 0.0)) for row in rows if row.use_gpu]
    if errors:
        within = sum(error <= 0.1 for error in errors) / len(errors)
        print(f"{name[:60]:60} {len(errors):4} rows  MAPE {sum(errors) / len(errors):6.1%}  within 10 % {within:5.0%}")
    return errors


def is_false_fit(row: Row, constants: MemoryConstants) -> bool:
    """A run that died, and that the planner would have let go."""
    setup = row.setup
    if not row.use_fit or row.reading.outcome == "ok":
        return False
    on_gpu = gpu_need(setup, constants).verdict(setup.gpu_memory_mib) in ("fits", "capacity unknown")
    return on_gpu and not (setup.host_memory_gb and host_memory(setup).high > setup.host_memory_gb * 1e9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--hold-out", choices=tuple(GROUPS))
    options = parser.parse_args()
    rows = [row for path in options.rows for row in read_rows(path)]
    if options.hold_out is None:
        constants = fit(rows)
        for field in fields(constants):
            print(f"{field.name:28} {getattr(constants, field.name):.4g}")
        show("in-sample", rows, constants)
        return 0
    group = GROUPS[options.hold_out]
    everything: list[float] = []
    false_fits: list[str] = []
    for name in sorted({group(row) for row in rows if row.use_gpu or row.use_fit}):
        constants = fit([row for row in rows if group(row) != name])
        held_out = [row for row in rows if group(row) == name]
        everything += show(name, held_out, constants)
        false_fits += [row.id for row in held_out if is_false_fit(row, constants)]
    within = sum(error <= 0.1 for error in everything) / len(everything)
    print(f"\nheld out by {options.hold_out}: MAPE {sum(everything) / len(everything):.1%}, within 10 % {within:.0%}")
    print(f"false fits: {', '.join(false_fits) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
