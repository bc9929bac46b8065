"""From a prepared job to its run directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpm_cluster.launch.prepare import Prepared
from cpm_cluster.launch.sbatch import batch_script
from cpm_cluster.planner.job_setup import job_setup
from cpm_cluster.runs.create import Records, create_run
from cpm_cluster.runs.run import Run
from cpm_cluster.runs.snapshot import default_source
from cpm_cluster.specs.resolved import resolved_yaml


def make_run(prepared: Prepared, job: Path) -> Run:
    """Write the run directory of a job; see `create_run` for what it raises."""
    plan = prepared.plan
    records = Records(
        job=job.read_bytes(),
        resolved=resolved_yaml(prepared.spec),
        script=batch_script(plan) if plan.scheduler == "slurm" else None,
        fit=json.dumps(_predicted(prepared), indent=1) + "\n",
        forced=prepared.fit.shortages(),
    )
    run = create_run(plan, records, Path(prepared.spec.code) if prepared.spec.code else default_source(job))
    for stand_in in (path for path in prepared.spec.mounts if path.startswith(f"{plan.run_dir}/")):
        Path(stand_in).mkdir(parents=True)  # of a rehearsal, for what this machine does not have
    return run


def _predicted(prepared: Prepared) -> dict[str, Any]:
    """The fit, and of what it was predicted where that runs on real GPUs: `cpm plan --calibrate` compares."""
    spec = prepared.spec
    setup = job_setup(spec) if spec.resources.gpus_per_node and not spec.cluster.pretend_gpus else None
    inputs = {"image": spec.image.tag if spec.image else None, "setup": asdict(setup) if setup else None}
    return {"verdict": prepared.fit.verdict, **asdict(prepared.fit), **inputs}
