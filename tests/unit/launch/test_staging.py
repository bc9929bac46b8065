"""Where a rehearsal takes place is decided by facts that are passed in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from launch_jobs import JOBS, NOWHERE, RUN_DIR, RUN_ID, SUBMITTER

from cpm_cluster.launch.prepare import prepare
from cpm_cluster.launch.staging import Surroundings, read_staged, stage_of, staged_rehearsal, variables
from cpm_cluster.specs.catalogue import default_catalogue

SANDBOX = "/sandbox/slurm.conf"
ALONE = Surroundings(has_sbatch=False, slurm_conf=None, has_site_conf=False, sandbox_conf=SANDBOX, has_sandbox=False)
ON_SITE = replace(ALONE, has_sbatch=True, has_site_conf=True)
IN_SANDBOX = replace(ALONE, has_sbatch=True, has_sandbox=True)
CATALOGUE = default_catalogue(NOWHERE, NOWHERE)


def rehearsal(here: Surroundings, job: str = "full_100b", *sets: str, exists: bool = True):
    staged = read_staged(JOBS / f"{job}.yaml", sets, CATALOGUE, here)
    return staged_rehearsal(staged, RUN_DIR, lambda path: exists)


@pytest.mark.parametrize(
    ("here", "stage", "slurm_conf"),
    [
        (ALONE, "local", None),
        (replace(ALONE, has_sandbox=True), "local", None),  # without sbatch
        (replace(ALONE, has_sbatch=True), "local", None),  # which no cluster answers
        (ON_SITE, "slurm", None),
        (replace(ON_SITE, has_sandbox=True), "slurm", None),
        (replace(ON_SITE, slurm_conf="/site/slurm.conf"), "slurm", None),
        (replace(ON_SITE, slurm_conf=SANDBOX), "sandbox", None),
        (IN_SANDBOX, "sandbox", SANDBOX),
    ],
)
def test_the_sandbox_where_nothing_leads_elsewhere_else_the_cluster_else_here(here, stage, slurm_conf):
    assert stage_of(here) == stage
    assert variables(here) == ({"SLURM_CONF": slurm_conf} if slurm_conf else {})


def test_on_the_sandbox_the_original_image_decides_what_is_written_and_the_stand_in_what_runs(tmp_path: Path):
    images = tmp_path / "cpm-cluster" / "images"
    images.mkdir(parents=True)
    (images / "cpmlive-flash-0.0.4.yaml").write_text("{tag: 'cpmlive-flash:0.0.4', gpu: false, torch: '2.9.1'}\n")
    catalogue = default_catalogue(NOWHERE, tmp_path)
    staged = read_staged(JOBS / "lora_100b.yaml", (), catalogue, IN_SANDBOX)
    assert (staged.written.engine, staged.written.image.bmtrain) == ("bmtrain", "0.2.3.post2")
    assert (staged.spec.engine, staged.spec.image.torch) == ("torch", "2.9.1")
    assert staged.name == "cpm-9g-100b-lora-rehearsal"


def test_what_the_user_sets_wins_over_what_the_stage_changes():
    assert rehearsal(IN_SANDBOX).spec.runtime == "podman"
    assert rehearsal(IN_SANDBOX, "full_100b", "runtime=docker").spec.runtime == "docker"


def test_only_the_cluster_itself_knows_what_its_nodes_have():
    (mounted,) = rehearsal(ON_SITE, exists=False).spec.mounts
    assert mounted == "/data/public/CPM-9G"
    (stand_in,) = rehearsal(IN_SANDBOX, exists=False).spec.mounts
    assert stand_in == f"{RUN_DIR}/mounts/0"


@pytest.mark.parametrize("here", [ON_SITE, IN_SANDBOX])
@pytest.mark.parametrize("job", ["full_100b", "lora_100b", "full_10b"])
def test_no_rehearsal_is_asked_to_stop_at_its_start(here, job):
    """The job's own lead, 30 minutes for a checkpoint of 1.2 TB, is as long as a whole rehearsal."""
    spec = rehearsal(here, job).spec
    plan = prepare(spec, RUN_ID, RUN_DIR, SUBMITTER).plan
    told = {setting.name: setting.value for setting in plan.batch}
    assert told["time"] == "0-00:30:00"
    assert told["signal"] == f"USR2@{plan.signal_lead_s}"
    assert plan.signal_lead_s <= spec.time_limit_s / 10
