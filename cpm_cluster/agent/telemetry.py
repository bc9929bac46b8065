"""What the ranks of a node use while they run, measured from outside, a line of JSON a sample.

The agent's watch loop calls `poll` all the time, which decides by the clock. Nothing here ends a training, or holds the
agent up: nvidia-smi answers when it can, and the line is written then. Lines are not synced, for on a file system that
is busy with a checkpoint that takes seconds; one that stands still stops the agent here as it does at its events.

A sample takes some 30 ms of CPU for 8 ranks of 200 threads, most of it to find what each thread has started.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Callable, TypeVar

from cpm_cluster.agent import containers, process_tree, ranks, shared_memory
from cpm_cluster.agent.gpu_query import GpuQuery
from cpm_cluster.agent.memory_cgroup import MemoryCgroup
from cpm_cluster.agent.nccl_environment import differences, is_recorded, planned
from cpm_cluster.agent.rootless_docker import DEFAULT_DATA_ROOT
from cpm_cluster.launch.plan import LaunchPlan, NodeFacts
from cpm_cluster.runs.layout import RunLayout
from cpm_cluster.runs.telemetry import last_sample, raised

INTERVAL_S = 10.0
# After the ranks have appeared: time for an import, so that the first sample is not of an empty process.
SETTLE_S = 1.0
# How often to see whether the ranks are there, and whether the kernel has killed one of them.
LOOK_S = 1.0
# For nvidia-smi, when all is over.
LAST_PATIENCE_S = 1.0

Found = TypeVar("Found")


class Telemetry:
    """The samples of one attempt on one node: `poll` often, `close` once the program has ended; neither raises."""

    def __init__(self, files: RunLayout, plan: LaunchPlan, node: NodeFacts) -> None:
        self._plan, self._node = plan, node
        self._path = files.telemetry(node.name)
        self._log_dir = str(files.node_dir(node.attempt, node.index))
        self._gpus = GpuQuery(node.gpu_uuids)
        self._memory = MemoryCgroup()
        self._ranks: list[ranks.Process] = []
        self._differs: list[str] | None = None
        self._pending: dict[str, Any] | None = None
        self._look_at, self._sample_at = 0.0, time.monotonic() + INTERVAL_S
        self._peaks: dict[str, Any] = {}
        self._earlier_kills = 0
        self._guarded(self._go_on)

    def poll(self) -> None:
        """Do what is due; call it many times a second."""
        self._guarded(self._poll)

    def close(self) -> None:
        """The last sample: what is left in the host's /dev/shm, and whom the kernel has killed. A second at most."""
        self._guarded(self._close)

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a measurement, the training goes on
            self._look_at = self._sample_at = math.inf
            self._pending = None
            print(f"cpm: no more telemetry: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    def _go_on(self) -> None:
        """From the peaks of an earlier attempt."""
        self._peaks = dict((last_sample(self._path) or {}).get("peaks", {}))
        self._earlier_kills = int(self._peaks.get("oom_kills", 0))

    def _poll(self) -> None:
        now = time.monotonic()
        self._write_pending()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            self._look(now)
        if now >= self._sample_at and self._pending is None:
            self._sample_at = now + INTERVAL_S
            self._begin()

    def _look(self, now: float) -> None:
        """Find the ranks, which come late and may be replaced, and count kills before their group is gone."""
        if len(self._ranks) < self._expected() or not all(rank.is_there for rank in self._ranks):
            self._ranks = ranks.ranks(self._processes())
        if self._differs is None and len(self._ranks) >= self._expected():
            self._record_environment()
            self._sample_at = now + SETTLE_S
        self._memory.look(self._ranks[0].pid if self._ranks else None)

    def _expected(self) -> int:
        """How many ranks there are to be: as torchrun tells them, before that as the plan says, if it does."""
        of_plan = self._plan.program.processes_per_node if self._plan.program.launcher == "torchrun" else 1
        return (self._ranks[0].ranks_per_node if self._ranks else None) or of_plan

    def _processes(self) -> list[ranks.Process]:
        """The program's processes. What a daemon of root has started is no descendant."""
        rootful = self._plan.runtime == "docker"
        among = ranks.on_this_machine() if rootful else process_tree.descendants(os.getpid())
        return ranks.of_program(self._log_dir, among, lambda name: is_recorded(self._plan, name))

    def _record_environment(self) -> None:
        found = {rank.rank: rank.variables for rank in self._ranks if rank.rank is not None}
        differs = differences(found, planned(self._plan, self._node))
        self._differs = [str(difference["variable"]) for difference in differs]
        self._write("nccl_environment", time.time(), {"ranks": found, "differs": differs})

    def _begin(self, last: bool = False) -> None:
        """Measure all but the GPUs, and ask about those."""
        there = [rank for rank in self._ranks if rank.is_there]
        processes = [] if last else there or ranks.outermost(self._processes())
        if self._ranks and self._differs is None:  # fewer than expected
            self._record_environment()
        unread: dict[str, str] = {}
        measured = [ranks.memory(process) for process in processes]
        sample = {
            "time": time.time(),
            "shm": _read("shm", lambda: self._shared_memory(processes), unread),
            "ranks": measured,
            "rss_bytes": sum(rank["rss_bytes"] for rank in measured),
            "cgroup": self._memory.measure(processes[0].pid if processes else None),
            "disk": _read("disk", self._disk, unread),
            "environment_differs": self._differs or [],
            "unread": unread,
        }
        if self._plan.gpus_per_node:
            self._gpus.ask()
        self._pending = sample
        self._write_pending()

    def _shared_memory(self, processes: list[ranks.Process]) -> dict[str, Any]:
        if processes:
            return shared_memory.seen_by(processes[0].pid)
        box = self._plan.container
        if containers.is_used(self._plan) and box is not None and box.shm_bytes is not None:
            raise OSError("no process of the program can be looked at, and the container has a /dev/shm of its own")
        return shared_memory.measured(shared_memory.HOSTS)

    def _disk(self) -> dict[str, int]:
        """Free bytes where the run is, and where the job's own daemon keeps images and layers."""
        found = {"run_dir_free_bytes": shutil.disk_usage(self._plan.run_dir).free}
        if self._plan.data_root is not None or self._plan.runtime == "docker-rootless":
            folder = Path((self._plan.data_root or DEFAULT_DATA_ROOT).replace("{uid}", str(os.getuid())))
            found["data_root_free_bytes"] = shutil.disk_usage(str(folder)).free
        return found

    def _write_pending(self, patient: bool = True) -> None:
        """Write the sample that was begun, once nvidia-smi has answered or will not."""
        if self._pending is None:
            return
        sample = self._pending
        if self._plan.gpus_per_node:
            gpus = self._gpus.answer(patient)
            if gpus is None:
                return
            sample["gpus"] = gpus or None
            if self._gpus.problem:
                sample["unread"]["gpus"] = self._gpus.problem
        self._pending = None
        self._peaks = raised(self._peaks, sample)
        if sample["cgroup"]:
            self._peaks["oom_kills"] = self._earlier_kills + sample["cgroup"]["oom_kills"]
        self._write("sample", sample.pop("time"), {**sample, "peaks": self._peaks})

    def _close(self) -> None:
        if self._sample_at == math.inf:
            return
        deadline = time.monotonic() + LAST_PATIENCE_S
        self._wait(deadline)
        self._begin(last=True)
        self._wait(deadline)

    def _wait(self, deadline: float) -> None:
        while self._pending is not None and time.monotonic() < deadline:
            time.sleep(0.02)
            self._write_pending()
        self._write_pending(patient=False)

    def _write(self, kind: str, moment: float, record: dict[str, Any]) -> None:
        """Append a line; on a full disk it is lost. None joins a line that was torn."""
        line = json.dumps({"time": moment, "kind": kind, "attempt": self._node.attempt, **record}) + "\n"
        try:
            self._path.parent.mkdir(exist_ok=True)
            with open(str(self._path), "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode("utf-8"))
        except OSError:
            return


def _read(name: str, measure: Callable[[], Found], unread: dict[str, str]) -> Found | None:
    try:
        return measure()
    except OSError as error:
        unread[name] = error.strerror or str(error)
        return None
