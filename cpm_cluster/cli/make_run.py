"""From a prepared job to its run directory."""

from __future__ import annotations

import json
from pathlib import Path

from cpm_cluster.calibration.planned import planned_record
from cpm_cluster.launch.prepare import Prepared
from cpm_cluster.launch.sbatch import batch_script
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
        fit=json.dumps(planned_record(prepared.spec, prepared.fit), indent=1) + "\n",
        forced=prepared.fit.shortages(),
    )
    run = create_run(plan, records, Path(prepared.spec.code) if prepared.spec.code else default_source(job))
    for stand_in in (path for path in prepared.spec.mounts if path.startswith(f"{plan.run_dir}/")):
        Path(stand_in).mkdir(parents=True)  # of a rehearsal, for what this machine does not have
    return run
