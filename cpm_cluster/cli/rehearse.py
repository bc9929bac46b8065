"""cpm-submit --rehearse: run a rehearsal, stop it as before a time limit, see it go on, and say what was proven."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cpm_cluster.cli import exit_codes
from cpm_cluster.cli.cancel import cancel_run
from cpm_cluster.cli.follow import POLL_S, View, open_view
from cpm_cluster.launch.rehearsal import Rehearsal
from cpm_cluster.monitoring.run_state import as_data, current_state, settle
from cpm_cluster.runs.records import read_json
from cpm_cluster.runs.run import Run, read_submission
from cpm_cluster.runs.state import State
from cpm_cluster.schedulers import Scheduler


def run_rehearsal(run: Run, scheduler: Scheduler, rehearsal: Rehearsal, as_json: bool) -> int:
    """Submit the rehearsal and watch it to its end; 0 when all that it can prove is proven."""
    scheduler.submit(run)
    view = open_view(run, as_json)
    try:
        state = _watch(run, scheduler, view)
    except KeyboardInterrupt:
        cancel_run(run)
        raise
    finally:
        view.pause()
    proven = list(_proven(run, state))
    complete = state.name == "finished" and (run.plan.trainer is None or state.attempt > 1)
    if as_json:
        found = {**as_data(run, state, settle(run, state)), "proven": proven, "unproven": rehearsal.unproven}
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join(_report(run, state, proven, rehearsal)))
    return exit_codes.OK if complete else state.exit_code or exit_codes.FAILED


def _watch(run: Run, scheduler: Scheduler, view: View) -> State:
    """Warn after the first checkpoint, as Slurm does before a time limit; start again where the scheduler does not."""
    warned, resumed = False, False
    while True:
        state = current_state(run)
        view.show(state)
        submission = read_submission(run)
        step = (state.progress or {}).get("checkpoint_step")
        if state.name == "running" and step and not warned and submission:
            scheduler.warn(run, submission)
            warned = True
        if state.name == "stopped" and not resumed:
            scheduler.submit(run)
            resumed = True
        elif state.ended:
            return state
        time.sleep(POLL_S)


def _proven(run: Run, state: State) -> Iterator[str]:
    records = filter(None, map(read_json, (run.files.root / "exit").glob("*.json")))
    nodes = {
        str(record["node"]) for record in records if record.get("exit_code") in (exit_codes.OK, exit_codes.STOPPED)
    }
    if nodes:
        yield f"{len(nodes)} of {run.plan.nodes} nodes ran it ({run.plan.runtime}): {', '.join(sorted(nodes))}"
    ranks = _ranks(run)
    if ranks:
        yield f"{len(ranks)} ranks, each of a world of {', '.join(sorted({world for _, world in ranks}))}"
    losses = _losses(run)
    if len(losses) > 1:
        yield f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last"
    resumed = re.search(r"^continuing after step (\d+)", _log(run, state.attempt), re.MULTILINE)
    if resumed:
        yield f"stopped as before a time limit, and went on after the checkpoint of step {resumed.group(1)}"


def _ranks(run: Run) -> set[tuple[str, str]]:
    """(rank, world size) as every rank of every attempt said at its start."""
    logs = run.files.root.glob("attempt-*/node-*/rank-*.log")
    said = (re.search(r"^rank (\d+) of (\d+):", path.read_text("utf-8", "replace"), re.MULTILINE) for path in logs)
    return {(match.group(1), match.group(2)) for match in said if match}


def _losses(run: Run) -> list[float]:
    path = run.files.root / "metrics.jsonl"
    lines = path.read_text("utf-8", "replace").splitlines() if path.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]
    return [float(row["loss"]) for row in rows]


def _log(run: Run, attempt: int) -> str:
    path: Path = run.files.node_dir(attempt, 0) / "rank-0.log"
    return path.read_text("utf-8", "replace") if path.exists() else ""


def _report(run: Run, state: State, proven: list[str], rehearsal: Rehearsal) -> Iterator[str]:
    yield ""
    yield f"{run.id}: {state.name}, attempt {state.attempt}"
    yield "  proven:"
    yield from (f"    {line}" for line in proven or ["nothing"])
    yield "  left open:"
    yield from (f"    {line}" for line in rehearsal.unproven)
    verdict = settle(run, state)
    if verdict:
        yield f"  {verdict}"
    yield f"  run directory: {run.files.root}"
