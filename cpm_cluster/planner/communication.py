"""Communication of one GPU: bytes by the algorithm, seconds by the slowest link that they cross.

Ring algorithms: an all-gather or a reduce-scatter of M bytes among n ranks moves M (n-1)/n through each rank, an
all-reduce twice that (Thakur et al. 2005; nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.planner.accelerators import Accelerator
from cpm_cluster.planner.flops import recomputes_all
from cpm_cluster.planner.setup import Setup

HALF = 2  # bytes
GIGA = 1e9


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, and how they lie in the nodes."""

    ranks: int
    per_node: int  # members within one node

    @property
    def spans_nodes(self) -> bool:
        return self.ranks > self.per_node


def tensor_group(setup: Setup) -> Group:
    """Neighbouring ranks, as Megatron places them."""
    return Group(setup.tp, min(setup.tp, setup.gpus_per_node))


def data_group(setup: Setup) -> Group:
    """Data-parallel ranks of one shard: every (tp × context)-th GPU, stages being furthest apart."""
    ranks = setup.dp * setup.context_parallel
    return Group(ranks, max(1, min(ranks, setup.gpus_per_node // setup.tp)))


@dataclass(frozen=True)
class Rates:
    """What links carry, bytes/s."""

    inside: float  # of one GPU within a node
    fabric: float  # of one node
    host: float  # of one GPU from and to the host
    gpus_per_node: int

    def ring(self, group: Group) -> float:
        """Of one rank: the members of a node share its network adapters with the node's other rings."""
        if not group.spans_nodes:
            return self.inside
        return min(self.inside, self.fabric * group.per_node / self.gpus_per_node)


def rates(setup: Setup, accelerator: Accelerator, node_use: float, fabric_use: float) -> Rates:
    """Nominal rates of the usual server, times the shares that are reached.

    PCIe is given as reached already; a copy from pageable memory goes through a buffer, at half of it (assumed).
    """
    links = accelerator.links
    inside = links.gpu_to_gpu * GIGA * node_use
    host = links.host * GIGA * (1.0 if setup.pin_memory else 0.5)
    return Rates(inside, links.fabric * GIGA * fabric_use, host, setup.gpus_per_node)


def shard_group(setup: Setup) -> Group:
    """Ranks that hold one shard each of what ZeRO or FSDP shards: all, or those of a node (HSDP)."""
    every = data_group(setup)
    return Group(every.per_node, every.per_node) if setup.shard_within_node else every


def _ring(group: Group) -> float:
    return (group.ranks - 1) / group.ranks


def tensor_seconds(setup: Setup, layers: float, at: Rates) -> float:
    """All-reduces of a micro step: two for each layer forward, two backward, two where all is recomputed.

    Shoeybi et al. 2019; sequence parallelism moves the same bytes (Korthikanti et al. 2022).
    """
    group = tensor_group(setup)
    if group.ranks == 1:
        return 0.0
    reductions = 2 if setup.mode == "infer" else 6 if recomputes_all(setup) else 4
    volume = reductions * layers * setup.tokens * setup.shape.hidden * HALF * 2 * _ring(group)
    return volume / at.ring(group)


def shard_seconds(setup: Setup, parameters: float, at: Rates) -> float:
    """ZeRO-3 in a micro step: weights gathered forward and backward, gradients scattered (Rajbhandari et al. 2020)."""
    group = shard_group(setup)
    if setup.zero_stage < 3 or group.ranks == 1:
        return 0.0
    gathers = 1 if setup.mode == "infer" else 2
    width = 4 if setup.precision == "fp32" else HALF
    volume = (gathers + _trained_share(setup)) * width * parameters * _ring(group)
    return volume / at.ring(group)


def reduce_seconds(setup: Setup, parameters: float, at: Rates) -> float:
    """Gradients once for each step, and the updated weights where the states are sharded: an all-reduce in bytes.

    ZeRO-2 keeps no whole gradient, so it reduces in every micro step. HSDP all-reduces its shards between the nodes.
    """
    every = data_group(setup)
    if every.ranks == 1 or setup.mode == "infer":
        return 0.0
    width = 4 if setup.precision in ("fp32", "bf16_fp32grad") or setup.autocasts else HALF
    trained = _trained_share(setup) * parameters
    if setup.zero_stage >= 3:
        between = Group(setup.nodes, 1)
        sharded = trained / shard_group(setup).ranks
        return 2 * width * sharded * _ring(between) / at.ring(between) if setup.shard_within_node else 0.0
    reductions = setup.grad_accum if setup.zero_stage == 2 else 1
    return (reductions * width + HALF) * trained * _ring(every) / at.ring(every)


def _trained_share(setup: Setup) -> float:
    return min(1.0, setup.trained_parameters / setup.shape.parameters)


def pipeline_seconds(setup: Setup, at: Rates) -> float:
    """Activations to the next stage and gradients back, in a micro step, for each chunk of layers."""
    if setup.pp == 1:
        return 0.0
    rate = at.inside if setup.gpus <= setup.gpus_per_node else min(at.inside, at.fabric / at.gpus_per_node)
    directions = 1 if setup.mode == "infer" else 2
    return directions * setup.virtual_stages * setup.tokens * setup.shape.hidden * HALF / rate
