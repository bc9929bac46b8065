"""The batch script: sound bash, the facts of the CPM-9G manual in it or corrected with a reason, Slurm's rules kept."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import launch_jobs
import pytest
from launch_jobs import MINIMAL, SITE, packaged, written

from cpm_cluster.cli.dry_run import as_data, as_text
from cpm_cluster.launch.explain import explanations, matching
from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.launch.prepare import Prepared
from cpm_cluster.launch.sbatch import batch_script, by_hand

JOBS = sorted(path.stem for path in launch_jobs.JOBS.glob("*.yaml") if path.stem != "quickstart")


def _shellcheck() -> str:
    found = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    assert found, "shellcheck comes with the test extra: pip install -e '.[test]'"
    return found


def _lines(plan: LaunchPlan) -> list[str]:
    return batch_script(plan).splitlines()


def _directives(plan: LaunchPlan) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in _lines(plan) if line.startswith("#SBATCH")]


def _srun(plan: LaunchPlan) -> list[str]:
    return [f"--{s.name}" if s.value is None else f"--{s.name}={s.value}" for s in plan.step]


def _executed(plan: LaunchPlan) -> str:
    """The script without its comments."""
    return "\n".join(line for line in _lines(plan) if not line.lstrip().startswith("#"))


def _explained(prepared: Prepared, key: str) -> str:
    return "\n".join(map(str, matching(list(explanations(prepared.spec, prepared.fit, prepared.plan)), key)))


class TestBash:
    @pytest.mark.parametrize("job", JOBS)
    def test_bash_and_shellcheck_have_nothing_to_say(self, job: str, tmp_path: Path) -> None:
        script = tmp_path / "job.sbatch"
        script.write_text(batch_script(packaged(job).plan), encoding="utf-8")
        subprocess.run(["bash", "-n", str(script)], check=True)
        done = subprocess.run([_shellcheck(), str(script)], stdout=subprocess.PIPE, text=True)
        assert done.stdout == ""

    @pytest.mark.parametrize(
        "site", [SITE + "requeue: false\n", SITE.replace("docker: {}", "docker: {modules: [a/1]}")]
    )
    def test_nor_for_a_site_that_does_not_requeue_or_has_modules(self, site: str, tmp_path: Path) -> None:
        script = tmp_path / "job.sbatch"
        script.write_text(batch_script(written(tmp_path, MINIMAL, "runtime=docker", site=site).plan))
        done = subprocess.run([_shellcheck(), str(script)], stdout=subprocess.PIPE, text=True)
        assert done.stdout == ""


class TestFactsOfTheManual:
    """`srun -p gpu1 --nodelist=g2001 -N 1 -n 8 -c 8 --gres=gpu:8`, `module load`, `docker load`, `docker run …`."""

    @pytest.mark.parametrize(
        "line",
        [
            "#SBATCH --partition=gpu1",
            "#SBATCH --nodelist=g2001",
            "#SBATCH --nodes=1",
            "#SBATCH --gres=gpu:8",
            "#SBATCH --cpus-per-task=64",  # -n 8 -c 8
            "module load rootless-docker/default || {",
            "#     --shm-size=4294967296 \\",  # 4g
            "#     --mount=type=bind,source=/data/public/CPM-9G,target=/CPM-9G,readonly \\",
            "#     --network=host \\",
            "#     cpmlive-flash:0.0.4 python3 \\",
            "# after loading /data/public/images/cpmlive-flash-0.0.4.tar where the image is missing",
        ],
    )
    def test_it_is_in_the_script_of_lora_on_one_node(self, line: str) -> None:
        assert line in _lines(packaged("lora_100b").plan)

    @pytest.mark.parametrize(
        "line",
        [
            "#SBATCH --partition=gpu1",
            "#SBATCH --nodes=8",
            "#SBATCH --gres=gpu:8",
            "#SBATCH --cpus-per-task=64",
            "#     --shm-size=4294967296 \\",
            "#     --network=host \\",
            "#     --user=1000:1001 \\",
            "#     cpmlive-flash:0.0.4 python3 \\",
            "#     --nnodes=8 \\",
        ],
    )
    def test_it_is_in_the_script_of_full_tuning_on_eight_nodes_with_the_docker_of_root(self, line: str) -> None:
        assert line in _lines(packaged("full_100b").plan)

    @pytest.mark.parametrize(
        ("key", "never_in_the_script", "reason"),
        [
            ("manual.gpus", r"--gpus[= ]all\b", "by UUID"),
            ("manual.sh", r"--sh\b(?!m)", "no option of docker"),
            ("manual.ntasks", r"-n 8\b|--ntasks=8|-c 8\b", "one task with all CPUs starts the eight ranks"),
            ("manual.network", r"--network=(?!host)", "no other node reaches"),
            ("manual.detach", r"-it\b|-d\b|--detach", "would outlive the job"),
            ("manual.tag", r"docker tag", "the archive carries its own"),
            ("manual.docker-ps", r"docker ps", "SecurityOptions"),
        ],
    )
    @pytest.mark.parametrize("job", ["lora_100b", "full_100b"])
    def test_what_is_wrong_in_it_is_corrected_and_explained(
        self, job: str, key: str, never_in_the_script: str, reason: str
    ) -> None:
        prepared = packaged(job)
        assert not re.search(never_in_the_script, batch_script(prepared.plan))
        assert not any(re.search(never_in_the_script, line) for line in by_hand(prepared.plan))
        text = _explained(prepared, key)
        assert "the CPM-9G manual" in text
        assert reason in text

    def test_the_options_that_replace_it_say_why(self) -> None:
        prepared = packaged("lora_100b")
        assert "would take the GPUs of other jobs" in _explained(prepared, "docker.gpus")
        assert "-n 8 would start eight of everything" in _explained(prepared, "sbatch.ntasks-per-node")
        assert "rootless line lacks it" in _explained(prepared, "docker.network")
        assert "manual's 4 GiB" in _explained(prepared, "docker.shm-size")

    def test_by_hand_it_is_the_manuals_way_corrected(self) -> None:
        srun, *rest = by_hand(packaged("lora_100b").plan)
        assert srun == (
            "srun --partition=gpu1 --nodelist=g2001 --nodes=1 --ntasks-per-node=1 --cpus-per-task=64 --gres=gpu:8"
            " --exclusive --mem=0 --time=1-00:00:00 --pty bash"
        )
        module, is_rootless, load, gpus, run = rest
        assert module == "module load rootless-docker/default"
        assert is_rootless.startswith("docker info --format '{{.SecurityOptions}}'  # names rootless")
        assert load == "docker load --input /data/public/images/cpmlive-flash-0.0.4.tar"
        assert gpus == "GPU_UUIDS=$(nvidia-smi --query-gpu=uuid --format=csv,noheader | paste -sd,)"
        assert run.startswith("docker run --interactive --tty --rm --init --network=host --shm-size=4294967296 ")
        assert '"--gpus=\\"device=$GPU_UUIDS\\""' in run
        assert run.endswith(" cpmlive-flash:0.0.4 bash")

    def test_by_hand_a_job_of_eight_nodes_takes_one(self) -> None:
        """Seven idle nodes would see nothing: srun gives a terminal to the first task only."""
        lines = by_hand(packaged("full_100b", "slurm.nodelist=g[2001-2008]").plan)
        assert "--nodes=1 " in lines[0]
        assert "nodelist" not in lines[0]


class TestDirectives:
    @pytest.mark.parametrize("job", JOBS)
    def test_they_come_before_the_first_line_that_is_executed(self, job: str) -> None:
        """Slurm reads them no further (man sbatch)."""
        lines = _lines(packaged(job).plan)
        first_executed = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        assert all(i < first_executed for i, line in enumerate(lines) if line.startswith("#SBATCH"))
        assert len(_directives(packaged(job).plan)) >= 12

    @pytest.mark.parametrize(("request_", "text"), [("gres", "gres=gpu:2"), ("gpus-per-node", "gpus-per-node=2")])
    def test_gpus_are_asked_for_in_the_one_way_that_the_cluster_file_names(
        self, request_: str, text: str, tmp_path: Path
    ) -> None:
        site = SITE.replace("gpu_request: gpus-per-node", f"gpu_request: {request_}")
        plan = written(tmp_path, MINIMAL, site=site).plan
        for argv in (_directives(plan), _srun(plan), by_hand(plan)[0].split()):
            assert [word for word in argv if "gpu" in word] == [f"--{text}"]

    @pytest.mark.parametrize("job", JOBS)
    def test_nothing_that_breaks_environments_leaks_secrets_or_hides_peers(self, job: str) -> None:
        script = batch_script(packaged(job).plan)
        assert "--export" not in script  # commas truncate values (man srun)
        assert not re.search(r"set -\w*x", script)
        assert "--gpus-per-task" not in script  # binds one GPU to a task: no peer access (nccl#1066)
        assert "--ntasks-per-node=1" in _srun(packaged(job).plan)

    def test_a_job_on_all_gpus_of_its_nodes_has_the_nodes_for_itself(self) -> None:
        directives = _directives(packaged("full_100b").plan)
        assert "--exclusive" in directives
        assert "--mem=0" in directives

    def test_two_of_eight_gpus_take_their_share_and_leave_the_rest(self) -> None:
        plan = packaged("lora_10b").plan
        directives = _directives(plan)
        assert "--gres=gpu:2" in directives
        assert "--cpus-per-task=16" in directives  # 64 × 2 / 8
        assert "--mem=131072M" in directives  # 128 GiB
        assert "--exclusive" not in directives
        assert not any("exclusive" in line for line in by_hand(plan))

    def test_memory_that_is_no_whole_mebibyte_is_rounded_up(self, tmp_path: Path) -> None:
        plan = written(tmp_path, MINIMAL, "resources.memory_per_node=1000000001B").plan
        assert "--mem=954M" in _directives(plan)

    def test_srun_is_told_again_what_it_inherits_only_in_some_versions(self) -> None:
        assert _srun(packaged("lora_100b").plan) == [
            "--nodes=1",
            "--ntasks-per-node=1",
            "--cpus-per-task=64",
            "--gres=gpu:8",
            "--mem=0",
            "--cpu-bind=none",
            "--kill-on-bad-exit=1",
            "--wait=600",
            "--unbuffered",
        ]

    def test_the_warning_is_usr2_as_long_before_the_limit_as_the_job_says(self) -> None:
        """USR1 is caught by NCCL's own code (submitit#1697); without B: it reaches the step, not the batch shell."""
        assert "--signal=USR2@600" in _directives(packaged("lora_100b").plan)
        assert "--signal=USR2@1800" in _directives(packaged("full_100b").plan)

    def test_a_node_that_has_finished_waits_as_long_for_the_one_that_saves(self) -> None:
        assert "--wait=1800" in _srun(packaged("full_100b").plan)

    def test_the_log_is_absolute_and_a_requeued_job_appends_to_it(self) -> None:
        directives = _directives(packaged("lora_100b").plan)
        assert f"--output={launch_jobs.RUN_DIR}/slurm-%j.log" in directives
        assert "--open-mode=append" in directives

    def test_limits_of_the_login_node_do_not_become_the_jobs(self) -> None:
        assert "--propagate=NONE" in _directives(packaged("lora_100b").plan)

    def test_further_options_follow_with_and_without_a_value(self, tmp_path: Path) -> None:
        job = MINIMAL + "slurm: {extra: {comment: a+b, spread-job: ''}}\n"
        assert _directives(written(tmp_path, job).plan)[-2:] == ["--comment=a+b", "--spread-job"]

    def test_a_site_that_requeues_is_asked_to(self) -> None:
        plan = packaged("lora_100b").plan
        assert "--requeue" in _directives(plan)

    def test_a_site_that_does_not_is_not(self, tmp_path: Path) -> None:
        assert "--no-requeue" in _directives(written(tmp_path, MINIMAL, site=SITE + "requeue: false\n").plan)

    def test_where_nobody_states_cpus_a_warning_says_what_slurm_does(self, tmp_path: Path) -> None:
        prepared = written(tmp_path, MINIMAL, site=SITE.replace("cpus_per_node: 128\n", ""))
        assert not any("cpus-per-task" in line for line in _directives(prepared.plan))
        assert [w for w in prepared.plan.warnings if "cpus_per_node" in w and "2 rank(s)" in w]
        assert not packaged("lora_100b").plan.warnings


class TestSecrets:
    def test_their_values_are_nowhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_sesame")
        monkeypatch.setenv("HOME", str(tmp_path))
        store = tmp_path / ".config" / "cpm-cluster" / "secrets.env"
        store.parent.mkdir(parents=True)
        store.write_text("HF_TOKEN=hf_sesame\n")
        prepared = written(tmp_path, MINIMAL + "secrets: [HF_TOKEN]\n")
        assert prepared.plan.secrets == ("HF_TOKEN",)
        everything = [
            batch_script(prepared.plan),
            prepared.plan.to_json(),
            as_text(prepared),
            str(as_data(prepared)),
            *map(str, explanations(prepared.spec, prepared.fit, prepared.plan)),
        ]
        assert not any("hf_sesame" in text for text in everything)
        assert "HF_TOKEN" not in batch_script(prepared.plan)


class TestDryRun:
    @pytest.mark.parametrize("job", JOBS)
    def test_it_shows_the_very_script(self, job: str) -> None:
        prepared = packaged(job)
        assert batch_script(prepared.plan) in as_text(prepared)
        assert as_data(prepared)["script"] == batch_script(prepared.plan)

    def test_warnings_of_a_profile_come_first(self) -> None:
        lines = as_text(packaged("full_10b", "profile=minimal-train-10b")).splitlines()
        assert lines[2].startswith("warning: minimal-train-10b is a bare minimum")
