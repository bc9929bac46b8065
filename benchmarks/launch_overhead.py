"""From submitting a job to its first training step: cpm-submit beside a script written by hand, and beside TorchX.

On the sandbox, which must be up (`cpm sandbox up`), as its ordinary user: a tiny model on two ranks of one node.

* container: `cpm-submit --detach` with runtime docker, beside `sbatch` of a script that has the same directives, srun
  and `docker run` (same image, mounts, variables, torchrun and trainer.json), without the node agent around it;
* bare: `cpm-submit --detach` with runtime bare, beside `torchx run -s slurm dist.ddp` of the same trainer;
* rootless: `cpm-submit --detach` with runtime docker-rootless, with an empty data root at first, then with the image.

The clock runs from before the command is started until rank 0 has done its first step (`time` in the first line of
metrics.jsonl): both sides run the same trainer, which writes it. Launches alternate who goes first, one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

import cpm_cluster
from cpm_cluster.launch.plan import LaunchPlan, NodeFacts, option
from cpm_cluster.launch.program import program_environment
from cpm_cluster.launch.runtimes import run_argv
from cpm_cluster.launch.sbatch import step_argv
from cpm_cluster.runs.layout import RunLayout
from cpm_cluster.runs.records import read_events, read_json, read_lines
from cpm_cluster.sandbox import dockerd, sandbox
from cpm_cluster.sandbox.state import Sandbox, SandboxError
from cpm_cluster.specs.catalogue import packaged_configs

ROOT = Path(__file__).resolve().parent.parent
TORCHX = "torchx==0.7.0"
MOST_RATIO, MOST_EXTRA_S, MOST_IMAGE_PHASE_S = 1.05, 2.0, 1.0
ROOTLESS_LAUNCHES = 3
# Two ranks of torch take 4 s to their first step on two idle cores, an image is loaded in 15 s.
PATIENCE_S = 240.0
POLL_S = 0.05
# Between questions to Slurm, which take time from what is measured.
SECONDS_BETWEEN_QUESTIONS = 5.0
SETTLING_S = 1.0
JOB: dict[str, Any] = {
    "name": "launch",
    "cluster": "bench",
    "model": {"layers": 1, "hidden": 16, "heads": 2, "kv_heads": 2, "head_dim": 8, "ffn": 24, "vocab": 259},
    "method": "full",
    "engine": "torch",
    "tokenizer": "bytes",
    "data": {"train": "builtin:python-reference"},
    "resources": {"nodes": 1, "gpus_per_node": 2, "cpus_per_node": 2, "memory_per_node": "16G"},
    "training": {"seq_len": 512, "steps": 1, "precision": "fp32", "zero_stage": 0},
    "time_limit": "10m",
}
BY_HAND = """\
#!/bin/bash
{directives}
set -euo pipefail
export MASTER_PORT=$((61000 + SLURM_JOB_ID % 4536))
{srun} bash -c '
    gpus=$(nvidia-smi --query-gpu=uuid --format=csv,noheader | paste -sd,)
    echo "$EPOCHREALTIME" > {run_dir}/docker-run-begins
    exec {docker}'
"""
STAGES = {
    "prepare": "run directory made",
    "submit": "job submitted",
    "queue": "batch script begins",
    "step": "srun has started the agent, or the script's step",
    "preflight": "node found fit",
    "docker": "rootless daemon answers",
    "image": "image found, or loaded",
    "program": "first training step done",
}


class LaunchError(Exception):
    """A launch did not come to its first step; the message says which, and what it printed."""


@dataclass(frozen=True)
class Launch:
    """Seconds from submission to the first step, and those of each stage that is known, by the names of STAGES."""

    total: float
    stages: dict[str, float]


def stages_between(moments: dict[str, float | None], submitted: float) -> dict[str, float]:
    """How long each stage took, from the moments of its end; unknown ones are part of the stage after them."""
    found, before = {}, submitted
    for name in STAGES:
        moment = moments.get(name)
        if moment is not None:
            found[name], before = moment - before, moment
    return found


class Login:
    """The ordinary user of the sandbox, with a home, job files and runs of this benchmark's own."""

    def __init__(self, state: Sandbox, environment: Path, work: Path) -> None:
        self.state, self.work, self.runs = state, work, work / "runs"
        self._home, self._scripts = work / "home", environment / "bin"
        self.node = state.node_names[0]
        # the entry of the stand-in image, which the sandbox keeps in the user's home
        shutil.copytree(state.home / ".config" / "cpm-cluster", self._home / ".config" / "cpm-cluster")
        clusters = self._home / ".config" / "cpm-cluster" / "clusters"
        clusters.mkdir(exist_ok=True)
        cluster = yaml.safe_load((packaged_configs() / "clusters" / "sandbox.yaml").read_text(encoding="utf-8"))
        cluster["runtimes"]["docker-rootless"]["data_root"] = f"{work}/docker"
        (clusters / "bench.yaml").write_text(yaml.safe_dump(cluster), encoding="utf-8")
        for path in (work, *work.rglob("*")):
            os.chown(path, state.uid, state.gid)

    def run(self, *argv: str | Path) -> str:
        """Stdout of a command of the user's in the benchmark's folder.

        Raises:
            LaunchError: it fails, or takes too long.
        """
        environment = {
            "HOME": str(self._home),
            "PATH": f"{self._scripts}:/usr/bin:/bin",
            "SLURM_CONF": str(self.state.slurm_conf),
            "CPM_RUNS_DIR": str(self.runs),
            "LANG": "C.UTF-8",
        }
        words = [*as_user(self.state), *map(str, argv)]
        try:
            done = subprocess.run(
                words, cwd=self.work, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
            )
        except subprocess.TimeoutExpired:
            raise LaunchError(f"{argv[0]} does not return within {PATIENCE_S:.0f} s") from None
        if done.returncode != 0:
            raise LaunchError(f"{' '.join(map(str, argv))} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    def job(self, **changes: Any) -> Path:
        """Write a job file in a folder of its own, which is all the code that a run copies."""
        path = Path(tempfile.mkdtemp(prefix="job-", dir=self.work)) / "job.yaml"
        path.write_text(yaml.safe_dump(JOB | changes), encoding="utf-8")
        for made in (path.parent, path):
            os.chown(made, self.state.uid, self.state.gid)
        return path

    def export(self, job: Path) -> RunLayout:
        """A prepared run, which nobody has submitted: all files that its trainer reads."""
        said = json.loads(self.run("cpm-submit", job, "--export", job.with_suffix(".sbatch"), "--json"))
        return RunLayout(Path(said["run_dir"]))

    def first_step(self, files: RunLayout, job_id: str) -> float:
        """Wait for the first step of a job, and for the job's end; when the step was done.

        Raises:
            LaunchError: the job ends without one, or takes too long.
        """
        deadline, asked = time.monotonic() + PATIENCE_S, time.monotonic()
        while not (rows := read_lines(files.root / "metrics.jsonl")):
            if time.monotonic() - asked > SECONDS_BETWEEN_QUESTIONS:
                asked = time.monotonic()
                if asked > deadline or (not self.is_queued(job_id) and not (files.root / "metrics.jsonl").exists()):
                    raise LaunchError(f"job {job_id} did not come to its first step:\n{self._said(files, job_id)}")
            time.sleep(POLL_S)
        while self.is_queued(job_id):
            if time.monotonic() > deadline:
                raise LaunchError(f"job {job_id} does not end:\n{self._said(files, job_id)}")
            time.sleep(SETTLING_S)
        time.sleep(SETTLING_S)
        return float(rows[0]["time"])

    def is_queued(self, job_id: str) -> bool:
        """Whether Slurm has not let go of a job."""
        return job_id in self.run("squeue", "--noheader", "--format=%A").split()

    def _said(self, files: RunLayout, job_id: str) -> str:
        """The ends of the logs of a job."""
        logs = [*files.root.glob("slurm-*.log"), *files.root.glob("attempt-1/node-0/*.log")]
        logs += self.work.glob(f"slurm-{job_id}-*")
        return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)

    def leave_nothing(self) -> None:
        """Cancel the jobs that were submitted from here, and remove the containers that docker does not end with them.

        The working folder is by which squeue tells them from others, whatever was submitting them when it was ended.
        """
        listed = [line.split(maxsplit=1) for line in self.run("squeue", "--noheader", "--format=%A %Z").splitlines()]
        jobs = [job for job, folder in listed if Path(folder).is_relative_to(self.work)]
        if jobs:
            self.run("scancel", *jobs)
            deadline = time.monotonic() + PATIENCE_S
            while any(map(self.is_queued, jobs)) and time.monotonic() < deadline:
                time.sleep(SETTLING_S)
        docker = ["docker", f"--host=unix://{engine_of(self.state, self.node).socket}"]
        for run in self.runs.glob("[!.]*") if self.runs.is_dir() else ():
            found = self.run(*docker, "ps", "--all", "--quiet", f"--filter=label=cpm.run={run.name}").split()
            if found:
                self.run(*docker, "rm", "--force", *found)


def with_cpm(login: Login, **changes: Any) -> Launch:
    """`cpm-submit --detach`."""
    job = login.job(**changes)
    submitted = time.time()
    said = json.loads(login.run("cpm-submit", job, "--detach", "--json"))
    files = RunLayout(Path(said["run_dir"]))
    job_id = str((read_json(files.submission) or {})["job_id"])
    first_step = login.first_step(files, job_id)
    events = read_events(files.root / "events")
    at = {event["phase" if event["kind"] == "phase" else "kind"]: event["time"] for event in reversed(events)}
    moments = {
        "prepare": at["created"],
        "submit": at["submitted"],
        "queue": begin_of(files.root / f"slurm-{job_id}.log"),
        "step": at["prepare"],
        # the phases of a container are not in every run
        "preflight": at.get("docker", at.get("image", at["training"])),
        "docker": at.get("image") if "docker" in at else None,
        "image": at["training"] if "image" in at else None,
        "program": first_step,
    }
    return Launch(first_step - submitted, stages_between(moments, submitted))


def by_hand(login: Login, **changes: Any) -> Launch:
    """`sbatch` of a script as one writes it by hand, whose files were prepared before."""
    files = login.export(login.job(**changes))
    script = write_script(login.state, files)
    submitted = time.time()
    job_id = login.run("sbatch", "--parsable", script).strip().split(";")[0]
    returned = time.time()
    first_step = login.first_step(files, job_id)
    moments = {
        "submit": returned,
        "queue": begin_of(files.root / f"slurm-{job_id}.log"),
        "step": float((files.root / "docker-run-begins").read_text()),
        "program": first_step,
    }
    return Launch(first_step - submitted, stages_between(moments, submitted))


def with_torchx(login: Login, **changes: Any) -> Launch:
    """`torchx run -s slurm dist.ddp` of the trainer, whose settings were prepared before."""
    files = login.export(login.job(**changes))
    argv = ["torchx", "run", "-s", "slurm", "-cfg", "partition=gpu1,time=10", "dist.ddp", "-j", "1x2"]
    argv += ["--cpu", "2", "--gpu", "2", "--memMB", "16384", "-m", "cpm_cluster.training.finetune", "--"]
    submitted = time.time()
    job_id = login.run(*argv, str(files.trainer)).strip().rpartition("/")[2]
    returned = time.time()
    first_step = login.first_step(files, job_id)
    return Launch(first_step - submitted, stages_between({"submit": returned, "program": first_step}, submitted))


def write_script(state: Sandbox, files: RunLayout) -> Path:
    """The script by hand: what the plan has for batch job, step and container, and nothing around it."""
    plan = LaunchPlan.from_json(files.plan.read_text(encoding="utf-8"))
    node = NodeFacts(
        name="$SLURMD_NODENAME",
        index=0,
        job_id="$SLURM_JOB_ID",
        attempt=1,
        master_address="127.0.0.1",
        master_port="$MASTER_PORT",
        gpu_uuids=("$gpus",),
        environment_file=f"{files.root}/environment",
        container_id_file=f"{files.root}/container.id",
        ulimits=(),  # they take no time, and what a daemon may grant is for the agent to find out
    )
    variables = program_environment(plan, node, str(files.node_dir(1, 0)))
    lines = "".join(f"{name}={value}\n" for name, value in sorted(variables.items()))
    program, verb, *words = run_argv(plan, node)
    # in double quotes for the variables of the script; nothing else in these words is special to a shell
    docker = [program, verb, "--rm", *('"{}"'.format(word.replace('"', '\\"')) for word in words)]
    text = BY_HAND.format(
        directives="\n".join(f"#SBATCH {option(setting)}" for setting in plan.batch),
        srun=" ".join(step_argv(plan)),
        docker=" \\\n        ".join(docker),
        run_dir=files.root,
    )
    script = files.root / "by-hand.sbatch"
    for path, content in ((script, text), (Path(node.environment_file), lines)):
        path.write_text(content, encoding="utf-8")
        path.chmod(0o600)
        os.chown(path, state.uid, state.gid)
    return script


def begin_of(log: Path) -> float | None:
    """When Slurm made a job's log, at once before the batch script; None where the file system does not tell."""
    done = subprocess.run(["stat", "--format=%.6W", str(log)], capture_output=True, text=True)
    try:
        return float(done.stdout) or None
    except ValueError:
        return None


Side = Callable[[], Launch]


def measure(pairs: int, ours: Side, theirs: Side, what: str) -> tuple[list[Launch], list[Launch]]:
    """Launches in pairs, after one of each that is not counted, since it fills the page cache."""
    ours(), theirs()
    found: tuple[list[Launch], list[Launch]] = ([], [])
    for pair in range(pairs):
        order = ((ours, found[0]), (theirs, found[1]))
        for side, launches in order if pair % 2 else order[::-1]:
            launches.append(side())
        print(f"  {what} pair {pair + 1}: {found[0][-1].total:.2f} s, {found[1][-1].total:.2f} s", file=sys.stderr)
    return found


def compare(ours: list[Launch], theirs: list[Launch], most_ratio: float, most_extra_s: float) -> dict[str, Any]:
    """Medians, median of the paired ratios and differences, and whether that is as wanted: `a × theirs + b s`."""
    pairs = [(a.total, b.total) for a, b in zip(ours, theirs, strict=True)]
    return {
        "cpm_submit": summary(ours),
        "peer": summary(theirs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "extra_s": statistics.median(a - b for a, b in pairs),
        "wanted": {"ratio": most_ratio, "extra_s": most_extra_s},
        "as_wanted": statistics.median(a - most_ratio * b for a, b in pairs) <= most_extra_s,
    }


def summary(launches: list[Launch]) -> dict[str, Any]:
    """Of several launches, in seconds."""
    names = [name for name in STAGES if all(name in launch.stages for launch in launches)]
    return {
        "launches": [asdict(launch) for launch in launches],
        "median_s": statistics.median(launch.total for launch in launches),
        "stages_s": {name: statistics.median(launch.stages[name] for launch in launches) for name in names},
    }


def all_figures(login: Login, pairs: int) -> dict[str, Any]:
    """Every comparison, and what it was measured on."""
    image = {"image": "cpmlive-flash:0.0.4", "slurm": {"nodelist": login.node}}
    docker, bare, rootless = (
        {"runtime": "docker", **image},
        {"runtime": "bare"},
        {"runtime": "docker-rootless", **image},
    )
    load_before = os.getloadavg()[0]
    container = measure(pairs, lambda: with_cpm(login, **docker), lambda: by_hand(login, **docker), "container")
    without = measure(pairs, lambda: with_cpm(login, **bare), lambda: with_torchx(login, **bare), "bare")
    loading, *present = [with_cpm(login, **rootless) for _ in range(ROOTLESS_LAUNCHES)]
    second = summary(present)
    return {
        "units": "seconds from submission to the first training step",
        "taken": time.strftime("%FT%T%z"),
        "machine": machine() | {"load_before_and_after": [load_before, os.getloadavg()[0]]},
        "versions": versions(login),
        "pairs": pairs,
        "container": compare(*container, MOST_RATIO, MOST_EXTRA_S),
        "bare": compare(*without, 1.0, 0.0),
        "rootless": {
            "image_loaded": summary([loading]),
            "image_present": second,
            "wanted": {"image_phase_s": MOST_IMAGE_PHASE_S},
            "as_wanted": second["stages_s"]["image"] < MOST_IMAGE_PHASE_S,
        },
    }


def machine() -> dict[str, Any]:
    """What it was measured on."""
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = cpus[0] if cpus else platform.machine()
    return {"cpu": cpu, "cpus": os.cpu_count(), "memory_gib": memory >> 30, "kernel": platform.release()}


def versions(login: Login) -> dict[str, str]:
    """Of what takes part, as it says itself."""
    docker = f"--host=unix://{engine_of(login.state, login.node).socket}"
    return {
        "cpm-cluster": cpm_cluster.__version__,
        "torchx": TORCHX.rpartition("=")[2],
        "torch": login.run("python", "-c", "import torch; print(torch.__version__)").strip(),
        "python": login.run("python", "-c", "import platform; print(platform.python_version())").strip(),
        "slurm": login.run("sinfo", "--version").split()[1],
        "docker": login.run("docker", docker, "version", "--format={{.Server.Version}}").strip(),
    }


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The figures for people."""
    box = figures["machine"]
    before, after = box["load_before_and_after"]
    yield f"{box['cpus']} × {box['cpu']}, {box['memory_gib']} GiB, Linux {box['kernel']}"
    yield f"load {before:.1f} before, {after:.1f} after"
    yield ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    peers = {"container": "sbatch, srun, docker run", "bare": "torchx run -s slurm dist.ddp"}
    columns: dict[str, Any] = {}
    yield f"\nseconds from submission to the first step, medians of {figures['pairs']} pairs"
    for name, peer in peers.items():
        found, wanted = figures[name], figures[name]["wanted"]
        columns |= {f"{name}: cpm-submit": found["cpm_submit"], f"{name}: {peer}": found["peer"]}
        yield f"{name:10} cpm-submit {found['cpm_submit']['median_s']:6.2f}   {peer} {found['peer']['median_s']:6.2f}"
        yield f"{'':10} ratio of pairs {found['ratio']:.2f}, difference {found['extra_s']:+.2f} s{verdict(found)}"
        yield f"{'':10} wanted: at most {wanted['ratio']:.2f} × the peer" + f" + {wanted['extra_s']:.0f} s"
    rootless = figures["rootless"]
    columns |= {"rootless: image loaded": rootless["image_loaded"], "rootless: image there": rootless["image_present"]}
    image_s = rootless["image_present"]["stages_s"]["image"]
    yield f"rootless   image phase with the image there {image_s:.2f} s{verdict(rootless)}"
    yield f"{'':10} wanted: less than {MOST_IMAGE_PHASE_S:.0f} s"
    yield from stage_table(columns)


def stage_table(columns: dict[str, Any]) -> Iterator[str]:
    """A line for each kind of launch, a column for each stage."""
    yield "\nseconds in each stage, medians; a stage that is not known is in the one after it"
    yield f"{'':38}" + "".join(f"{name:>10}" for name in (*STAGES, "all"))
    for label, found in columns.items():
        cells = [f"{found['stages_s'][name]:.2f}" if name in found["stages_s"] else "" for name in STAGES]
        yield f"{label:38}" + "".join(f"{cell:>10}" for cell in (*cells, f"{found['median_s']:.2f}"))
    yield from (f"  {name:10} until: {meaning}" for name, meaning in STAGES.items())


def verdict(found: dict[str, Any]) -> str:
    """Whether figures are as wanted."""
    return "" if found["as_wanted"] else "   NOT AS WANTED"


def obstacle(state: Sandbox) -> str | None:
    """Why nothing can be measured here; None where it can."""
    if os.geteuid() != 0:
        return "the sandbox and its ordinary user need root"
    if not state.slurm_conf.exists():
        return f"there is no sandbox in {state.root}; cpm sandbox up makes one"
    try:
        if not sandbox.status(state).is_up:
            return "the sandbox is not up; cpm sandbox up, and cpm sandbox status"
    except SandboxError as error:
        return str(error)
    if engine_of(state, state.node_names[0]).file.pid is None:
        return f"dockerd of {state.node_names[0]} is not up; cpm sandbox up"
    return None


def engine_of(state: Sandbox, node: str) -> dockerd.Engine:
    """The Docker daemon of a node."""
    return next(engine for engine in dockerd.engines(state) if engine.name == node)


def as_user(state: Sandbox) -> list[str]:
    """Argv prefix of the ordinary user; what setpriv itself starts is still found with the rights of root."""
    return ["setpriv", f"--reuid={state.uid}", f"--regid={state.gid}", "--clear-groups", "--", "env"]


def install(state: Sandbox, environment: Path) -> None:
    """cpm-cluster as it is now, TorchX, and the packages of the image, with a Python that the ordinary user can run.

    Raises:
        LaunchError: there is no such Python, or pip fails.
    """
    pip = [f"{environment}/bin/python", "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    commands = [[*pip, "--no-deps", "--force-reinstall", str(ROOT)]]
    if not (environment / "bin" / "torchx").exists():
        recipe = yaml.safe_load((ROOT / "containers" / "cpu" / "recipe.yaml").read_text(encoding="utf-8"))
        make = [usable_python(state), "-m", "venv", "--clear", str(environment)]
        commands = [make, [*pip, f"{ROOT}[train]", TORCHX, *recipe["python_packages"]]]
    print(f"installing in {environment}", file=sys.stderr)
    for argv in commands:
        if subprocess.run(argv).returncode != 0:
            raise LaunchError(f"{' '.join(argv)} failed")


def usable_python(state: Sandbox) -> str:
    """This Python, or the system's: whichever the ordinary user can run.

    Raises:
        LaunchError: neither.
    """
    candidates = (str(Path(sys.executable).resolve()), "/usr/bin/python3")
    for python in candidates:
        argv = [*as_user(state), python, "-c", "import ensurepip"]
        if subprocess.run(argv, cwd="/", capture_output=True).returncode == 0:
            return python
    raise LaunchError(f"{state.user} can run none of {', '.join(candidates)} with venv; apt-get install python3-venv")


@contextmanager
def opened(state: Sandbox, environment: Path | None) -> Iterator[Login]:
    """What the benchmark needs, removed after it, whatever happens; an environment that was named stays."""
    work = Path(tempfile.mkdtemp(prefix="launch-overhead-", dir=state.shared))
    made = environment or Path(tempfile.mkdtemp(prefix="launch-overhead-", dir="/var/tmp"))
    try:
        made.mkdir(exist_ok=True)
        if environment is None:
            made.chmod(0o755)
        install(state, made)
        login = Login(state, made, work)
        try:
            yield login
        finally:
            login.leave_nothing()
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if environment is None:
            shutil.rmtree(made, ignore_errors=True)


def main() -> int:
    """Print the comparison; 1 when a launch failed."""
    parser = argparse.ArgumentParser(description="From submission to the first step, beside named peers.")
    parser.add_argument("--pairs", type=int, default=7, help="launches of each side (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--environment",
        type=Path,
        metavar="DIR",
        help="a Python environment that the sandbox's user can read; made there and kept (default: made, and removed)",
    )
    options = parser.parse_args()
    state = Sandbox()
    reason = obstacle(state)
    if reason:
        print(f"launch_overhead: skipped: {reason}")
        return 0
    # so that everything is cleaned up after a timeout, too
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with opened(state, options.environment and options.environment.resolve()) as login:
            figures = all_figures(login, options.pairs)
    except (LaunchError, SandboxError) as error:
        print(f"launch_overhead: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(figures)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
