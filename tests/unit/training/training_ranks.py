"""Starting the program on several ranks, without the price of importing torch in each."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import socket
import time
from importlib import import_module
from pathlib import Path

# One server imports torch once; each rank is a fork of it.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "cpm_cluster.training.run",
        "cpm_cluster.training.engines.torch_engine",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch._dynamo",  # the first optimizer step imports it
    ]
)


def start_ranks(settings: str, world_size: int, logs: Path, torchrun: bool = False, prepare=None):
    """Start the task's program on loopback as torchrun would, its output going to ``logs``.

    ``prepare(rank)`` runs in each of them first.
    """
    port = free_port()
    processes = [
        _SERVER.Process(target=_rank, args=(settings, rank, world_size, port, str(logs), torchrun, prepare))
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


def wait_for(condition, seconds: float = 30.0) -> None:
    """Wait until something that other processes do has happened."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def free_port() -> int:
    """Return a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(settings: str, rank: int, world_size: int, port: int, logs: str, torchrun: bool, prepare) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["CPM_LOG_DIR"] = logs
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    if torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "test"
    if prepare is not None:
        prepare(rank)
    task = json.loads(Path(settings).read_text())["task"]
    main = import_module(f"cpm_cluster.training.{task}").main
    # A rank that collects garbage need not walk through what the server imported.
    gc.freeze()
    raise SystemExit(main([settings]))
