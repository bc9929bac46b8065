"""Fit the constants of the planner's memory model to a table of measured runs, and predict what was held out.

    python benchmarks/fit_planner.py ROWS.csv [--hold-out source|model|engine]

Coordinate descent on the mean absolute log error, each source weighted by the root of its rows. Censored readings and
runs that fitted count where the prediction lies above them. With --hold-out every group is predicted by constants that
were fitted without it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from cpm_cluster.planner.gpu_memory import gpu_memory, reading
from cpm_cluster.planner.memory_constants import CONSTANTS, MIB, MemoryConstants
from cpm_cluster.planner.rows import Row, read_rows

GROUPS: dict[str, Callable[[Row], str]] = {
    "source": lambda row: row.source,
    "model": lambda row: row.model,
    "engine": lambda row: row.setup.engine,
}
STEPS = (0.3, 0.1, 0.03)
PRIOR = 2e-3  # for each e-fold away from the value that the mechanism suggests


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
    near_default = sum(abs(math.log(getattr(constants, f.name) / f.default)) for f in fields(constants))
    return total / sum(weights[row.source] for row in rows) + PRIOR * near_default


def fit(rows: list[Row], start: MemoryConstants = CONSTANTS) -> MemoryConstants:
    rows = [row for row in rows if log_error(row, start) is not None]
    weights = {source: count**-0.5 for source, count in Counter(row.source for row in rows).items()}
    best, constants = loss(rows, weights, start), start
    for step in STEPS:
        for _ in range(3):
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--hold-out", choices=tuple(GROUPS))
    options = parser.parse_args()
    rows = read_rows(options.rows)
    if options.hold_out is None:
        constants = fit(rows)
        for field in fields(constants):
            print(f"{field.name:28} {getattr(constants, field.name):.4g}")
        show("in-sample", rows, constants)
        return 0
    group = GROUPS[options.hold_out]
    everything: list[float] = []
    for name in sorted({group(row) for row in rows if row.use_gpu}):
        constants = fit([row for row in rows if group(row) != name])
        everything += show(name, [row for row in rows if group(row) == name], constants)
    within = sum(error <= 0.1 for error in everything) / len(everything)
    print(f"\nheld out by {options.hold_out}: MAPE {sum(everything) / len(everything):.1%}, within 10 % {within:.0%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
