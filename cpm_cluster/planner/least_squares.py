"""Multipliers of a few groups of terms by regularised least squares: drawn towards 1, as far as the data doesn't say.

A prediction is the largest of alternatives, each a sum of terms; the residual is log(predicted / measured). With the
logarithms t of the multipliers and standard deviations s of what is expected of them, (t / s)² is added to the squared
residuals: ridge regression (Hoerl and Kennard 1970). Residuals are taken as Student's t with 4 degrees of freedom, by
reweighted least squares (Lange, Little and Taylor 1989), so that one odd run doesn't bend the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Vector = tuple[float, ...]
Matrix = tuple[Vector, ...]

FREEDOM = 4.0  # degrees of freedom of the residuals
STEPS = 50
NOISE_ROUNDS = 4
# So many observations is the expected noise worth beside the residuals that were found.
NOISE_WEIGHT = 4.0


@dataclass(frozen=True)
class Observation:
    """A measurement, and the terms of its prediction by group, one vector for each alternative, of which one binds."""

    alternatives: tuple[Vector, ...]
    measured: float
    is_bound: bool = False  # the true value is at most what was measured


@dataclass(frozen=True)
class Solution:
    """`logs` are the logarithms of the multipliers, `covariance` theirs, `noise` what a prediction is off besides."""

    logs: Vector
    covariance: Matrix
    noise: float

    @property
    def multipliers(self) -> Vector:
        return tuple(math.exp(log) for log in self.logs)

    def deviation(self, scaled: Sequence[float]) -> float:
        """Standard deviation of log(prediction) for scaled terms, the noise included."""
        total = sum(scaled)
        slope = [term / total for term in scaled] if total else [0.0] * len(scaled)
        return math.sqrt(_form(self.covariance, slope) + self.noise**2)


def solve(observations: Sequence[Observation], expected: Vector, noise: float) -> Solution:
    """The multipliers; `expected` and `noise` are standard deviations of logarithms.

    The loss over the residuals is never larger than without multipliers: one observation alone never gets worse.
    """
    logs: Vector = (0.0,) * len(expected)
    estimate = noise
    for _ in range(NOISE_ROUNDS if observations else 0):
        logs = _minimum(observations, expected, estimate)
        off = [residual(each, logs) for each in observations]
        squares = sum(_weight(r / estimate) * r**2 for r in off)
        estimate = math.sqrt((NOISE_WEIGHT * noise**2 + squares) / (NOISE_WEIGHT + len(observations)))
    normal, _ = _normal_equations(observations, logs, expected, estimate)
    return Solution(logs, _inverse(normal), estimate)


def residual(observation: Observation, logs: Vector) -> float:
    """log(predicted / measured); of a bound, only what lies above it."""
    found = math.log(sum(_binding(observation, logs)) / observation.measured)
    return max(0.0, found) if observation.is_bound else found


def _binding(observation: Observation, logs: Vector) -> Vector:
    scaled = [tuple(x * math.exp(t) for x, t in zip(row, logs, strict=True)) for row in observation.alternatives]
    return max(scaled, key=sum)


def _minimum(observations: Sequence[Observation], expected: Vector, noise: float) -> Vector:
    """Gauss and Newton's steps from 1, halved until the objective falls."""
    logs: Vector = (0.0,) * len(expected)
    best = _objective(observations, logs, expected, noise)
    for _ in range(STEPS):
        normal, gradient = _normal_equations(observations, logs, expected, noise)
        step = [-sum(a * g for a, g in zip(row, gradient, strict=True)) for row in _inverse(normal)]
        share, found = 1.0, best
        while share > 1e-6:
            tried = tuple(t + share * d for t, d in zip(logs, step, strict=True))
            found = _objective(observations, tried, expected, noise)
            if found < best:
                break
            share /= 2
        if found >= best:
            return logs
        gain, logs, best = best - found, tried, found
        if gain < 1e-10 * (1 + best):
            return logs
    return logs


def _weight(off: float) -> float:
    """Of an observation whose residual is so many times the noise."""
    return (FREEDOM + 1) / (FREEDOM + off**2)


def _objective(observations: Sequence[Observation], logs: Vector, expected: Vector, noise: float) -> float:
    off = ((residual(each, logs) / noise) ** 2 for each in observations)
    loss = sum((FREEDOM + 1) * math.log1p(square / FREEDOM) for square in off)
    return loss + sum((t / s) ** 2 for t, s in zip(logs, expected, strict=True))


def _normal_equations(
    observations: Sequence[Observation], logs: Vector, expected: Vector, noise: float
) -> tuple[Matrix, Vector]:
    """Half of the objective's second (as reweighted squares) and first derivatives; a bound that holds says nothing."""
    size = len(logs)
    normal = [[1 / expected[i] ** 2 if i == j else 0.0 for j in range(size)] for i in range(size)]
    gradient = [t / s**2 for t, s in zip(logs, expected, strict=True)]
    for each in observations:
        off = residual(each, logs)
        if each.is_bound and off == 0.0:
            continue
        scaled = _binding(each, logs)
        slope = [term / sum(scaled) for term in scaled]
        weight = _weight(off / noise) / noise**2
        for i in range(size):
            gradient[i] += weight * slope[i] * off
            for j in range(size):
                normal[i][j] += weight * slope[i] * slope[j]
    return tuple(map(tuple, normal)), tuple(gradient)


def _inverse(matrix: Matrix) -> Matrix:
    """Gauss and Jordan's elimination; the matrix is positive definite, so that no pivot is zero."""
    size = len(matrix)
    rows = [[*row, *(float(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for i in range(size):
        pivot = rows[i][i]
        rows[i] = [value / pivot for value in rows[i]]
        for j in range(size):
            if j != i:
                factor = rows[j][i]
                rows[j] = [value - factor * above for value, above in zip(rows[j], rows[i], strict=True)]
    return tuple(tuple(row[size:]) for row in rows)


def _form(matrix: Matrix, vector: Sequence[float]) -> float:
    """v' M v, which rounding must not make negative."""
    rows = (sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix)
    return max(0.0, sum(r * v for r, v in zip(rows, vector, strict=True)))
