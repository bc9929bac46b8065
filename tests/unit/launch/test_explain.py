"""`--explain`: for every value who set it, where, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch_jobs import JOBS, MINIMAL, packaged, written

from cpm_cluster.cli.main import submit_main
from cpm_cluster.launch.explain import CORRECTIONS, Explanation, explanations, matching
from cpm_cluster.launch.plan import Setting
from cpm_cluster.launch.prepare import Prepared
from cpm_cluster.launch.runtimes import SYMBOLIC_NODE, run_options

TALKATIVE = """\
name: tune
model: {base: cpm-9g-8b, layers: 2}
cluster: ./site.yaml
profile: lora-10b-2x80g
image: cpmlive-flash:0.0.4
runtime: docker
engine: bmtrain
training: {precision: fp16, steps: 10}
data: {train: /data/rows.jsonl}
env: {GREETING: hello}
mounts: {/a: /inside}
resources: {cpus_per_node: 12, shm: 8G}
slurm: {nodelist: g1, extra: {comment: x}}
time_limit: 3h
signal_lead: 5m
container: {workdir: /work}
method: {lora: {rank: 4}}
"""


def _all(prepared: Prepared) -> list[Explanation]:
    return list(explanations(prepared.spec, prepared.fit, prepared.plan))


def _one(prepared: Prepared, key: str) -> Explanation:
    (found,) = matching(_all(prepared), key)
    return found


class TestEverySetting:
    @pytest.mark.parametrize("job", sorted(path.stem for path in JOBS.glob("*.yaml")))
    def test_of_the_plan_is_explained_by_its_key(self, job: str) -> None:
        prepared = packaged(job)
        plan, found = prepared.plan, _all(prepared)
        groups: dict[str, tuple[Setting, ...]] = {
            "sbatch": plan.batch,
            "srun": plan.step,
            "interactive": plan.interactive,
            "env": plan.environment,
            plan.runtime.removesuffix("-rootless"): run_options(plan, SYMBOLIC_NODE),
        }
        for group, settings in groups.items():
            for setting in settings:
                told = [e for e in matching(found, f"{group}.{setting.name}") if e.value == (setting.value or "(set)")]
                assert len(told) == 1
                assert told[0].set_by == setting.set_by

    @pytest.mark.parametrize("runtime", ["docker-rootless", "docker", "podman", "pyxis"])
    def test_that_is_computed_says_why(self, runtime: str, tmp_path: Path) -> None:
        silent = {"docker.mount", "podman.mount"}  # their text says what they are
        computed = [e for e in _all(written(tmp_path, MINIMAL, f"runtime={runtime}")) if e.set_by == "computed"]
        assert len(computed) > 20
        assert [e.key for e in computed if not e.why and e.key not in silent] == []

    def test_the_modules_the_runtime_and_the_fit_are_explained_too(self) -> None:
        found = _all(packaged("lora_100b"))
        assert {"modules", "runtime", "fit.GPU_memory", "fit./dev/shm", "fit.disk"} <= {e.key for e in found}

    def test_no_value_is_told_twice(self, tmp_path: Path) -> None:
        found = _all(written(tmp_path, MINIMAL + "env: {A: x}\nruntime: docker\n"))
        assert len(set(found)) == len(found)
        assert len([e for e in found if e.key == "env.A"]) == 1
        assert len([e for e in found if e.key == "runtime"]) == 1


class TestWhere:
    """The file, line and column, so that one goes there and changes it."""

    @pytest.mark.parametrize(
        ("key", "line"),
        [
            ("sbatch.job-name", "name: tune"),
            ("training.steps", "training: {precision: fp16, steps: 10}"),
            ("env.GREETING", "env: {GREETING: hello}"),
            ("docker.mount", "mounts: {/a: /inside}"),
            ("srun.cpus-per-task", "resources: {cpus_per_node: 12, shm: 8G}"),
            ("docker.shm-size", "resources: {cpus_per_node: 12, shm: 8G}"),
            ("sbatch.nodelist", "slurm: {nodelist: g1, extra: {comment: x}}"),
            ("sbatch.comment", "slurm: {nodelist: g1, extra: {comment: x}}"),
            ("sbatch.time", "time_limit: 3h"),
            ("sbatch.signal", "signal_lead: 5m"),
            ("docker.workdir", "container: {workdir: /work}"),
            ("method.lora.rank", "method: {lora: {rank: 4}}"),
        ],
    )
    def test_what_the_job_says(self, key: str, line: str, tmp_path: Path) -> None:
        number = TALKATIVE.splitlines().index(line) + 1
        told = [e.set_by for e in matching(_all(written(tmp_path, TALKATIVE)), key)]
        assert [said for said in told if said.startswith(f"job ({tmp_path}/job.yaml:{number}:")], told

    @pytest.mark.parametrize(
        ("key", "where"),
        [
            ("sbatch.partition", "configs/clusters/nine-g.yaml:13:20"),
            ("modules", "configs/clusters/nine-g.yaml:17:30"),
            ("cluster.memory_per_node", "configs/clusters/nine-g.yaml:11:18"),
            ("cluster.driver", "configs/clusters/nine-g.yaml:21:9"),
        ],
    )
    def test_what_the_cluster_file_says(self, key: str, where: str) -> None:
        assert _one(packaged("lora_100b"), key).set_by == f"cluster ({where})"

    def test_a_default_of_the_cluster_is_one(self) -> None:
        prepared = packaged("lora_100b")
        assert _one(prepared, "sbatch.requeue").set_by == "default"
        assert _one(prepared, "cluster.requeue").value == "true"

    def test_what_the_profile_says(self) -> None:
        assert _one(packaged("lora_100b"), "sbatch.nodes").set_by == (
            "profile (configs/profiles/lora-100b-8x80g.yaml:3:20)"
        )

    def test_what_the_command_line_says(self) -> None:
        prepared = packaged("lora_100b", "slurm.nodelist=g2003", "training.lr=2e-4", "env.A=b")
        for key, value in {"sbatch.nodelist": "g2003", "training.lr": "2e-4", "env.A": "b"}.items():
            assert (_one(prepared, key).value, _one(prepared, key).set_by) == (value, "--set")

    def test_what_nobody_says(self) -> None:
        told = _one(packaged("lora_100b"), "training.clip_grad_norm")
        assert (told.value, told.set_by) == ("1.0", "default")
        assert told.why.startswith("clip the global gradient norm")
        assert _one(packaged("lora_100b"), "deterministic").value == "false"  # as one writes it


class TestKeys:
    def test_the_end_of_a_key_finds_it(self) -> None:
        assert _one(packaged("lora_100b"), "shm-size").key == "docker.shm-size"

    def test_a_section_finds_all_below_it(self) -> None:
        prepared = packaged("lora_100b")
        assert {e.key for e in matching(_all(prepared), "manual")} == set(CORRECTIONS)
        assert len(matching(_all(prepared), "docker.label")) == 4
        assert len(matching(_all(prepared), "training")) > 15

    def test_half_a_name_finds_nothing(self) -> None:
        assert matching(_all(packaged("lora_100b")), "shm") == []


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))

    def _run(self, *arguments: str) -> int:
        with pytest.raises(SystemExit) as ended:
            submit_main(arguments)
        assert isinstance(ended.value.code, int)
        return ended.value.code

    def test_it_prints_value_place_and_reason(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self._run("lora_100b", "--explain", "shm-size") == 0
        value, who, why = capsys.readouterr().out.splitlines()
        assert value == "docker.shm-size = 4294967296"
        assert who == "  set by computed"
        assert "9,637,888 B" in why

    def test_or_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self._run("lora_100b", "--explain", "srun.mem", "--json") == 0
        (told,) = json.loads(capsys.readouterr().out)
        assert told["key"] == "srun.mem"
        assert told["value"] == "0"

    @pytest.mark.parametrize(
        ("key", "meant"),
        [("docker.shm_size", "docker.shm-size"), ("sbatch.partitoin", "sbatch.partition"), ("env.OMP", "env.OMP")],
    )
    def test_an_unknown_key_is_answered_with_the_nearest(
        self, key: str, meant: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self._run("lora_100b", "--explain", key) == 2
        errors = capsys.readouterr().err
        assert f"{key} is no value of this job (did you mean {meant}" in errors

    def test_one_like_no_other_with_how_to_list_them_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self._run("lora_100b", "--explain", "zzz") == 2
        assert "--explain all lists every key" in capsys.readouterr().err
