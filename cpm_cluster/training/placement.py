"""Where this process stands among the ranks of the run, as torchrun says it in the environment."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Callable, Mapping

from cpm_cluster.training.errors import UserError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Placement:
    """Ranks count from 0; ``local_rank`` counts within this node."""

    rank: int
    world_size: int
    local_rank: int


def read_placement(environment: Mapping[str, str]) -> Placement:
    """Return the placement; without any of the variables the process is a run of its own.

    Raises UserError when only some of RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are set, or one is no
    number: a launcher that exports half of them (WORLD_SIZE as the number of nodes, say) starts something
    else than it means.
    """
    given = {name: environment[name] for name in _NAMES if name in environment}
    if not given:
        return Placement(rank=0, world_size=1, local_rank=0)
    missing = [name for name in _NAMES if name not in given]
    if missing or not all(value.isdigit() for value in given.values()):
        found = " ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            "the environment has {} but lacks a usable {}; start the program with torchrun".format(
                found, " ".join(missing) or "number"
            )
        )
    return Placement(int(given["RANK"]), int(given["WORLD_SIZE"]), int(given["LOCAL_RANK"]))


def expect_world_size(placement: Placement, expected: int) -> None:
    """Raise UserError unless the launcher started as many ranks as the run was planned for."""
    if placement.world_size != expected:
        raise UserError(
            f"this run was planned for {expected} rank(s) but WORLD_SIZE is {placement.world_size}: "
            "the launcher did not start the ranks as one group"
        )


def confirm_world(
    all_gather: Callable[[int], list[int]], placement: Placement, expected: int, settings_text: bytes
) -> None:
    """Make sure, by a real exchange, that every rank is there once and reads the same settings.

    Raises UserError on every rank otherwise. Collective.
    """
    seen = all_gather(placement.rank)
    if sorted(seen) != list(range(expected)):
        raise UserError(f"expected ranks 0 to {expected - 1}, but the group consists of {seen}")
    digest = int.from_bytes(hashlib.sha256(settings_text).digest()[:7], "big")
    if len(set(all_gather(digest))) > 1:
        raise UserError("the ranks read different settings: trainer.json differs between the nodes")
