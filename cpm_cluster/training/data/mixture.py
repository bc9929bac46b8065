"""The order of samples: a function of seed and place alone, so that any place in it is reached at once.

An epoch is a permutation of all samples, computed rather than stored (a Feistel network over the numbers of
samples), and cut into windows that are packed one at a time. However large the data, memory holds one window.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import Any, Sequence

import numpy as np
import numpy.typing as npt

# Best fit leaves a few rows of each window partly empty; with this many samples they do not matter.
WINDOW = 1 << 16
_ROUNDS = 6

Numbers = npt.NDArray[np.int64]


class Mixture:
    """Sources of ``sizes`` samples, numbered one after the other; weights are shares of samples, not of tokens.

    Without weights each epoch has every sample once. With weights, draws alternate between the sources in
    exact proportion, to within one sample at the end of each window; a source starts over, in another order,
    when all its samples have been drawn, and an epoch is as many draws as there are samples.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int, window: int = WINDOW) -> None:
        """Every source must have a sample."""
        self._seed = seed
        self._generator = np.random.RandomState()
        self._total = sum(sizes)
        if weights is None:
            sizes, weights = [self._total], [1.0]
        self._sizes = list(sizes)
        exact = [Fraction(weight) for weight in weights]
        self._shares = [weight / sum(exact) for weight in exact]
        self._per_epoch = -(-self._total // window)
        self._window = -(-self._total // self._per_epoch)

    @property
    def shares(self) -> list[float]:
        """The part of all draws that each source has."""
        return [float(share) for share in self._shares]

    def epoch_of(self, window: int) -> int:
        """Return the epoch (from 0) in which a window lies."""
        return window // self._per_epoch

    def window(self, number: int) -> Numbers:
        """Return the samples of a window (from 0, through all epochs), shuffled."""
        epoch, within = divmod(number, self._per_epoch)
        begin = epoch * self._total + within * self._window
        end = epoch * self._total + min(self._total, (within + 1) * self._window)
        drawn = []
        for source, share in enumerate(self._shares):
            draws = np.arange(int(begin * share), int(end * share), dtype=np.int64)
            drawn.append(sum(self._sizes[:source]) + self._samples_of(source, draws))
        together = np.concatenate(drawn)
        return together[self.generator("order", number).permutation(len(together))]

    def generator(self, *what: object) -> np.random.RandomState:
        """Return a generator for one purpose; the numbers of this kind never change (NumPy's NEP 19).

        It is valid until the next one is asked for: making one takes many times as long as seeding it anew.
        """
        digest = hashlib.sha256(repr((self._seed, *what)).encode("ascii")).digest()
        self._generator.seed(np.frombuffer(digest, "<u4"))
        return self._generator

    def _samples_of(self, source: int, draws: Numbers) -> Numbers:
        """Return the samples of one source that its n-th draws give; each pass is a permutation of its own."""
        size = self._sizes[source]
        if size == 1:
            return np.zeros_like(draws)
        passes, pass_of = np.unique(draws // size, return_inverse=True)
        keys = np.empty((_ROUNDS, len(passes)), dtype=np.uint64)
        for column, number in enumerate(passes.tolist()):
            keys[:, column] = self.generator("pass", source, number).randint(0, 1 << 32, _ROUNDS, dtype=np.uint64)
        return permuted(draws % size, size, keys[:, pass_of])


def permuted(numbers: Numbers, size: int, keys: npt.NDArray[np.uint64]) -> Numbers:
    """Return where permutations of ``range(size)`` send the numbers [n]; ``keys`` [rounds, n] choose that of each.

    A Feistel network permutes the next power of four; what falls outside is sent through it again ("cycle
    walking", Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    values = numbers.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], np.uint64(half), keys[:, outside])
        outside = values >= size
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: np.uint64, keys: npt.NDArray[np.uint64]) -> Any:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ (key << np.uint64(32))) & mask)
    return (left << half) | right


def _mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return well-spread 64-bit values: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
