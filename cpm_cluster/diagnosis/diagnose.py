"""From the records of a run to a verdict. The first failure by time counts, not the loudest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpm_cluster.diagnosis.verdict import Evidence, Verdict
from cpm_cluster.runs.records import read_events, read_json
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.state import State

SIGKILL_CODE = 137


def diagnose(run: Run, state: State) -> Verdict | None:
    """Why a run ended; None while it goes on, and where it finished."""
    if not state.ended or state.name == "finished":
        return None
    rules: tuple[Callable[[Run, State], Verdict | None], ...] = (_cancelled, _stopped, _rank_error, _node_error, _lost)
    verdicts = (rule(run, state) for rule in rules)
    return next((verdict for verdict in verdicts if verdict), None) or _exit_code(run, state)


def _resume(run: Run, state: State) -> str:
    step = (state.progress or {}).get("checkpoint_step")
    from_where = f"from the checkpoint of step {step}" if step else "from the beginning: there is no checkpoint"
    return f"cpm resume {run.id} goes on {from_where}"


def _cancelled(run: Run, state: State) -> Verdict | None:
    if state.name != "cancelled":
        return None
    return Verdict("cancelled", "It was cancelled on request.", False, _resume(run, state))


def _stopped(run: Run, state: State) -> Verdict | None:
    if state.name != "stopped":
        return None
    return Verdict("time limit", "It saved and stopped before its time limit.", True, _resume(run, state))


def _rank_error(run: Run, state: State) -> Verdict | None:
    records = [(path, record) for path in run.files.errors.glob("rank-*.json") if (record := read_json(path))]
    if not records or state.name == "lost":
        return None
    path, first = min(records, key=lambda pair: float(pair[1].get("time", 0)))
    evidence = (_from_record(run, path, first),)
    rank, message = int(first.get("rank", 0)), str(first.get("message"))
    if first.get("user_error"):
        return Verdict("user error", f"Rank {rank} refused: {message}.", False, "correct it", evidence, rank=rank)
    if first.get("type") == "FloatingPointError":
        remedy = "lower training.lr, raise training.warmup_steps, or look at the data of that step"
        return Verdict("diverged", f"The training diverged: {message}.", False, remedy, evidence, rank=rank)
    cause = f"Rank {rank} failed first, with {first.get('type')}: {message}."
    return Verdict("program", cause, False, f"see cpm logs {run.id} --rank {rank}", evidence, rank=rank)


def _from_record(run: Run, path: Path, record: dict[str, Any]) -> Evidence:
    where = f", raised at {record['file']}:{record['line']}" if record.get("file") else ""
    return Evidence(str(path.relative_to(run.files.root)), 0, f"{record.get('type')}{where}")


def _node_error(run: Run, state: State) -> Verdict | None:
    events = read_events(run.files.root / "events")
    errors = [e for e in events if e["kind"] == "error" and e.get("attempt") == state.attempt]
    if not errors:
        return None
    node, message = errors[0]["writer"], str(errors[0]["message"])
    evidence = (Evidence(f"events/{node}.jsonl", 0, message),)
    return Verdict("node", f"Node {node} could not run it: {message}.", False, "mend it there", evidence, node=node)


def _lost(run: Run, state: State) -> Verdict | None:
    if state.name != "lost":
        return None
    cause = "Its node agent ended without recording how: it was killed, or the machine went down."
    return Verdict("lost", cause, True, _resume(run, state))


def _exit_code(run: Run, state: State) -> Verdict:
    code = state.exit_code or 0
    log = run.files.node_dir(state.attempt, 0) / "node.log"
    evidence = _last_line(run, log)
    if code == SIGKILL_CODE:
        cause = "It was killed with SIGKILL, most often for using too much host memory."
        return Verdict("killed", cause, False, "ask for more resources.memory_per_node", evidence)
    cause = f"The program ended with code {code}" + (f" (signal {code - 128})." if 128 < code < 160 else ".")
    return Verdict("program", cause, False, f"see cpm logs {run.id}", evidence)


def _last_line(run: Run, log: Path) -> tuple[Evidence, ...]:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    return tuple(Evidence(str(log.relative_to(run.files.root)), number, text) for number, text in numbered[-1:])
