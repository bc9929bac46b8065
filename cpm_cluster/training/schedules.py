"""Learning-rate schedules: pure functions of the step.

Each returns the factor on the peak rate at ``step`` (1 for the first update). During warm-up the factor is
``step / warmup`` in all of them; afterwards ``progress`` = (step - warmup) / (steps - warmup) runs from 0 to
1.
"""

from __future__ import annotations

import math
from typing import Callable

from cpm_cluster.training.settings import TrainingSettings

# MiniCPM decays in the last tenth of the run.
_WSD_DECAY_SHARE = 0.1


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """floor + (1 - floor) (1 + cos(π progress)) / 2 (Loshchilov and Hutter 2017, eq. 5, one cycle)."""
    if step < warmup:
        return step / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * _progress(step, steps, warmup))) / 2


def linear(step: int, steps: int, warmup: int, floor: float) -> float:
    """1 - (1 - floor) progress (the decay of BERT's optimisation, Devlin et al. 2019, with a floor)."""
    if step < warmup:
        return step / warmup
    return 1 - (1 - floor) * _progress(step, steps, warmup)


def wsd(step: int, steps: int, warmup: int, floor: float) -> float:
    """Warm up, stay at 1, fall linearly to ``floor`` in the last tenth of the run.

    Warmup-stable-decay of MiniCPM (Hu et al. 2024, §4) with the linear cooldown of Hägele et al. 2024 (eq.
    1).
    """
    if step < warmup:
        return step / warmup
    decay_from = max(warmup, steps - max(1, round(_WSD_DECAY_SHARE * steps)))
    return 1 - (1 - floor) * max(0.0, _progress(step, steps, decay_from))


def noam(step: int, steps: int, warmup: int, floor: float) -> float:
    """min(step / warmup, √(warmup / step)), not below ``floor`` after warm-up.

    Vaswani et al. 2017, eq. 3, scaled so that the peak is 1; BMTrain's Noam is this divided by √warmup.
    """
    if step < warmup:
        return step / warmup
    return max(floor, math.sqrt(max(warmup, 1) / step))


def constant(step: int, steps: int, warmup: int, floor: float) -> float:
    """1 after warm-up."""
    return step / warmup if step < warmup else 1.0


def learning_rate(step: int, training: TrainingSettings) -> float:
    """Return the learning rate of update ``step``, from 1 to ``training.steps``."""
    factor = _SCHEDULES[training.schedule]
    return training.lr * factor(step, training.steps, training.warmup_steps, training.min_lr_ratio)


def _progress(step: int, steps: int, start: int) -> float:
    # A run that only warms up ends at the peak.
    return min(1.0, (step - start) / (steps - start)) if steps > start else 0.0


_SCHEDULES: dict[str, Callable[[int, int, int, float], float]] = {
    "cosine": cosine,
    "wsd": wsd,
    "linear": linear,
    "noam": noam,
    "constant": constant,
}
