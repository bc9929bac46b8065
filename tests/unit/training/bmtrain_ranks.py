"""Runs with engine bmtrain on an unmodified BMTrain, on CPUs, and runs to compare them with."""

from __future__ import annotations

from functools import partial

from torch_here import DCP_REFUSAL
from training_ranks import finish, start_ranks


def train(version: str, run, world_size: int = 2, first_loss_scale: float | None = None) -> list[int]:
    """Train a TinyRun to its end; return the exit codes."""
    prepare = partial(_prepare, version, first_loss_scale)
    return finish(start_ranks(run.write_settings(), world_size, run.directory, prepare=prepare))


def train_until_killed(version: str, run, kill) -> int:
    """Train a TinyRun on two ranks until :class:`checkpoint_faults.Killed` kills one; return that one's exit code."""
    ranks = start_ranks(run.write_settings(), 2, run.directory, prepare=partial(_prepare_to_be_killed, version, kill))
    ranks[kill.rank].join(60)
    for rank in ranks:
        rank.kill()
    return finish(ranks)[kill.rank]


def train_reference(run, world_size: int = 1) -> list[int]:
    """Train a TinyRun with engine torch, without its checkpoints where torch is too old for them."""
    prepare = _keep_no_state if DCP_REFUSAL else None
    return finish(start_ranks(run.write_any_settings(), world_size, run.directory, prepare=prepare))


class _NoState:
    live = False

    def write(self) -> list:
        """Write nothing."""
        return []

    def gather_index(self):
        """Exchange nothing."""
        return list


def _keep_no_state(rank: int) -> None:
    from cpm_cluster.training.engines import torch_engine

    torch_engine.require_dcp = lambda: None
    torch_engine.TorchEngine.stage_state = lambda engine, directory: _NoState()


def _prepare_to_be_killed(version: str, kill, rank: int) -> None:
    _prepare(version, None, rank)
    kill(rank)


def _prepare(version: str, first_loss_scale: float | None, rank: int) -> None:
    import bmtrain_shim

    bmtrain_shim.install(version)
    if first_loss_scale is not None:
        from cpm_cluster.training.engines import loss_scale

        loss_scale.FIRST = first_loss_scale
