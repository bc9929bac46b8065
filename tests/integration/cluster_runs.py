"""Real runs on the sandbox for tests: its ordinary user with `cpm` and `cpm-submit`, and what a run must not leave."""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from local_runs import (
    PATIENCE_S,
    LocalRun,
    LocalRuns,
    all_processes,
    command_line,
    environment_of,
    is_alive,
    parent_of,
    wait_for,
)

import cpm_cluster
from cpm_cluster.sandbox import dockerd, host_settings, podman
from cpm_cluster.sandbox.cgroups import MOUNT
from cpm_cluster.sandbox.state import Node, Sandbox
from cpm_cluster.specs.catalogue import packaged_configs

IMAGE = "cpmlive-flash:0.0.4"
# What cpm-submit needs beside Python, copied so that an ordinary user may read it.
IMPORTED = (
    "click",
    "yaml",
    "rich",
    "markdown_it",
    "mdurl",
    "pygments",
    "submitit",
    "cloudpickle",
    "typing_extensions",
)
PROGRAM = """\
#!{python}
import sys

sys.path.insert(0, "{folder}")
from cpm_cluster.cli.main import {function}

sys.exit({function}())
"""
# Two ranks; more steps than anybody waits for, and a checkpoint every second or so.
TRAINING: dict[str, Any] = {
    "name": "tiny",
    "cluster": "sandbox",
    "image": IMAGE,
    "engine": "torch",
    "method": "full",
    "model": {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 24, "vocab": 259},
    "tokenizer": "bytes",
    "resources": {"nodes": 1, "gpus_per_node": 2, "cpus_per_node": 2},
    "data": {"train": "builtin:python-reference"},
    "training": {
        "seq_len": 512,
        "steps": 1_000_000,
        "lr": 1e-2,
        "precision": "fp32",
        "zero_stage": 0,
        "checkpoint": {"every": 20, "keep": 2},
    },
    "time_limit": "1h",
}
COMMAND: dict[str, Any] = {
    "name": "program",
    "cluster": "sandbox",
    "engine": "command",
    "resources": {"nodes": 1, "gpus_per_node": 2, "cpus_per_node": 2},
    "time_limit": "1h",
}
# Slurm's epilog, and daemons on their way out; on idle cores a second or two.
SETTLING_S = 60.0
ALIVE_IN_SLURM = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STOPPED", "SIGNALING")


class ClusterRuns(LocalRuns):
    """The sandbox's ordinary user, with a home, job files and runs of the tests' own."""

    def __init__(self, state: Sandbox, root: Path) -> None:
        self.state, self.root, self.home, self.runs_dir = state, root, root / "home", root / "runs"
        self.jobs, self.bin = root / "jobs", root / "bin"
        for folder in (self.home, self.jobs, self.runs_dir):
            folder.mkdir()
        for part in ("containers", "cpm-cluster"):
            shutil.copytree(state.home / ".config" / part, self.home / ".config" / part)
        self.configs = self.home / ".config" / "cpm-cluster"
        for folder in (root, self.jobs, self.runs_dir, self.home, *self.home.rglob("*")):
            self._give(folder)
        self._install()
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "SLURM_CONF": str(state.slurm_conf),
            "CPM_RUNS_DIR": str(self.runs_dir),
            "LANG": "C.UTF-8",
        }
        self.shared_memory_before = set(os.listdir("/dev/shm"))

    def _install(self) -> None:
        """A copy of the package that the user can run, whatever folder the tests' own Python is in."""
        target, source = self.root / "packages", Path(cpm_cluster.__file__).parent
        shutil.copytree(source, target / "cpm_cluster", ignore=shutil.ignore_patterns("__pycache__"))
        for data in ("configs", "jobs", "slurm", "containers"):
            shutil.copytree(packaged_configs().parent / data, target / "cpm_cluster" / data, dirs_exist_ok=True)
        for name in IMPORTED:
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.origin is not None, name
            origin = Path(spec.origin)
            if origin.name == "__init__.py":
                shutil.copytree(origin.parent, target / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(origin, target)
        self.bin.mkdir()
        for program, function in (("cpm", "main"), ("cpm-submit", "submit_main")):
            path = self.bin / program
            path.write_text(PROGRAM.format(python=self._python(), folder=target, function=function))
            path.chmod(0o755)

    def _python(self) -> str:
        """A Python that the user can run: this one, or the system's."""
        for python in (sys._base_executable, "/usr/bin/python3"):
            done = subprocess.run([*self.user, python, "-c", "import sys"], capture_output=True, cwd="/")
            if done.returncode == 0:
                return python
        raise AssertionError("the sandbox's user can run no Python: install python3")

    @property
    def user(self) -> list[str]:
        """Argv prefix of the ordinary user."""
        state = self.state
        return [str(shutil.which("setpriv")), f"--reuid={state.uid}", f"--regid={state.gid}", "--clear-groups", "--"]

    def _argv(self, program: str, words: tuple[str | Path, ...]) -> list[str]:
        return [*self.user, program, *map(str, words)]

    def _give(self, path: Path) -> None:
        os.chown(path, self.state.uid, self.state.gid)

    def job(self, name: str = "tiny", **changes: Any) -> Path:
        """Write a job file for the trainer, with dotted keys (`training__steps`) changed."""
        return self._write(name, _changed(TRAINING | {"name": name}, changes))

    def command(self, *argv: str, name: str = "program", **changes: Any) -> Path:
        """Write a job file for any program, with dotted keys changed; without an image it is bare."""
        spec = COMMAND | {"name": name, "command": list(argv)} | ({} if "image" in changes else {"runtime": "bare"})
        return self._write(name, _changed(spec, changes))

    def cluster(self, name: str, **changes: Any) -> str:
        """Write a cluster file: the sandbox's, with dotted keys changed; its name."""
        spec = yaml.safe_load((packaged_configs() / "clusters" / "sandbox.yaml").read_text())
        folder = self.configs / "clusters"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(_changed(spec, changes)))
        return name

    def secrets(self, **values: str) -> None:
        """Write the user's secrets."""
        path = self.configs / "secrets.env"
        path.touch(mode=0o600)
        path.write_text("".join(f"{name}={value}\n" for name, value in values.items()))
        self._give(path)

    def folder(self, name: str) -> Path:
        """An empty folder of the user's."""
        path = self.root / name
        path.mkdir()
        self._give(path)
        return path

    def slurm(self, *argv: str | Path) -> str:
        """Stdout of a Slurm command of the user that must succeed."""
        done = self._call(str(argv[0]), argv[1:], {})
        assert done.returncode == 0, f"{argv}: {done.stderr}"
        return done.stdout

    def end_all(self) -> None:
        """Have Slurm end what tests have left."""
        jobs = [job for run in self.all() for job in self.run(run.id).job_ids]
        self._call("scancel", ("--quiet", *jobs), {}) if jobs else None
        for run in self.all():
            wait_for(f"end of {run.id}", lambda run=run: not self.run(run.id).slurm_state)

    def run(self, run_id: str) -> ClusterRun:
        return ClusterRun(self, self.runs_dir / run_id)

    def detached(self, job: Path, *words: str) -> ClusterRun:
        done = self.submit(job, "--detach", *words)
        assert done.returncode == 0, done.stderr
        return self.run(done.stdout.strip())

    def exported(self, job: Path, script: Path) -> ClusterRun:
        """Export a job, and submit its script by plain sbatch."""
        done = self.submit(job, "--export", script, "--json")
        assert done.returncode == 0, done.stderr
        run = self.run(json.loads(done.stdout)["run"])
        run.jobs_by_hand.append(self.slurm("sbatch", "--parsable", script).strip())
        return run


def _changed(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A deep copy with dotted keys (`training__steps`) changed."""
    copy: dict[str, Any] = json.loads(json.dumps(spec))
    for key, value in changes.items():
        *parents, last = key.split("__")
        part = copy
        for parent in parents:
            part = part.setdefault(parent, {})
        part[last] = value
    return copy


class ClusterRun(LocalRun):
    """One run on the sandbox, as its user, and root on the nodes, see it."""

    runs: ClusterRuns

    def __init__(self, runs: ClusterRuns, folder: Path) -> None:
        super().__init__(runs, folder)
        self.jobs_by_hand: list[str] = []

    @property
    def job_ids(self) -> list[str]:
        """All its Slurm jobs, the newest last; each has a log."""
        submitted = [event["job_id"] for event in self.lines("events/submitter.jsonl") if event["kind"] == "submitted"]
        logged = [path.stem.removeprefix("slurm-") for path in self.folder.glob("slurm-*.log")]
        return sorted({*submitted, *logged, *self.jobs_by_hand}, key=int)

    @property
    def job_id(self) -> str:
        """Its newest Slurm job."""
        return self.job_ids[-1]

    @property
    def slurm_state(self) -> str:
        """The job's state as squeue has it; empty once Slurm has let go of it, UNKNOWN where Slurm does not answer."""
        argv = ["squeue", "--noheader", "--states=all", f"--jobs={self.job_id}", "--format=%T"]
        done = self.runs._call(argv[0], tuple(argv[1:]), {})
        if done.returncode != 0:
            return "" if "Invalid job id" in done.stderr else "UNKNOWN"
        state = done.stdout.strip()
        return state if state in ALIVE_IN_SLURM else ""

    @property
    def plan(self) -> dict[str, Any]:
        """launch.json."""
        return self.json("launch.json")

    def await_job(self, state: str, seconds: float = PATIENCE_S) -> None:
        """Wait until squeue shows a state; fails at once when the job has ended."""
        seen = wait_for(
            f"{state} of job {self.job_id}",
            lambda: (s := self.slurm_state or "ended") in (state, "ended") and s,
            seconds,
        )
        assert seen == state, f"job {self.job_id} has ended: {self.text(f'slurm-{self.job_id}.log')}"

    def await_end(self, seconds: float = PATIENCE_S) -> dict[str, Any]:
        """Wait until Slurm has let go of the job; what `cpm status` says then."""
        wait_for(f"end of job {self.job_id}", lambda: not self.slurm_state, seconds)
        return self.status()

    def await_phase(self, phase: str, attempt: int = 1) -> None:
        """Wait until an agent has entered a phase."""
        wanted = ("phase", phase, attempt)
        wait_for(phase, lambda: wanted in {(e["kind"], e.get("phase"), e.get("attempt")) for e in self.events()})

    def await_step(self, step: int) -> None:
        """Wait until the first attempt has done a step."""

        def reached() -> bool:
            self.refuse_end(1)
            return int(json.loads(self.text("progress.json") or "{}").get("step", 0)) >= step

        wait_for(f"step {step} ({self.id})", reached)

    def await_checkpoint(self) -> None:
        """Wait until the first attempt has a whole checkpoint, which is written while further steps are done."""

        def is_whole() -> bool:
            self.refuse_end(1)
            return self.checkpoint_step > 0

        wait_for(f"checkpoint ({self.id})", is_whole)

    @contextmanager
    def between_attempts(self) -> Iterator[None]:
        """While Slurm has the job back in its queue, held there for as long as one looks."""
        self.await_job("PENDING")
        self.runs.slurm("scontrol", "hold", self.job_id)
        yield
        self.runs.slurm("scontrol", "release", self.job_id)

    def refuse_end(self, attempt: int) -> None:
        """Fail at once, with what it said, where an attempt has ended that is waited for."""
        ended = [e for e in self.events() if e["kind"] == "exit" and e.get("attempt") == attempt]
        said = [e["message"] for e in self.events() if e["kind"] == "error"]
        assert not ended, f"{self.id} has ended: {said}\n{self.text(f'attempt-{attempt}/node-0/node.log')[-2000:]}"

    def agent_on(self, node: Node | str) -> int:
        """The node agent of the newest attempt on a node."""
        name = node if isinstance(node, str) else node.name

        def pids() -> list[int]:
            return [e["pid"] for e in self.lines(f"events/{name}.jsonl") if e.get("phase") == "prepare"]

        return wait_for(f"agent on {name}", pids)[-1]

    @property
    def nodes(self) -> list[str]:
        """Names of the nodes that the job has now, in order."""
        listed = self.runs.slurm("squeue", "--noheader", f"--jobs={self.job_id}", "--format=%N").strip()
        return self.runs.slurm("scontrol", "show", "hostnames", listed).split()

    @property
    def first_node(self) -> str:
        """Node 0 of the first attempt."""
        begun = [path for path in (self.folder / "events").glob("*.jsonl") if "prepare" in path.read_text()]
        return min(begun, key=lambda path: self.lines(f"events/{path.name}")[0]["time"]).stem

    @property
    def dockerd(self) -> int:
        """The rootless Docker daemon of the job."""
        return next(pid for pid in self.processes() if command_line(pid).startswith("dockerd "))

    @property
    def runtime_folders(self) -> list[Path]:
        """Runtime folders of the job's rootless daemons."""
        prefixes = [f"cpm-{self.runs.state.uid}-{job}." for job in self.job_ids]
        return [path for path in Path("/dev/shm").iterdir() if path.name.startswith(tuple(prefixes))]

    @property
    def last_step(self) -> int:
        """The newest step whose metrics are recorded."""
        return int(self.lines("metrics.jsonl")[-1]["step"])

    def continued_after(self, attempt: int) -> int:
        """The step of the checkpoint that an attempt goes on from, once it says so."""
        path = f"attempt-{attempt}/node-0/rank-0.log"

        def said() -> list[str] | None:
            found = [line for line in self.text(path).splitlines() if line.startswith("continuing after step ")]
            return found or self.refuse_end(attempt)

        return int(wait_for(f"checkpoint of attempt {attempt} ({self.id})", said)[0].split()[3])

    def await_nothing_left(self, seconds: float = SETTLING_S, queued: bool = False) -> None:
        """Fail where the run leaves anything on the nodes, in its folder or in Slurm; a `queued` job may wait."""
        deadline = time.monotonic() + seconds
        while left := self.left(queued):
            assert time.monotonic() < deadline, f"{self.id} has left: " + "; ".join(left)
            time.sleep(0.5)

    def left(self, queued: bool = False) -> list[str]:
        """What is left of the run, each in words; a `queued` job may wait."""
        found = [f"process {pid}: {command_line(pid)[:200]}" for pid in self.processes()]
        found += [f"container {name}" for name in self._containers()]
        found += [f"mount {line}" for line in self._mounts()]
        found += [f"shared memory {path}" for path in self._shared_memory()]
        secret = [path for path in self.folder.glob("attempt-*/node-*/*") if "environment" in path.name]
        found += [f"file {path}" for path in secret]
        listed = self.runs.slurm("squeue", "--noheader", "--format=%A %T").splitlines()
        jobs = dict(line.split() for line in listed)
        return found + [
            f"job {job} ({jobs[job]})"
            for job in self.job_ids
            if job in jobs and not (queued and jobs[job] == "PENDING")
        ]

    def processes(self) -> list[int]:
        """Live processes of the run: by its id or its jobs' in their environment or words, or by the control group."""
        marks = {f"CPM_RUN_ID={self.id}", *(f"SLURM_JOB_ID={job}" for job in self.job_ids)}
        pids = set(self._in_control_groups())
        for pid in all_processes():
            if marks & set(environment_of(pid)) or str(self.folder) in command_line(pid):
                pids.add(pid)
        # not those of the tests themselves, which name the run on their command lines
        users = host_settings.ids_of(self.runs.state)
        return sorted(pid for pid in pids if is_alive(pid) and any(_owner(pid) in ids for ids in users))

    def _in_control_groups(self) -> Iterator[int]:
        uid = self.runs.state.uid
        for job in self.job_ids:
            for top in MOUNT.glob(f"*/slurm_*/uid_{uid}/job_{job}"):
                for folder, _, _ in os.walk(top):  # which passes over what Slurm removes meanwhile
                    yield from _numbers(Path(folder, "cgroup.procs"))

    def _containers(self) -> Iterator[str]:
        """Containers of any daemon, of podman, and those that a rootless daemon's data root still lists.

        A client that fails is one of them, too: other jobs' containers come and go while it lists them.
        """
        words = ("ps", "--all", "--quiet", "--filter", f"label=cpm.run={self.id}")
        for engine in dockerd.engines(self.runs.state):
            argv = ["docker", "--host", f"unix://{engine.socket}", *words]
            yield from _listed(subprocess.run(argv, capture_output=True, text=True))
        environment = {"XDG_RUNTIME_DIR": str(podman.run_folder(self.runs.state))}
        yield from _listed(self.runs._call("podman", words, {"env": environment}))
        for folder in self._data_roots():
            for name in glob.iglob(f"{folder}/*/*/containers/*/config.v2.json"):
                if self.id in _text(Path(name)):
                    yield f"{Path(name).parent.name} in {folder}"

    def _data_roots(self) -> list[Path]:
        uid = str(self.runs.state.uid)
        return [Path((self.plan["data_root"] or f"/var/tmp/cpm-docker-{uid}").replace("{uid}", uid))]

    def _mounts(self) -> list[str]:
        marks = [str(self.folder), *(f"/cpm-{self.runs.state.uid}-{job}." for job in self.job_ids)]
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if any(mark in line for mark in marks)]

    def _shared_memory(self) -> list[Path]:
        users = host_settings.ids_of(self.runs.state)
        new = [path for path in Path("/dev/shm").iterdir() if path.name not in self.runs.shared_memory_before]
        of_others = [path for path in new if path.name.startswith("cpm-") and path not in self.runtime_folders]
        return [path for path in new if path not in of_others and any(_uid_of(path) in ids for ids in users)]


def tree_of(pid: int) -> list[str]:
    """The command lines from a process up to init, for failed tests."""
    lines = []
    while pid > 1:
        lines.append(f"{pid}: {command_line(pid)}")
        pid = parent_of(pid)
    return lines


def _listed(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Containers that a client names, or what it says when it fails."""
    return done.stdout.split() if done.returncode == 0 else [done.stderr.strip() or f"{done.args} fails"]


def _numbers(path: Path) -> list[int]:
    return [int(word) for word in _text(path).split()]


def _text(path: Path) -> str:
    """What is in a file; nothing where somebody has removed it meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _owner(pid: int) -> int:
    return _uid_of(Path(f"/proc/{pid}"))


def _uid_of(path: Path) -> int:
    try:
        return path.lstat().st_uid
    except OSError:
        return -1
