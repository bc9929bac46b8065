"""From the records of a run to a verdict. The first failure by time counts, not the loudest."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any, Callable

from cpm_cluster.diagnosis.hang import hang
from cpm_cluster.diagnosis.verdict import Evidence, Verdict
from cpm_cluster.runs.records import read_events, read_json
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.state import State, exit_records
from cpm_cluster.specs.problems import printable, shortened

# How a rank dies that cannot say so itself. SIGABRT is left out: C++ ends with it after telling another error.
DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
# torchrun's summary (torch/distributed/elastic/multiprocessing/errors): `rank : 1 (local_rank: 1)`, `exitcode : -9 …`.
RANK_ENDED = re.compile(r"^\s*rank\s*:\s*(\d+) .*\n\s*exitcode\s*:\s*(-?\d+) ", re.MULTILINE)
# The kernel's memory killer, as slurmstepd tells it.
OOM_KILL = re.compile(r"Detected \d+ oom[-_]kill event|Some of the step tasks have been OOM Killed")
# slurmstepd ends a step or a job for Slurm's reasons; TASK FAILURE is ours: one node failed, srun ended the others.
ENDED_BY_SLURM = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+ DUE TO ([A-Z]+(?: [A-Z]+)*)")
NODE_FAILURE = re.compile(r"Node failure on ([\w.-]+)")
# A collective that broke: what torch, NCCL and Gloo say when another rank or the network between them is gone.
FABRIC = re.compile(
    r"NCCL|DistBackendError|[Gg]loo|Connection (?:reset|closed|refused|timed out)|[Tt]imed out|[Tt]imeout"
    r"|No route to host|Broken pipe"
)
# Where the agent's own output goes, and that of what started it.
AGENT_LOGS = ("submitit/*_log.out", "slurm-*.log")
SUBMITIT = re.compile("submitit INFO")
LINE_LIMIT = 1000
TAIL_BYTES = 1 << 20

Rule = Callable[[Run, State], "Verdict | None"]


def diagnose(run: Run, state: State) -> Verdict | None:
    """Why a run ended; None while it goes on, and where it finished."""
    if not state.ended or state.name == "finished":
        return None
    return next(verdict for rule in RULES if (verdict := rule(run, state)))


def _cancelled(run: Run, state: State) -> Verdict | None:
    if state.name != "cancelled":
        return None
    return Verdict("cancelled", "It was cancelled on request.", False, _resume(run))


def _slurm_said(run: Run, state: State) -> Verdict | None:
    """Preempted, or a node failed: Slurm ended it, whatever the ranks said then."""
    log, number, text = _slurm_log(run, state.attempt)
    found = next((m for m in ENDED_BY_SLURM.finditer(text) if m[1] in ("PREEMPTION", "NODE FAILURE")), None)
    if found is None or log is None:
        return None
    evidence = (Evidence(_inside(run, log), number + text.count("\n", 0, found.start()), _one_line(found[0])),)
    if found[1] == "PREEMPTION":
        return Verdict("preempted", "Slurm preempted it for another job.", True, _resume(run), evidence)
    node = _failed_node(run, state, text)
    cause = f"Node {node} failed." if node else "One of its nodes failed."
    return Verdict("node", cause, True, _resume(run), evidence, node=node)


def _preempted(run: Run, state: State) -> Verdict | None:
    """The ranks had the time to save: nothing else tells it from a signal of anybody's."""
    events = read_events(run.files.root / "events")
    if not any(e["kind"] == "preempted" and e.get("attempt") == state.attempt for e in events):
        return None
    return Verdict("preempted", "Slurm preempted it for another job.", True, _resume(run))


def _agent_killed(run: Run, state: State) -> Verdict | None:
    """What the other nodes say of it are consequences."""
    events = read_events(run.files.root / "events")
    found = next((e for e in events if e["kind"] == "agent_killed" and e.get("attempt") == state.attempt), None)
    if found is None:
        return None
    node = found["writer"]
    evidence = (Evidence(f"events/{node}.jsonl", 0, f"agent_killed {found.get('signal')}"),)
    cause = f"The node agent on {node} was killed ({found.get('signal')})."
    return Verdict("killed", cause, True, _resume(run), evidence)


def _stopped(run: Run, state: State) -> Verdict | None:
    if state.name != "stopped":
        return None
    if run.plan.trainer is not None and _checkpoint_step(run) is None and not _has_answers(run):
        cause = "It stopped before its time limit, with nothing to save yet."
    else:
        cause = "It saved and stopped before its time limit."
    return Verdict("time limit", cause, True, _resume(run))


def _lost(run: Run, state: State) -> Verdict | None:
    if state.name != "lost":
        return None
    cause = "Its node agent ended without recording how: it was killed, or the machine went down."
    logs = [path for pattern in AGENT_LOGS for path in run.files.root.glob(pattern)]
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    return Verdict("lost", cause, True, _resume(run), _last_line(run, newest) if newest else ())


def _killed_rank(run: Run, state: State) -> Verdict | None:
    """A rank that was killed: the others record errors, such as a closed connection, that only follow from it."""
    if run.plan.program.launcher != "torchrun" or _stop_signal(run, state):
        return None
    for log in sorted(run.files.root.glob(f"attempt-{state.attempt}/node-*/node.log")):
        text = log.read_bytes().decode("utf-8", "replace")
        for found in RANK_ENDED.finditer(text):
            rank, number = int(found[1]), -int(found[2])
            if number in DEADLY:
                line = text.count("\n", 0, found.start(2)) + 1
                evidence = (Evidence(_inside(run, log), line, f"rank {rank} exitcode {-number}"),)
                return _killed(run, state, f"Rank {rank} was", number, evidence, rank)
    return None


def _rank_error(run: Run, state: State) -> Verdict | None:
    records = [(path, record) for path in run.files.errors.glob("rank-*.json") if (record := read_json(path))]
    if not records:
        return None
    path, first = min(records, key=lambda pair: float(pair[1].get("time", 0)))
    rank, message = int(first.get("rank", 0)), _one_line(first.get("message"))
    if first.get("user_error"):
        remedy = f"correct the data, then: {_resume(run)}; a corrected job is submitted anew"
        return Verdict("user error", f"The trainer refused: {message}.", False, remedy, rank=rank)
    where = f", raised at {first['file']}:{first['line']}" if first.get("file") else ""
    evidence = (Evidence(_inside(run, path), 0, f"{first.get('type')}{where}"),)
    if first.get("type") == "FloatingPointError":
        remedy = "lower training.lr, raise training.warmup_steps, or look at the data of that step"
        return Verdict("diverged", f"The training diverged: {message}.", False, remedy, evidence, rank=rank)
    if first.get("type") == "OutOfMemoryError":
        remedy = "lower training.micro_batch or seq_len, switch training.recompute on, or take more GPUs"
        return Verdict("out of memory", f"The GPU was full: {message}.", False, remedy, evidence, rank=rank)
    if FABRIC.search(f"{first.get('type')} {message}"):
        cause = f"The ranks lost each other: rank {rank} said first: {message}."
        hung = hang(run, state)
        beats = (Evidence("heartbeats", 0, hung),) if hung else ()
        return Verdict("fabric", cause, True, _resume(run), evidence + beats, rank=rank)
    cause = f"Rank {rank} failed first, with {first.get('type')}: {message}."
    return Verdict("program", cause, False, f"see cpm logs {run.id} --rank {rank}", evidence, rank=rank)


def _node_error(run: Run, state: State) -> Verdict | None:
    errors = [e for e in read_events(run.files.root / "events") if e["kind"] == "error"]
    of_attempt = [e for e in errors if e.get("attempt") == state.attempt]
    if not of_attempt:
        return None
    # whoever knows the node at fault knows more than those who only miss it
    first = min(of_attempt, key=lambda event: (not event.get("blamed"), event["time"]))
    writer, message, blamed = first["writer"], _one_line(first.get("message")), first.get("blamed") or ()
    evidence = (Evidence(f"events/{writer}.jsonl", 0, "error"),)
    cause = f"Node {writer} could not run it: {message}."
    remedy = f"mend it there, then: {_resume(run)}"
    return Verdict("node", cause, bool(blamed), remedy, evidence, node=next(iter(blamed), writer))


def _told_to_stop(run: Run, state: State) -> Verdict | None:
    """A warning of the time limit, or a signal that no cpm cancel sent, that the program did not answer with 85."""
    number = _stop_signal(run, state)
    if not number:
        return None
    late = any(record.get("killed") for record in exit_records(run, state.attempt))
    how = "did not end in time and was killed" if late else f"ended with code {state.exit_code}"
    evidence = _last_line(run, _program_log(run, state))
    if number == "SIGUSR2":
        cause = f"It was asked to stop before its time limit, and {how}."
        return Verdict("time limit", cause, True, f"lengthen signal_lead or time_limit, or: {_resume(run)}", evidence)
    cause = f"It was told to end ({number}) by something else than cpm cancel, and {how}."
    return Verdict("terminated", cause, True, _resume(run), evidence)


def _exit_code(run: Run, state: State) -> Verdict | None:
    code, evidence = state.exit_code or 0, _last_line(run, _program_log(run, state))
    if code - 128 in DEADLY:
        subject = "The launcher (torchrun) was" if run.plan.program.launcher == "torchrun" else "The program was"
        return _killed(run, state, subject, code - 128, evidence)
    name = f" ({_signal_name(code - 128)})" if _signal_name(code - 128) else ""
    return Verdict("program", f"The program ended with code {code}{name}.", False, f"see cpm logs {run.id}", evidence)


RULES: tuple[Rule, ...] = (
    _cancelled,
    _slurm_said,
    _preempted,
    _stopped,
    _lost,
    _agent_killed,
    _killed_rank,
    _rank_error,
    _node_error,
    _told_to_stop,
    _exit_code,
)


def _killed(
    run: Run, state: State, subject: str, number: int, evidence: tuple[Evidence, ...], rank: int | None = None
) -> Verdict:
    name = _signal_name(number)
    if number == signal.SIGKILL and _kernel_killed(run, state):
        cause = f"{subject} killed by the kernel for lack of host memory."
        return Verdict("out of memory", cause, False, "ask for more resources.memory_per_node", evidence, rank=rank)
    if number == signal.SIGKILL:
        cause = f"{subject} killed ({name}) by somebody, or by the kernel for lack of host memory."
        remedy = f"if dmesg says `Out of memory`, ask for more resources.memory_per_node; else: {_resume(run)}"
        return Verdict("killed", cause, True, remedy, evidence, rank=rank)
    option = f" --rank {rank}" if rank is not None else ""
    cause = f"{subject} ended by a crash of native code ({name})."
    return Verdict("crashed", cause, False, f"see the traceback in cpm logs {run.id}{option}", evidence, rank=rank)


def _kernel_killed(run: Run, state: State) -> bool:
    """Whether Docker or slurmstepd saw the memory killer at work."""
    events = [e for e in read_events(run.files.root / "events") if e.get("attempt") == state.attempt]
    in_container = any((e.get("state") or {}).get("OOMKilled") for e in events if e["kind"] == "container")
    return in_container or OOM_KILL.search(_slurm_log(run, state.attempt)[2]) is not None


def _failed_node(run: Run, state: State, text: str) -> str | None:
    """As srun names it; else the only node that began, and did not say how it ended."""
    named = NODE_FAILURE.search(text)
    if named:
        return named[1]
    of_attempt = [e for e in read_events(run.files.root / "events") if e.get("attempt") == state.attempt]
    silent = {e["writer"] for e in of_attempt if e.get("phase") == "prepare"}
    silent -= {record["node"] for record in exit_records(run, state.attempt)}
    return silent.pop() if len(silent) == 1 else None


def _slurm_log(run: Run, attempt: int) -> tuple[Path | None, int, str]:
    """The log of an attempt's job with what was written during that attempt, and the number of its first line."""
    for log in run.files.root.glob("slurm-*.log"):
        text = log.read_bytes().decode("utf-8", "replace")
        begun = re.search(rf"^cpm: attempt {attempt} begins", text, re.MULTILINE)
        if begun:
            end = text.find(f"cpm: attempt {attempt + 1} begins", begun.end())
            return log, text.count("\n", 0, begun.start()) + 1, text[begun.start() : end if end >= 0 else None]
    return None, 0, ""


def _resume(run: Run) -> str:
    if run.plan.trainer is None:
        return f"cpm resume {run.id} (starts its program again)"
    if _has_answers(run):
        return f"cpm resume {run.id} (the answers that it has stay)"
    step = _checkpoint_step(run)
    if step is None:
        return f"cpm resume {run.id} (from the beginning: there is no checkpoint)"
    return f"cpm resume {run.id} (from the checkpoint of step {step})"


def _has_answers(run: Run) -> bool:
    """Whether task generate has written some."""
    return any(file.stat().st_size for file in (run.files.root / "generated").glob("*.jsonl"))


def _checkpoint_step(run: Run) -> int | None:
    """The step of the newest checkpoint that lies there."""
    try:
        return int((run.files.root / "checkpoints" / "latest").read_text().strip().rpartition("-")[2])
    except (OSError, ValueError):
        return None


def _stop_signal(run: Run, state: State) -> str | None:
    """The signal that asked an agent to stop."""
    return next((str(r["stopped_by"]) for r in exit_records(run, state.attempt) if r.get("stopped_by")), None)


def _signal_name(number: int) -> str | None:
    return signal.Signals(number).name if number in set(signal.Signals) else None


def _program_log(run: Run, state: State) -> Path:
    return run.files.node_dir(state.attempt, 0) / "node.log"


def _last_line(run: Run, log: Path) -> tuple[Evidence, ...]:
    """The last words in a log, submitit's own left out; of a long one without the number of their line."""
    try:
        with open(log, "rb") as file:
            skipped = max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES)
            file.seek(skipped)
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ()
    said = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not SUBMITIT.match(line)]
    numbered = [(0 if skipped else number, line) for number, line in said]
    # a progress bar draws itself again and again on one line
    return tuple(Evidence(_inside(run, log), n, _one_line(text.strip().split("\r")[-1])) for n, text in numbered[-1:])


def _inside(run: Run, path: Path) -> str:
    return str(path.relative_to(run.files.root))


def _one_line(text: Any) -> str:
    """The beginning of a message, safe for a terminal; its full stop is the sentence's."""
    lines = str(text).strip().split("\n")
    return shortened(printable(lines[0].strip()), LINE_LIMIT).rstrip(".")
