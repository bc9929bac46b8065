"""Real local runs for tests: folders of a user, `cpm` and `cpm-submit` as a shell has them, and /proc as witness."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ESCAPE_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]")
# A start of torch takes 6 s on two idle cores; these may have ten times as much to do. What fails is told at once.
PATIENCE_S = 300.0
COMMANDS = ("bash", "sh", "env", "git", "sleep", "setsid", "cat", "touch")

TRAINING = {
    "name": "tiny",
    "engine": "torch",
    "method": "full",
    "model": {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 24, "vocab": 259},
    "tokenizer": "bytes",
    "profile": "cpu-2",
    "data": {"train": "rows.jsonl"},
    "training": {
        "seq_len": 64,
        "steps": 20,
        "lr": 1e-2,
        "precision": "fp32",
        "zero_stage": 0,
        "checkpoint": {"every": 10, "keep": 2},
    },
}
ONE_RANK = {"processes_per_node": 1}
ROWS = [{"input": "", "output": f"the cat sat on mat {n}"} for n in range(40)]


def wait_for(what: str, condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """The first true value of a condition; fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.05)
    return value


def environment_of(pid: int) -> list[str]:
    """NAME=VALUE of a process; nothing for one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return []


def command_line(pid: int) -> str:
    """The words of a process, with spaces between."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").replace("\0", " ").strip()
    except OSError:
        return ""


def all_processes() -> list[int]:
    """Every pid of this machine."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def parent_of(pid: int) -> int:
    """The pid of a process's parent; 0 for one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
    except OSError:
        return 0


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return False


class LocalRun:
    """One run, as a user and a debugger see it."""

    def __init__(self, runs: LocalRuns, folder: Path) -> None:
        self.runs, self.folder, self.id = runs, folder, folder.name

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run."""
        return json.loads((self.folder / name).read_text())

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a jsonl file of the run, which may be growing; nothing where there is none."""
        whole = self.text(name).rpartition("\n")[0]
        return [json.loads(line) for line in whole.split("\n") if line]

    def events(self) -> list[dict[str, Any]]:
        """What the agent recorded."""
        found = [path for path in (self.folder / "events").glob("*.jsonl") if path.stem != "submitter"]
        return [event for path in found for event in self.lines(f"events/{path.name}")]

    def status(self) -> dict[str, Any]:
        """What `cpm status --json` says."""
        return json.loads(self.runs.cpm("status", self.id, "--json").stdout)

    def text(self, name: str) -> str:
        """A text file of the run; empty where there is none."""
        path = self.folder / name
        return path.read_text() if path.exists() else ""

    @property
    def log(self) -> str:
        """What the program of engine `command` printed, in the first attempt."""
        return self.text("attempt-1/node-0/node.log")

    def await_end(self, seconds: float = PATIENCE_S) -> dict[str, Any]:
        """Wait until `cpm status` calls it ended; what it says then."""
        ended = ("finished", "stopped", "failed", "cancelled", "lost")
        return wait_for(f"end of {self.id}", lambda: (s := self.status())["state"] in ended and s, seconds)

    def await_step(self, step: int) -> None:
        """Wait until the trainer shows that it has done a step."""
        wait_for(f"step {step}", lambda: (self.status()["progress"] or {}).get("step", 0) >= step)

    def await_log(self, word: str) -> None:
        """Wait until the program of engine `command` has printed something."""
        wait_for(f"{word!r} in the log", lambda: word in self.log)

    def processes(self) -> list[int]:
        """Live processes that carry the run's id."""
        mark = f"CPM_RUN_ID={self.id}"
        return [pid for pid in all_processes() if mark in environment_of(pid)]

    def await_nothing_left(self, seconds: float = PATIENCE_S) -> None:
        """Wait until no process of the run is alive."""
        wait_for(f"end of all processes of {self.id}", lambda: not self.processes(), seconds)

    @property
    def controller(self) -> int:
        """submitit's controller."""
        return int(self.json("submission.json")["job_id"])

    @property
    def agent(self) -> int:
        """The node agent of the newest attempt."""
        return wait_for("agent", lambda: [e["pid"] for e in self.events() if e.get("phase") == "prepare"])[-1]

    @property
    def guard(self) -> int:
        """The agent's parent."""
        return parent_of(self.agent)

    def rank(self, number: int) -> int:
        """A rank of the trainer."""
        mark = f"RANK={number}"
        return wait_for(f"rank {number}", lambda: [p for p in self.processes() if mark in environment_of(p)])[0]

    @property
    def torchrun(self) -> int:
        """The launcher of the ranks."""
        return parent_of(self.rank(0))

    def shorten_to(self, steps: int) -> None:
        """Lower the number of steps: how fast this machine is must not decide how a resumed run ends."""
        settings = self.json("trainer.json")
        settings["training"]["steps"] = steps
        (self.folder / "trainer.json").write_text(json.dumps(settings))

    @property
    def checkpoint_step(self) -> int:
        """The step of the newest checkpoint, which has its name a moment before `latest` names it; 0 without one."""
        names = [path.name for path in (self.folder / "checkpoints").glob("step-*")]
        return max((int(name.split("-")[1]) for name in names), default=0)


class LocalRuns:
    """A user with a home, a folder of job files and a folder of runs."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.runs_dir = root, root / "home", root / "runs"
        self.jobs = root / "jobs"
        for folder in (self.home, self.jobs, root / "bin", root / "tmp"):
            folder.mkdir()
        # no Slurm, even where the machine has one
        for name in COMMANDS:
            (root / "bin" / name).symlink_to(str(shutil.which(name)))
        self.environment = {
            "HOME": str(self.home),
            "PATH": f"{root / 'bin'}:{Path(sys.executable).parent}",
            "CPM_RUNS_DIR": str(self.runs_dir),
            "TMPDIR": str(root / "tmp"),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
        }
        (self.jobs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def job(self, name: str = "tiny", **changes: Any) -> Path:
        """Write a job file for the trainer, with dotted keys (`training__steps`) changed."""
        spec = json.loads(json.dumps(TRAINING)) | {"name": name}
        for key, value in changes.items():
            *parents, last = key.split("__")
            part = spec
            for parent in parents:
                part = part[parent]
            part[last] = value
        return self._write(name, spec)

    def command(self, *argv: str, name: str = "program", **more: Any) -> Path:
        """Write a job file for any program."""
        spec = {"name": name, "engine": "command", "profile": "cpu-2", "command": list(argv)}
        return self._write(name, spec | more)

    def bash(self, script: str, name: str = "program", **more: Any) -> Path:
        """Write a job file for a shell script."""
        return self.command("bash", "-c", textwrap.dedent(script), name=name, **more)

    def python(self, script: str, name: str = "program", **more: Any) -> Path:
        """Write a job file for a Python program."""
        return self.command(sys.executable, "-c", textwrap.dedent(script), name=name, **more)

    def _write(self, name: str, spec: dict[str, Any]) -> Path:
        path = self.jobs / f"{name}.yaml"
        path.write_text(yaml.safe_dump(spec))
        return path

    def cpm(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `cpm …` to its end."""
        return self._call("cpm", words, options)

    def submit(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run `cpm-submit …` to its end."""
        return self._call("cpm-submit", words, options)

    def open(self, *words: str | Path) -> subprocess.Popen[str]:
        """Start `cpm …` and go on."""
        return subprocess.Popen(
            self._argv("cpm", words),
            env=self.environment,
            cwd=self.jobs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def detached(self, job: Path, *words: str) -> LocalRun:
        """Submit a job with --detach."""
        done = self.submit(job, "--detach", *words)
        assert done.returncode == 0, done.stderr
        return self.run(done.stdout.strip())

    def run(self, run_id: str) -> LocalRun:
        """A run by its id."""
        return LocalRun(self, self.runs_dir / run_id)

    def newest(self) -> LocalRun:
        """The run that was made last."""
        return self.all()[-1]

    def all(self) -> list[LocalRun]:
        """All runs, the oldest first."""
        folders = (path for path in self.runs_dir.glob("[!.]*") if (path / "launch.json").exists())
        return [LocalRun(self, path) for path in sorted(folders, key=lambda path: path.name[-20:])]

    def _call(self, program: str, words: tuple[str | Path, ...], options: dict[str, Any]) -> Any:
        environment = {**self.environment, **options.pop("env", {})}
        settings = {"cwd": self.jobs, "stdin": subprocess.DEVNULL, "timeout": PATIENCE_S} | options
        return subprocess.run(self._argv(program, words), env=environment, capture_output=True, text=True, **settings)

    @staticmethod
    def _argv(program: str, words: tuple[str | Path, ...]) -> list[str]:
        return [str(Path(sys.executable).parent / program), *map(str, words)]


class Terminal:
    """A pseudo-terminal of 80 columns with `cpm-submit …` or `cpm …` in the foreground."""

    def __init__(self, runs: LocalRuns, program: str, *words: str | Path, columns: int = 80, **env: str) -> None:
        argv = runs._argv(program, words)
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            environment = {**runs.environment, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "24", **env}
            os.chdir(runs.jobs)
            os.execvpe(argv[0], argv, environment)
        os.set_blocking(self.descriptor, False)
        self.raw = ""
        self.code: int | None = None

    @property
    def text(self) -> str:
        """Everything shown so far, without escape codes."""
        self._read()
        return ESCAPE_CODES.sub("", self.raw)

    def await_text(self, *words: str) -> None:
        """Wait until all of these were shown, at whatever moment."""
        for word in words:
            try:
                wait_for(f"{word!r} on the terminal", lambda word=word: word in self.text)
            except AssertionError as error:
                raise AssertionError(f"{error}; shown: {self.text[-2000:]!r}") from error

    def press_ctrl_c(self) -> None:
        """As the keyboard does it: the terminal turns the character into SIGINT."""
        os.write(self.descriptor, b"\x03")

    def type(self, text: str) -> None:
        """Type a line."""
        os.write(self.descriptor, text.encode() + b"\n")

    def close(self) -> None:
        """Close the window: whoever runs in it gets SIGHUP."""
        os.close(self.descriptor)
        self.descriptor = -1

    def await_exit(self, seconds: float = PATIENCE_S) -> int:
        """Wait for the program's end; its exit code, -n for signal n."""
        wait_for("end of the terminal's program", self._ended, seconds)
        return self.code or 0

    def kill(self) -> None:
        """Clean up after a failed test."""
        if self.code is None and not self._ended():
            os.kill(self.pid, signal.SIGKILL)
            self.await_exit(5)
        if self.descriptor >= 0:
            self.close()

    def _ended(self) -> bool:
        self._read()
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def _read(self) -> None:
        try:
            while self.descriptor >= 0 and (piece := os.read(self.descriptor, 65536)):
                self.raw += piece.decode("utf-8", "replace")
        except OSError:  # nothing more now (EAGAIN), or ever (EIO)
            return
