"""Starting the program on several ranks, without the price of importing torch in each."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import socket
from pathlib import Path

# One server imports torch once; each rank is a fork of it.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["cpm_cluster.training.finetune", "cpm_cluster.training.engines.torch_engine", "torch.distributed.fsdp"]
)


def start_ranks(settings: Path, world_size: int, logs: Path, torchrun: bool = False):
    """Start ``finetune SETTINGS`` on loopback as torchrun would, its output going to ``logs``."""
    port = free_port()
    processes = [
        _SERVER.Process(target=_rank, args=(str(settings), rank, world_size, port, str(logs), torchrun))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes, seconds: float = 60) -> list[int]:
    """Wait for the ranks and return their exit codes; a rank that hangs is aborted and counts as -6."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            # SIGABRT makes the rank print where it hangs.
            os.kill(process.pid, signal.SIGABRT)
            process.join()
    return [process.exitcode for process in processes]


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(settings: str, rank: int, world_size: int, port: int, logs: str, torchrun: bool) -> None:
    log = os.open(f"{logs}/rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    if torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "test"
    from cpm_cluster.training.finetune import main

    raise SystemExit(main([settings]))
