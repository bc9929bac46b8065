"""What a card and its usual server can do, for predictions of time: peaks, links, power."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from cpm_cluster.specs.catalogue import packaged_configs
from cpm_cluster.specs.fields import Invalid, Reading, Section
from cpm_cluster.specs.gpu import Gpu
from cpm_cluster.specs.nodes import MapNode, Node, read_yaml
from cpm_cluster.specs.problems import Problem


@dataclass(frozen=True)
class Links:
    """The usual server of a card. Rates are of one direction, 10^9 bytes/s."""

    gpu_to_gpu: float  # of one GPU within a node: NVLink, or PCIe where there is none
    host: float  # of one GPU to the host's memory: PCIe, practical rate
    fabric: float  # of a whole node to the others
    board_power_w: float
    source: str


# NVLink is half of the data sheet's bidirectional figure; bridges, which join two PCIe cards, are not counted.
# PCIe: three quarters of the nominal 16, 32 and 64 (assumed).
_PCIE3, _PCIE4, _PCIE5 = 12.0, 24.0, 48.0
LINKS: Mapping[str, Links] = {
    "p40-24g": Links(_PCIE3, _PCIE3, 3.1, 250, "NVIDIA Tesla P40 data sheet; 25 Gb/s Ethernet assumed"),
    "v100-16g": Links(150, _PCIE3, 12.5, 300, "NVIDIA V100 data sheet; 100 Gb/s assumed (p3.16xlarge: 25)"),
    "v100-32g": Links(150, _PCIE3, 12.5, 300, "NVIDIA V100 data sheet; p3dn.24xlarge: 100 Gb/s"),
    "v100-pcie-16g": Links(_PCIE3, _PCIE3, 12.5, 250, "NVIDIA V100 data sheet; 100 Gb/s assumed"),
    "v100-pcie-32g": Links(_PCIE3, _PCIE3, 12.5, 250, "NVIDIA V100 data sheet; 100 Gb/s assumed"),
    "t4-16g": Links(_PCIE3, _PCIE3, 12.5, 70, "NVIDIA T4 data sheet; 100 Gb/s assumed"),
    "titanrtx-24g": Links(_PCIE3, _PCIE3, 3.1, 280, "limit in nvidia-smi; 25 Gb/s Ethernet assumed"),
    "rtx2080ti-11g": Links(_PCIE3, _PCIE3, 3.1, 250, "NVIDIA Turing white paper; 25 Gb/s Ethernet assumed"),
    "a100-40g": Links(300, _PCIE4, 200, 400, "NVIDIA A100 data sheet; DGX A100: 8 × 200 Gb/s (p4d.24xlarge: 400)"),
    "a100-80g": Links(300, _PCIE4, 200, 400, "NVIDIA A100 data sheet; DGX A100: 8 × 200 Gb/s"),
    "a100-pcie-40g": Links(_PCIE4, _PCIE4, 12.5, 250, "NVIDIA A100 data sheet; 100 Gb/s assumed"),
    "a100-pcie-80g": Links(_PCIE4, _PCIE4, 12.5, 300, "NVIDIA A100 data sheet; 100 Gb/s assumed"),
    "a30-24g": Links(_PCIE4, _PCIE4, 12.5, 165, "NVIDIA A30 data sheet; 100 Gb/s assumed"),
    "a800-80g": Links(200, _PCIE4, 200, 400, "NVIDIA A800 data sheet; 8 × 200 Gb/s assumed, as DGX A100"),
    "rtx3090-24g": Links(_PCIE4, _PCIE4, 3.1, 350, "NVIDIA GA102 white paper; 25 Gb/s Ethernet assumed"),
    "rtx3090ti-24g": Links(_PCIE4, _PCIE4, 3.1, 450, "limit in nvidia-smi; 25 Gb/s Ethernet assumed"),
    "rtxa6000-48g": Links(_PCIE4, _PCIE4, 12.5, 300, "NVIDIA RTX A6000 data sheet; 100 Gb/s assumed"),
    "rtxa5000-24g": Links(_PCIE4, _PCIE4, 12.5, 230, "NVIDIA RTX A5000 data sheet; 100 Gb/s assumed"),
    "a10-24g": Links(_PCIE4, _PCIE4, 12.5, 150, "NVIDIA A10 data sheet; 100 Gb/s assumed"),
    "a10g-24g": Links(_PCIE4, _PCIE4, 12.5, 300, "NVIDIA A10G data sheet; g5.48xlarge: 100 Gb/s"),
    "a40-48g": Links(_PCIE4, _PCIE4, 12.5, 300, "NVIDIA A40 data sheet; 100 Gb/s assumed"),
    "rtx4090-24g": Links(_PCIE4, _PCIE4, 3.1, 450, "NVIDIA Ada white paper; 25 Gb/s Ethernet assumed"),
    "rtx4080-16g": Links(_PCIE4, _PCIE4, 3.1, 320, "limit in nvidia-smi; 25 Gb/s Ethernet assumed"),
    "rtx4070tisuper-16g": Links(_PCIE4, _PCIE4, 3.1, 285, "limit in nvidia-smi; 25 Gb/s Ethernet assumed"),
    "rtx6000ada-48g": Links(_PCIE4, _PCIE4, 12.5, 300, "NVIDIA RTX PRO Blackwell white paper; 100 Gb/s assumed"),
    "l4-24g": Links(_PCIE4, _PCIE4, 12.5, 72, "NVIDIA L4 data sheet; 100 Gb/s assumed"),
    "l40-48g": Links(_PCIE4, _PCIE4, 12.5, 300, "NVIDIA L40 data sheet; 100 Gb/s assumed"),
    "l40s-48g": Links(_PCIE4, _PCIE4, 50, 350, "NVIDIA L40S data sheet; g6e.48xlarge: 400 Gb/s"),
    "h20-96g": Links(450, _PCIE5, 400, 400, "NVIDIA H20 data sheet; 8 × 400 Gb/s assumed, as DGX H100"),
    "h100-80g": Links(450, _PCIE5, 400, 700, "NVIDIA H100 data sheet; DGX H100: 8 × 400 Gb/s"),
    "h100-96g": Links(
        450, _PCIE5, 400, 500, "torchtitan benchmarks/llama3_h100_202412_torchtitan.md: 400 Gb/s a GPU, 500 W"
    ),
    "h100-pcie-80g": Links(_PCIE5, _PCIE5, 50, 350, "NVIDIA H100 PCIe product brief; 400 Gb/s assumed"),
    "h100-nvl-94g": Links(_PCIE5, _PCIE5, 50, 400, "NVIDIA H100 data sheet; 400 Gb/s assumed"),
    "gh200-96g": Links(
        450, 338, 50, 700, "NVIDIA GH200 data sheet; host: 3/4 of NVLink-C2C's 450; W from nvidia-smi; 400 Gb/s assumed"
    ),
    "h800-80g": Links(200, _PCIE5, 400, 700, "NVIDIA H800 data sheet; 8 × 400 Gb/s assumed, as DGX H100"),
    "h200-141g": Links(450, _PCIE5, 400, 700, "NVIDIA H200 data sheet; DGX H200: 8 × 400 Gb/s"),
    "b200-180g": Links(900, _PCIE5, 400, 1000, "NVIDIA HGX B200 data sheet; p6-b200.48xlarge: 8 × 400 Gb/s"),
    "rtx5090-32g": Links(_PCIE5, _PCIE5, 3.1, 575, "NVIDIA RTX Blackwell white paper; 25 Gb/s Ethernet assumed"),
    "rtxpro6000-96g": Links(_PCIE5, _PCIE5, 12.5, 600, "NVIDIA RTX PRO Blackwell white paper; 100 Gb/s assumed"),
}


@dataclass(frozen=True)
class Accelerator:
    """A card in its server."""

    name: str
    card: Gpu
    links: Links
    known: bool = True  # False: its links are a guess, so the interval is wider
    stand_in: bool = False  # True: the figures are another card's

    @property
    def generation(self) -> str:
        """By compute capability, the finest grain at which efficiencies are known.

        12.x (RTX Blackwell) has Ampere's matrix instructions: `wgmma` needs 9.0, `tcgen05` 10.x (PTX ISA).
        """
        sm = self.card.sm
        return "volta" if sm < 80 else "hopper" if 90 <= sm < 120 else "ampere"

    def peak(self, precision: str) -> float:
        """FLOP/s of the 16-bit tensor cores; of fp32 where the run computes in it (V100: 1/8; TF32: 1/2).

        Pascal cards such as the P40 have no tensor cores and do fp16 at 1/64 of fp32, in which they are planned.
        """
        card = self.card
        peak = card.peak_bf16_tflops if "bf16" in precision and card.peak_bf16_tflops else card.peak_fp16_tflops
        if card.sm < 70:
            peak *= 64
        elif precision == "fp32":
            peak /= 2 if card.sm >= 80 else 8
        return peak * 1e12

    @property
    def has_fp8(self) -> bool:
        return self.card.sm >= 89

    @property
    def memory_bandwidth(self) -> float:
        """Bytes/s."""
        return self.card.memory_bandwidth_gb_s * 1e9


@lru_cache(maxsize=1)
def packaged_cards() -> Mapping[str, Gpu]:
    """The cards of the packaged gpus.yaml."""
    problems: list[Problem] = []
    tree = read_yaml(packaged_configs() / "gpus.yaml", "gpus", problems)
    entries: Mapping[str, Node] = tree.entries if tree else {}
    cards = {}
    for name, entry in entries.items():
        if isinstance(entry, MapNode):
            try:
                cards[name] = Section(Gpu).read(entry, name, Reading(problems))
            except Invalid:
                continue
    return cards


def accelerator(name: str, card: Gpu | None = None) -> Accelerator:
    """A card by its name in gpus.yaml; `card` is a catalogue's entry where it isn't the packaged one.

    A card that nothing is known of is planned as an A100 40 GB, and says so.
    """
    card = card or packaged_cards().get(name)
    if card is None:
        return Accelerator(name, packaged_cards()["a100-40g"], LINKS["a100-40g"], known=False, stand_in=True)
    if name in LINKS:
        return Accelerator(name, card, LINKS[name])
    return Accelerator(name, card, _usual_links(card), known=False)


def _usual_links(card: Gpu) -> Links:
    host = _PCIE3 if card.sm < 80 else _PCIE4 if card.sm < 90 else _PCIE5
    inside = (150.0 if card.sm < 80 else 300.0 if card.sm < 90 else 450.0) if card.nvlink else host
    return Links(inside, host, 12.5, 400, "not known: links of its generation, 100 Gb/s fabric, 400 W")
