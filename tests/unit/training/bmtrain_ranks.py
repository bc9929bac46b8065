"""Runs with engine bmtrain on an unmodified BMTrain, on CPUs."""

from __future__ import annotations

from functools import partial

from training_ranks import finish, start_ranks


def train(version: str, run, world_size: int = 2, first_loss_scale: float | None = None) -> list[int]:
    """Train a TinyRun to its end; return the exit codes."""
    prepare = partial(_prepare, version, first_loss_scale)
    return finish(start_ranks(run.write_settings(), world_size, run.directory, prepare=prepare))


def _prepare(version: str, first_loss_scale: float | None, rank: int) -> None:
    import bmtrain_shim

    bmtrain_shim.install(version)
    if first_loss_scale is not None:
        from cpm_cluster.training.engines import loss_scale

        loss_scale.FIRST = first_loss_scale
