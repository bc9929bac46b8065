"""The GPU catalogue: what a card can do and what an hour of it costs."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.specs.fields import Boolean, Integer, Number, Text, key


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One type of card."""

    product: str = key(Text(), "name of the product")
    memory_mib: int = key(Integer(1), "total memory as NVML reports it, MiB")
    sm: int = key(Integer(30, 200), "compute capability × 10: 70 V100, 80 A100, 90 H100")
    memory_bandwidth_gb_s: float = key(Number(1, 1e6), "memory bandwidth, 10^9 bytes/s")
    peak_fp16_tflops: float = key(Number(0.01, 1e6), "dense fp16 tensor-core peak, 10^12 FLOP/s")
    peak_bf16_tflops: float | None = key(
        Number(0.01, 1e6), "dense bf16 tensor-core peak, 10^12 FLOP/s; left out where there is none", None
    )
    nvlink: bool = key(Boolean(), "NVLink between the cards of a node in the usual server", False)
    price_per_hour_usd: float | None = key(Number(0, 1e6), "a usual on-demand price of one GPU hour, USD", None)
    source: str = key(Text(max_length=400), "where the figures are from")

    @property
    def has_bf16(self) -> bool:
        return self.peak_bf16_tflops is not None
