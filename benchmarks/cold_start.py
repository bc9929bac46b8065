"""How long it takes to see what would run: `cpm-submit JOB --dry-run` beside `torchx run --dryrun -s slurm`.

The same job (8 nodes of 8 GPUs), whole processes, in pairs that alternate who goes first, so that a change of the
machine's load hits both. Printed are both medians, the median of the paired ratios, and the modules that cpm-submit
loads, which prove that nothing heavy is among them.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PAIRS = 25
HEAVY = ("torch", "submitit", "cloudpickle", "rich", "numpy", "tensorboard", "tensorboardX", "importlib.metadata")
BIN = Path(sys.executable).parent
ROOT = Path(__file__).resolve().parent.parent
CPM = [str(BIN / "cpm-submit"), str(ROOT / "jobs" / "full_100b.yaml"), "--dry-run"]
TORCHX = [str(BIN / "torchx"), "run", "--dryrun", "-s", "slurm", "-cfg", "partition=gpu1"]
TORCHX += ["dist.ddp", "-j", "8x8", "--gpu", "8", "--script", "train.py"]


def seconds(argv: list[str], folder: str) -> float:
    """Wall time of one whole process; a failing one ends the benchmark with its message."""
    started = time.perf_counter()
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    elapsed = time.perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"{argv[0]} failed:\n{done.stderr[-2000:]}")
    return elapsed


def measure() -> tuple[list[float], list[float]]:
    """Paired wall times in seconds, after one unmeasured run each that fills the page cache."""
    ours, theirs = [], []
    with tempfile.TemporaryDirectory() as folder:
        for argv in (CPM, TORCHX):
            seconds(argv, folder)
        for pair in range(PAIRS):
            order = ((CPM, ours), (TORCHX, theirs)) if pair % 2 else ((TORCHX, theirs), (CPM, ours))
            for argv, times in order:
                times.append(seconds(argv, folder))
    return ours, theirs


def imports() -> list[tuple[int, int, str]]:
    """(own time, cumulative time, module) of every import of a dry run, microseconds."""
    code = f"import sys; sys.argv[1:] = {CPM[1:]!r}; from cpm_cluster.cli.main import submit_main; submit_main()"
    argv = [sys.executable, "-X", "importtime", "-c", code]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True)
    rows = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if "|" in line]
    return [(int(own), int(total), name.rstrip()[1:]) for own, total, name in rows if own.strip().isdigit()]


def main() -> int:
    """Print the comparison; 1 when something heavy is imported."""
    ours, theirs = measure()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"cpm-submit --dry-run      median {statistics.median(ours):.3f} s   fastest {min(ours):.3f} s")
    print(f"torchx run --dryrun       median {statistics.median(theirs):.3f} s   fastest {min(theirs):.3f} s")
    print(f"ratio of {PAIRS} pairs         median {statistics.median(ratios):.2f}      (wanted: at most 0.50)")
    rows = imports()
    names = {name.strip() for _, _, name in rows}
    print(f"\nimports of cpm-submit --dry-run: {len(names)} modules; the ten that take longest, with what they import:")
    for own, total, name in sorted(rows, key=lambda row: -row[1])[:10]:
        print(f"  {total / 1000:6.1f} ms  ({own / 1000:5.1f} ms alone)  {name.strip()}")
    heavy = sorted(name for name in names if name.startswith(HEAVY) and name.split(".")[0] in (*HEAVY, "importlib"))
    print("heavy modules among them: " + (", ".join(heavy) or "none"))
    return 1 if heavy else 0


if __name__ == "__main__":
    sys.exit(main())
