"""A calibration as a YAML file of its own, one for each image, GPU and engine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cpm_cluster.planner.calibration import Calibration, Scaling, Subject
from cpm_cluster.planner.term_groups import GPU_GROUPS, HOST_GROUPS, TIME_GROUPS
from cpm_cluster.specs.fields import Integer, Invalid, ListOf, MapOf, Number, Reading, Section, Text, key
from cpm_cluster.specs.nodes import MapNode, read_yaml
from cpm_cluster.specs.problems import Location, Problem, SpecError, listed

QUANTITIES = {"gpu_memory": GPU_GROUPS, "host_memory": HOST_GROUPS, "step_time": TIME_GROUPS}
MOST = 100.0  # nothing is multiplied by more, nor by less than its inverse


@dataclass(frozen=True, kw_only=True)
class _ScalingText:
    multipliers: dict[str, float] = key(
        MapOf(Number(1 / MOST, MOST), r"[a-z_]+", "a group of terms"), "multipliers, by group of terms"
    )
    covariance: tuple[tuple[float, ...], ...] = key(
        ListOf(ListOf(Number(-MOST, MOST)), expected="a list of rows, [[a, b], [b, c]]"),
        "covariance of the logarithms of the multipliers, in the order of the groups",
    )
    noise: float = key(Number(0, 10, above_minimum=True), "what a prediction is off besides, standard deviation")
    residual: float = key(Number(0, MOST), "what the runs are off, root mean square")
    runs: int = key(Integer(1), "how many runs told of it")


@dataclass(frozen=True, kw_only=True)
class _CalibrationText:
    image: str = key(Text(max_length=256), "name and tag of the image; '' without one")
    gpu: str = key(Text(), "the GPU, a name in gpus.yaml")
    engine: str = key(Text(), "the engine")
    modes: tuple[str, ...] = key(ListOf(Text(), minimum=1), "full or lora: of the runs")
    runs: tuple[str, ...] = key(ListOf(Text(), minimum=1), "the runs")
    date: str = key(Text(r"\d{4}-\d\d-\d\d", "a date such as 2026-01-31"), "when it was made")
    version: str = key(Text(), "the version of cpm-cluster that made it")
    gpu_memory: Any = key(Section(_ScalingText), "GPU memory", None)
    host_memory: Any = key(Section(_ScalingText), "host memory", None)
    step_time: Any = key(Section(_ScalingText), "time of a step", None)


def file_name(subject: Subject) -> str:
    """`cpmlive-flash-0.0.4-a100-80g-bmtrain.yaml`."""
    parts = (subject.image or "no-image", subject.gpu, subject.engine)
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-") for part in parts) + ".yaml"


def find_calibration(folder: Path, subject: Subject) -> Calibration | None:
    """The calibration of a subject among the files of a folder; None where there is none.

    Raises:
        SpecError: what is wrong with it, with file, line and column.
    """
    path = folder / file_name(subject)
    if not path.is_file():
        return None
    found = read_calibration(path)
    if found.subject != subject:  # two names of images may come to one name of a file
        return None
    return found


def read_calibration(path: Path) -> Calibration:
    """As `calibration_text` wrote it.

    Raises:
        SpecError: what is wrong with it, with file, line and column.
    """
    problems: list[Problem] = []
    tree = read_yaml(path, "calibration", problems)
    if tree is None:
        raise SpecError(problems)
    try:
        text: _CalibrationText = Section(_CalibrationText).read(tree, "", Reading(problems))
    except Invalid:
        raise SpecError(problems) from None
    scalings = {name: _scaling(tree, name, getattr(text, name), problems) for name in QUANTITIES}
    if problems:
        raise SpecError(problems)
    return Calibration(
        subject=Subject(text.image, text.gpu, text.engine),
        modes=text.modes,
        runs=text.runs,
        date=text.date,
        version=text.version,
        **scalings,
    )


def _scaling(tree: MapNode, name: str, text: _ScalingText | None, problems: list[Problem]) -> Scaling | None:
    if text is None:
        return None
    groups, section = QUANTITIES[name], tree.entries[name]
    where: dict[str, Location] = section.key_where if isinstance(section, MapNode) else {}
    if set(text.multipliers) != set(groups):
        problems.append(Problem(where["multipliers"], f"{name}.multipliers", f"write one of each of {listed(groups)}"))
        return None
    if not _is_covariance(text.covariance, len(groups)):
        what = f"is no covariance of {len(groups)} multipliers: {len(groups)} rows, symmetric, variances above 0"
        problems.append(Problem(where["covariance"], f"{name}.covariance", what))
        return None
    multipliers = tuple(text.multipliers[group] for group in groups)
    return Scaling(multipliers, text.covariance, text.noise, text.residual, text.runs)


def _is_covariance(matrix: tuple[tuple[float, ...], ...], size: int) -> bool:
    """No variance of any sum of terms may be negative: so it is where no |covariance| exceeds what variances allow."""
    if len(matrix) != size or any(len(row) != size for row in matrix):
        return False
    pairs = [(i, j) for i in range(size) for j in range(size)]
    return all(matrix[i][i] > 0 for i in range(size)) and all(
        abs(matrix[i][j] - matrix[j][i]) <= 1e-9 and matrix[i][j] ** 2 <= matrix[i][i] * matrix[j][j] * (1 + 1e-6)
        for i, j in pairs
    )


def calibration_text(calibration: Calibration) -> str:
    """The YAML file."""
    subject = calibration.subject
    values: dict[str, Any] = {
        "image": subject.image,
        "gpu": subject.gpu,
        "engine": subject.engine,
        "modes": list(calibration.modes),
        "runs": list(calibration.runs),
        "date": calibration.date,
        "version": calibration.version,
    }
    for name, groups in QUANTITIES.items():
        scaling: Scaling | None = getattr(calibration, name)
        if scaling is not None:
            values[name] = {
                "multipliers": dict(zip(groups, map(_rounded, scaling.multipliers), strict=True)),
                "covariance": [list(map(_rounded, row)) for row in scaling.covariance],
                "noise": _rounded(scaling.noise),
                "residual": _rounded(scaling.residual),
                "runs": scaling.runs,
            }
    head = "# Written by `cpm plan --calibrate`; delete the file to plan without it.\n"
    return head + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None)


def _rounded(value: float) -> float:
    return float(f"{value:.10g}")
