"""What a run costs: hours, GPU-hours, money and energy, each as an interval."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.planner.accelerators import accelerator
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.step_time import StepTime
from cpm_cluster.specs.gpu import Gpu

SECONDS_PER_HOUR = 3600.0

# What a cluster draws beside its GPUs at their power limit. For BLOOM: 433,196 kWh for 1,082,990 A100 hours at 400 W,
# and 256,646 kWh of idle draw. An upper value for the GPUs: cards that wait draw less than their limit.
REST_OF_CLUSTER = 1.59
ENERGY_SOURCE = "board power limit × 1.59 for the rest of the cluster: Luccioni et al. 2022, BLOOM"


@dataclass(frozen=True)
class Estimate:
    """A value and its interval."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        return Estimate(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Cost:
    """A number of steps, without the start, evaluations, checkpoints or restarts."""

    steps: int
    seconds: Estimate
    gpu_hours: Estimate
    price_usd: Estimate | None  # None: nobody states a price
    price_source: str
    energy_kwh: Estimate
    energy_source: str


def cost(
    setup: Setup, step: StepTime, steps: int, card: Gpu | None = None, cluster_price_usd: float | None = None
) -> Cost:
    """The cost of `steps` optimizer steps.

    `card` replaces the packaged catalogue's entry of `setup.gpu`; `cluster_price_usd` is the cluster's own price of a
    GPU hour, which goes before the catalogue's.
    """
    known = accelerator(setup.gpu, card)
    seconds = Estimate(step.seconds, step.low, step.high).times(steps)
    gpu_hours = seconds.times(step.gpus / SECONDS_PER_HOUR)
    price, source = cluster_price_usd, "the cluster's own price"
    if price is None and not known.stand_in:
        price, source = known.card.price_per_hour_usd, "a usual on-demand price: gpus.yaml"
    if price is None:
        source = "no price of this GPU is known; state gpu_price_per_hour_usd in the cluster file"
    kilowatts = known.links.board_power_w * REST_OF_CLUSTER / 1000
    return Cost(
        steps=steps,
        seconds=seconds,
        gpu_hours=gpu_hours,
        price_usd=None if price is None else gpu_hours.times(price),
        price_source=source,
        energy_kwh=gpu_hours.times(kilowatts),
        energy_source=ENERGY_SOURCE,
    )
