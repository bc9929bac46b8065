"""What `cpm shell` asks Slurm for, and what it runs there."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from launch_jobs import JOBS, NOWHERE, SUBMITTER, node

from cpm_cluster.launch.runtimes import shell_argv
from cpm_cluster.launch.sbatch import by_hand
from cpm_cluster.launch.shell import epilog_script, read_shell_job, shell_command, shell_plan
from cpm_cluster.specs.catalogue import default_catalogue
from cpm_cluster.specs.problems import SpecError

CATALOGUE = default_catalogue(NOWHERE, NOWHERE)
HOME = Path("/home/u/work")
RUN_ID = "cpm-shell-20260102-030405-00ab"


def spec_of(profile: str, *sets: str, job: str | None = None, has_slurm: bool = True, **asked: str):
    options = {f"--{name}": text for name, text in {"time": "1h", **asked}.items()}
    path = JOBS / f"{job}.yaml" if job else None
    return read_shell_job(profile, path, options, sets, CATALOGUE, has_slurm)


def plan_of(profile: str, *sets: str, folder: Path = HOME, **more):
    return shell_plan(spec_of(profile, *sets, **more), RUN_ID, folder, SUBMITTER)


def refusal(profile: str, *sets: str, **more) -> str:
    with pytest.raises(SpecError) as caught:
        plan_of(profile, *sets, **more)
    return str(caught.value)


def test_a_profile_is_enough():
    plan = plan_of("lora-100b-8x80g", cluster="nine-g")
    assert (plan.runtime, plan.container.image) == ("docker-rootless", "cpmlive-flash:0.0.4")
    command = shell_command(plan)
    assert command[:3] == ["srun", f"--job-name={RUN_ID}", f"--task-epilog={HOME}/.{RUN_ID}/epilog"]
    for option in ("--partition=gpu1", "--nodes=1", "--gres=gpu:8", "--time=0-01:00:00", "--pty"):
        assert option in command
    assert command[-3:] == [SUBMITTER.python, f"{HOME}/.{RUN_ID}/package", f"{HOME}/.{RUN_ID}"]


def test_modules_are_loaded_on_the_node_before_the_agent_starts():
    command = shell_command(plan_of("lora-100b-8x80g", cluster="nine-g"))
    shell, option, script, name, *_ = command[command.index("--pty") + 1 :]
    assert (shell, option, name) == ("bash", "-c", "cpm-shell")
    assert "module load rootless-docker/default" in script and script.endswith('exec "$@"')
    subprocess.run(["bash", "-n", "-c", script], check=True)


def test_the_current_folder_is_there_under_the_same_path():
    plan = plan_of("lora-100b-8x80g", cluster="nine-g")
    argv = shell_argv(plan, node(plan))
    assert f"--mount=type=bind,source={HOME},target={HOME}" in argv
    assert f"--workdir={HOME}" in argv
    assert not any(RUN_ID in word for word in argv)
    assert argv[-1] == "bash"
    assert by_hand(plan)[-1].endswith(f"--workdir={HOME} cpmlive-flash:0.0.4 bash")


def test_with_pyxis_srun_itself_enters_the_folder(tmp_path):
    (tmp_path / "site.yaml").write_text("{scheduler: slurm, runtimes: {pyxis: {}}, default_time: 1h}\n")
    interactive = {s.name: s.value for s in plan_of("lora-10b-2x80g", cluster=str(tmp_path / "site.yaml")).interactive}
    assert interactive["container-workdir"] == str(HOME)
    assert f"{HOME}:{HOME}" in interactive["container-mounts"]


def test_a_job_file_brings_its_image_mounts_and_environment():
    plan = plan_of("", "env={A: b}", job="full_100b")
    assert (plan.runtime, plan.trainer, plan.secrets) == ("docker", None, ())
    assert {mount.source for mount in plan.container.mounts} >= {"/data/public/CPM-9G", str(HOME)}
    assert "A" in {variable.name for variable in plan.environment}


@pytest.mark.parametrize("profile", ["full-100b-64x80g", "full-10b-16x80g"])
def test_of_many_nodes_one_is_asked_for(profile):
    plan = plan_of(profile, cluster="nine-g")
    assert (plan.nodes, plan.runtime) == (1, "docker-rootless")


@pytest.mark.parametrize(("time", "told"), [("20m", "0-00:20:00"), ("30s", "0-00:00:30"), ("2h", "0-02:00:00")])
def test_the_time_is_what_was_asked_for_whatever_warning_a_job_would_get(time, told):
    assert {s.name: s.value for s in plan_of("", job="full_100b", time=time).interactive}["time"] == told


def test_who_asks_for_no_image_gets_none():
    assert plan_of("lora-10b-2x80g", "image=null", "runtime=conda", cluster="nine-g").container is None
    assert plan_of("lora-10b-2x80g", "runtime=conda", cluster="nine-g").container is None
    assert plan_of("lora-10b-2x80g", cluster="nine-g", image="9g:0.0.13").container.image == "9g:0.0.13"


def test_here_there_is_neither_srun_nor_a_container():
    plan = plan_of("cpu-2", has_slurm=False)
    assert plan.container is None
    assert shell_command(plan) == [SUBMITTER.python, f"{HOME}/.{RUN_ID}/package", f"{HOME}/.{RUN_ID}"]


@pytest.mark.parametrize(
    ("profile", "sets", "asked", "message"),
    [
        ("lora-100b", [], {}, 'cpm shell: profile: "lora-100b" is not in configs/profiles (did you mean'),
        ("cpu-2", [], {"cluster": "nineg"}, '--cluster: cluster: "nineg" is not in configs/clusters (did you mean'),
        ("cpu-2", [], {"time": "3x"}, '--time: time_limit: "3x" is not a duration'),
        ("cpu-2", [], {"image": "frob"}, '--image: image: "frob" is not in configs/images'),
        ("cpu-2", ["frob"], {}, "--set frob: is not of the form key.subkey=value"),
    ],
)
def test_what_is_wrong_is_named_by_the_option_that_said_it(profile, sets, asked, message):
    assert message in refusal(profile, *sets, **{"cluster": "nine-g", **asked})


@pytest.mark.parametrize("folder", ["/usr", "/", "/home/u/a,b", '/home/u/"q"'])
def test_a_folder_that_cannot_be_mounted(folder):
    assert "run it in a folder of yours" in refusal("lora-10b-2x80g", cluster="nine-g", folder=Path(folder))
    assert plan_of("cpu-2", has_slurm=False, folder=Path(folder)).workdir == folder  # without a container it may be


def test_the_epilog_does_nothing_where_the_agent_has_cleaned_up(tmp_path):
    plan = plan_of("lora-10b-2x80g", cluster="nine-g")
    script = epilog_script(plan).replace(SUBMITTER.python, "echo")

    def run() -> list[str]:
        environment = {"TMPDIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert run() == []
    (tmp_path / RUN_ID).mkdir()
    assert run() == [f"{HOME}/.{RUN_ID}/package", f"{HOME}/.{RUN_ID}", "clean"]
