"""What a node runs: docker, rootless docker, podman, pyxis, conda, or the bare program."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from launch_jobs import MINIMAL, RUN_DIR, RUN_ID, SITE, node, node_argv, options_of, packaged, written

from cpm_cluster.launch.plan import LaunchPlan
from cpm_cluster.launch.program import program_argv, program_environment
from cpm_cluster.launch.runtimes import run_argv, run_options, shell_argv

NODE_DIR = f"{RUN_DIR}/attempt-2/node-0"
TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--nnodes=1",
    "--nproc_per_node=2",
    "--node_rank=0",
    "--master_addr=10.77.0.1",
    "--master_port=61175",
    "--max_restarts=0",
    "-m",
    "cpm_cluster.training.finetune",
    f"{RUN_DIR}/trainer.json",
]


def _plan(folder: Path, *overrides: str, job: str = MINIMAL, site: str = SITE) -> LaunchPlan:
    return written(folder, job, *overrides, site=site).plan


def _without_container(folder: Path, runtime: str) -> LaunchPlan:
    job = MINIMAL.replace("image: cpmlive-flash:0.0.4\n", "")
    return _plan(folder, f"runtime={runtime}", "engine=torch", job=job)


class TestDocker:
    def test_the_whole_command_line(self, tmp_path: Path) -> None:
        assert node_argv(_plan(tmp_path, "runtime=docker")) == [
            "docker",
            "run",
            "--init",
            f"--name={RUN_ID}-2-0",
            f"--cidfile={NODE_DIR}/container.id",
            f"--label=cpm.run={RUN_ID}",
            "--label=cpm.job=4711",
            "--label=cpm.attempt=2",
            "--label=cpm.node=g2001",
            "--stop-timeout=600",
            "--log-driver=local",
            "--network=host",
            "--shm-size=4294967296",
            "--ulimit=memlock=-1",
            "--ulimit=stack=67108864",
            "--ulimit=nofile=1048576",
            '--gpus="device=GPU-0000,GPU-0001"',
            "--device=/dev/infiniband",
            f"--env-file={NODE_DIR}/environment",
            "--user=1000:1001",
            f"--mount=type=bind,source={RUN_DIR},target={RUN_DIR}",
            "--mount=type=bind,source=/etc/nccl/topo.xml,target=/etc/nccl/topo.xml,readonly",
            "--mount=type=bind,source=/data,target=/data,readonly",
            f"--workdir={RUN_DIR}/code",
            "cpmlive-flash:0.0.4",
            "python3",
            *TORCHRUN,
        ]

    def test_docker_reads_the_list_of_gpus_as_one_field_of_csv(self, tmp_path: Path) -> None:
        """Without the inner quotes GPU-0001 would be an option of its own (docker/cli, opts/gpus.go)."""
        (value,) = options_of(_plan(tmp_path, "runtime=docker"), "gpus")
        assert value is not None
        assert next(csv.reader([value])) == ["device=GPU-0000,GPU-0001"]

    def test_values_of_variables_are_in_the_file_not_in_the_argv(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=docker", "env.GREETING=a,b c")
        assert not any("a,b c" in word for word in node_argv(plan))
        assert options_of(plan, "env") == []
        assert options_of(plan, "env-file") == [f"{NODE_DIR}/environment"]

    def test_no_gpus_no_option(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=docker", "engine=torch", "resources.gpus_per_node=0", "training.precision=fp32")
        assert options_of(plan, "gpus") == []

    def test_no_infiniband_no_device(self, tmp_path: Path) -> None:
        site = SITE.replace("infiniband: true", "infiniband: false")
        assert options_of(_plan(tmp_path, "runtime=docker", site=site), "device") == []

    def test_docker_waits_as_long_for_the_checkpoint_as_slurm(self, tmp_path: Path) -> None:
        assert options_of(_plan(tmp_path, "runtime=docker", "signal_lead=20m"), "stop-timeout") == ["1200"]

    def test_the_container_outlives_its_end_so_that_the_agent_can_ask_how_it_ended(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=docker")
        assert not {"rm", "detach", "tty", "interactive"} & {s.name for s in run_options(plan, node(plan))}

    def test_a_shell_by_hand_has_a_terminal_and_is_removed(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=docker", "env.A=x y")
        argv = shell_argv(plan, node(plan))
        assert argv[:6] == ["docker", "run", "--interactive", "--tty", "--rm", "--init"]
        assert "--env=A=x y" in argv
        assert not any("PYTHONPATH" in word or str(RUN_DIR) in word for word in argv)
        assert argv[-2:] == ["cpmlive-flash:0.0.4", "bash"]


class TestSharedMemory:
    def test_the_hosts_has_no_size(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=docker", "container.ipc=host")
        assert options_of(plan, "ipc") == ["host"]
        assert options_of(plan, "shm-size") == []

    def test_a_stated_size_is_the_jobs_to_answer_for(self, tmp_path: Path) -> None:
        job = MINIMAL.replace("memory_per_node: 64G", "memory_per_node: 64G, shm: 16G")
        plan = _plan(tmp_path, "runtime=docker", job=job)
        (size,) = [s for s in run_options(plan, node(plan)) if s.name == "shm-size"]
        assert size.value == str(16 << 30)
        assert size.set_by == f"job ({tmp_path}/job.yaml:4:58)"


class TestMounts:
    def test_the_jobs_mounts_keep_their_mode(self, tmp_path: Path) -> None:
        job = MINIMAL + "mounts: {/a: /inside, /b: /read:ro, /c: '/write:rw'}\n"
        mounts = options_of(_plan(tmp_path, "runtime=docker", job=job), "mount")
        assert mounts[1:4] == [
            "type=bind,source=/a,target=/inside",
            "type=bind,source=/b,target=/read,readonly",
            "type=bind,source=/c,target=/write",
        ]

    def test_folders_of_data_weights_and_vocabulary_are_seen_under_the_same_path(self, tmp_path: Path) -> None:
        job = MINIMAL.replace("/data/rows.jsonl", "[/corpus/a/1.jsonl, /corpus/a/2.jsonl], eval: /corpus/b/3.jsonl")
        job += "init_from: /weights/cpm.pt\ntokenizer: /corpus/a/vocab.txt\n"
        mounts = options_of(_plan(tmp_path, "runtime=docker", job=job), "mount")
        assert mounts[2:] == [
            f"type=bind,source={folder},target={folder},readonly" for folder in ("/corpus/a", "/corpus/b", "/weights")
        ]

    @pytest.mark.parametrize(
        ("adapter", "seen"),
        [
            ("/runs/tuned-0001", "/runs/tuned-0001"),
            ("/runs/tuned-0001/weights/delta.pt", "/runs/tuned-0001"),  # beside its trainer.json
            ("/adapters/peft", "/adapters/peft"),
            ("/adapters/peft/adapter_model.safetensors", "/adapters/peft"),
            ("/adapters/nine-g/cpm-delta.pt", "/adapters/nine-g"),
            ("/tmp/cpm-delta.pt", "/tmp/cpm-delta.pt"),
        ],
    )
    def test_an_adapter_is_seen_with_what_describes_it(self, adapter: str, seen: str, tmp_path: Path) -> None:
        job = MINIMAL.replace("/data/rows.jsonl", "builtin:python-reference")
        plan = _plan(tmp_path, "runtime=docker", job=job + f"method: {{lora: {{init_from: {adapter}}}}}\n")
        assert options_of(plan, "mount")[2:] == [f"type=bind,source={seen},target={seen},readonly"]
        assert plan.trainer is not None
        assert plan.trainer["adapter"] == adapter and "init_from" not in plan.trainer["method"]

    @pytest.mark.parametrize("pattern", ["*.jsonl", "*/rows.jsonl", "**/*.jsonl", "2023-[01]?/a/b.jsonl"])
    def test_a_pattern_is_seen_from_the_folder_before_its_first_wildcard_on(self, pattern: str, tmp_path: Path) -> None:
        job = MINIMAL.replace("/data/rows.jsonl", f"'/corpus/a/{pattern}'")
        mounts = options_of(_plan(tmp_path, "runtime=docker", job=job), "mount")
        assert mounts[2:] == ["type=bind,source=/corpus/a,target=/corpus/a,readonly"]

    def test_a_path_below_a_mount_is_one_inside_the_container(self) -> None:
        mounts = options_of(packaged("lora_100b").plan, "mount")
        assert mounts == [
            f"type=bind,source={RUN_DIR},target={RUN_DIR}",
            "type=bind,source=/data/public/CPM-9G,target=/CPM-9G,readonly",
        ]

    @pytest.mark.parametrize("path", ["/opt/rows.jsonl", "/rows.jsonl", "/tmp/rows.jsonl", "/dev/shm/rows.jsonl"])
    def test_a_file_where_the_container_has_a_folder_of_its_own_hides_nothing(self, path: str, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=docker", job=MINIMAL.replace("/data/rows.jsonl", path))
        assert options_of(plan, "mount")[2:] == [f"type=bind,source={path},target={path},readonly"]

    def test_data_that_the_package_brings_needs_no_mount(self, tmp_path: Path) -> None:
        job = MINIMAL.replace("/data/rows.jsonl", "builtin:python-reference")
        assert len(options_of(_plan(tmp_path, "runtime=docker", job=job), "mount")) == 2

    @pytest.mark.parametrize("folder", ["/data/a,b", '/data/the "good" one', "/data/数据 集"])
    def test_docker_reads_an_odd_folder_as_it_is(self, folder: str, tmp_path: Path) -> None:
        job = MINIMAL.replace("/data/rows.jsonl", f"'{folder}/rows.jsonl'")
        value = options_of(_plan(tmp_path, "runtime=docker", job=job), "mount")[-1]
        assert value is not None
        assert next(csv.reader([value])) == ["type=bind", f"source={folder}", f"target={folder}", "readonly"]

    def test_a_mount_that_begins_with_a_tilde_is_still_the_jobs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        plan = _plan(tmp_path, "runtime=docker", job=MINIMAL + "mounts: {~/corpus: /corpus}\n")
        assert plan.container
        assert plan.container.mounts[1].source == "/home/me/corpus"
        assert plan.container.mounts[1].set_by.startswith("job (")


class TestRootlessDocker:
    def test_container_root_is_the_user_on_disk(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=docker-rootless")
        assert node_argv(plan)[:2] == ["docker", "run"]
        assert options_of(plan, "user") == []

    def test_since_29_5_the_topology_in_sys_is_mounted(self, tmp_path: Path) -> None:
        assert "type=bind,source=/sys,target=/sys,readonly" in options_of(_plan(tmp_path), "mount")

    def test_before_it_docker_leaves_sys_in(self) -> None:
        plan = packaged("lora_100b").plan
        assert plan.runtime == "docker-rootless"
        assert not any("source=/sys" in (value or "") for value in options_of(plan, "mount"))

    def test_the_docker_of_root_keeps_it_too(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=docker")
        assert not any("source=/sys" in (value or "") for value in options_of(plan, "mount"))


class TestPodman:
    def test_it_has_its_own_words_for_gpus_logs_and_cgroups(self, tmp_path: Path) -> None:
        argv = node_argv(_plan(tmp_path, "runtime=podman"))
        assert argv[:3] == ["podman", "run", "--cgroups=no-conmon"]
        assert [word for word in argv if word.startswith("--device=nvidia")] == [
            "--device=nvidia.com/gpu=GPU-0000",
            "--device=nvidia.com/gpu=GPU-0001",
        ]
        assert "--log-driver=k8s-file" in argv
        assert not any(word.startswith(("--gpus", "--user")) for word in argv)

    def test_the_rest_is_dockers(self, tmp_path: Path) -> None:
        docker, podman = (node_argv(_plan(tmp_path, f"runtime={name}")) for name in ("docker", "podman"))
        own = ("--gpus", "--user", "--log-driver", "--device=nvidia", "--cgroups", "docker", "podman")
        assert [w for w in podman if not w.startswith(own)] == [w for w in docker if not w.startswith(own)]


class TestPyxis:
    def test_srun_makes_the_container_and_the_node_runs_the_bare_program(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=pyxis")
        step = {s.name: s.value for s in plan.step}
        assert step["container-image"] == "dockerd://cpmlive-flash:0.0.4"
        assert step["container-mounts"] == ",".join(
            [f"{RUN_DIR}:{RUN_DIR}", "/etc/nccl/topo.xml:/etc/nccl/topo.xml:ro", "/data:/data:ro"]
        )
        assert step["container-workdir"] == f"{RUN_DIR}/code"
        assert "no-container-mount-home" in step
        assert node_argv(plan) == ["python3", *TORCHRUN]

    def test_the_agent_runs_inside_with_the_python_of_the_image(self, tmp_path: Path) -> None:
        assert _plan(tmp_path, "runtime=pyxis").agent_python == "python3"
        assert _plan(tmp_path, "runtime=docker").agent_python == "/opt/cpm/bin/python3"

    def test_a_shell_by_hand_is_inside_too(self, tmp_path: Path) -> None:
        interactive = {s.name: s.value for s in _plan(tmp_path, "runtime=pyxis").interactive}
        assert interactive["container-image"] == "dockerd://cpmlive-flash:0.0.4"
        assert str(RUN_DIR) not in (interactive["container-mounts"] or "")

    @pytest.mark.parametrize("folder", ["/data/a,b", "/data/a:b"])
    def test_a_folder_that_it_cannot_mount_is_left_out_with_a_warning(self, folder: str, tmp_path: Path) -> None:
        job = MINIMAL.replace("/data/rows.jsonl", f"'{folder}/rows.jsonl'")
        plan = _plan(tmp_path, "runtime=pyxis", job=job)
        (mounts,) = [s.value for s in plan.step if s.name == "container-mounts"]
        assert folder not in (mounts or "")
        assert plan.warnings[-1].startswith(f"{folder}: pyxis cannot mount a path with a comma or a colon")


class TestWithoutContainer:
    def test_conda_takes_the_environment_that_the_cluster_file_names(self, tmp_path: Path) -> None:
        argv = node_argv(_without_container(tmp_path, "conda"))
        assert argv == ["conda", "run", "--name", "cpm-9g", "--no-capture-output", "python3", *TORCHRUN]

    def test_or_its_path(self, tmp_path: Path) -> None:
        site = SITE.replace("environment: cpm-9g", "environment: /envs/cpm")
        job = MINIMAL.replace("image: cpmlive-flash:0.0.4\n", "")
        plan = _plan(tmp_path, "runtime=conda", "engine=torch", job=job, site=site)
        assert node_argv(plan)[:4] == ["conda", "run", "--prefix", "/envs/cpm"]

    def test_bare_takes_the_python_that_the_cluster_file_names(self, tmp_path: Path) -> None:
        assert node_argv(_without_container(tmp_path, "bare")) == ["/opt/torch/bin/python", *TORCHRUN]

    def test_or_that_of_the_submitter(self, tmp_path: Path) -> None:
        site = SITE.replace("bare: {python: /opt/torch/bin/python}", "bare: {}")
        job = MINIMAL.replace("image: cpmlive-flash:0.0.4\n", "")
        plan = _plan(tmp_path, "runtime=bare", "engine=torch", job=job, site=site)
        assert node_argv(plan)[0] == "/opt/cpm/bin/python3"


class TestRanks:
    def test_each_node_has_its_rank_and_the_same_master(self) -> None:
        """Underscores, because torch 1.13 knows no other option names; static rendezvous obeys --node_rank."""
        plan = packaged("full_100b").plan
        for index in range(8):
            argv = program_argv(plan, node(plan, index))
            assert argv[3:8] == [
                "--nnodes=8",
                "--nproc_per_node=8",
                f"--node_rank={index}",
                "--master_addr=10.77.0.1",
                "--master_port=61175",
            ]

    def test_the_trainer_gets_its_ranks_from_torchrun_alone(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path)
        variables = program_environment(plan, node(plan), NODE_DIR)
        assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "PET_NNODES"} & set(variables)
        assert variables["CPM_RUN_ID"] == RUN_ID
        assert variables["CPM_LOG_DIR"] == NODE_DIR
        assert variables["CPM_ATTEMPT"] == "2"
        assert variables["PYTHONPATH"] == f"{RUN_DIR}/package"

    def test_a_command_runs_once_a_node_as_it_was_written(self) -> None:
        plan = packaged("sft_cpm9g_command").plan
        argv = run_argv(plan, node(plan))
        image = argv.index("cpmlive-flash:0.0.4")
        assert argv[image + 1 : image + 4] == ["torchrun", "apps/cpm9g/sft_cpm9g.py", "--model-config"]
        assert tuple(argv[image + 1 :]) == plan.program.arguments

    def test_it_finds_the_master_in_the_environment(self) -> None:
        plan = packaged("sft_cpm9g_command").plan
        variables = program_environment(plan, node(plan), NODE_DIR)
        expected = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "61175", "NODE_RANK": "0"}
        assert expected.items() <= variables.items()

    def test_a_bare_torchrun_in_it_reads_the_same_as_our_own_command_line(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """PET_*: torchrun looks there for each option (torch/distributed/argparse_util.py)."""
        torchrun = pytest.importorskip("torch.distributed.run")
        plan = packaged("full_100b", "engine=command", "command=[torchrun, x.py]").plan
        for name, value in program_environment(plan, node(plan, 3), NODE_DIR).items():
            monkeypatch.setenv(name, value)
        by_variables = torchrun.parse_args(["x.py"])
        ours = packaged("full_100b").plan
        by_options = torchrun.parse_args(program_argv(ours, node(ours, 3))[3:])
        for option in ("nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port", "max_restarts"):
            assert getattr(by_variables, option) == getattr(by_options, option), option
        assert (by_options.node_rank, by_options.master_addr, by_options.master_port) == (3, "10.77.0.1", 61175)

    def test_the_image_stated_by_the_job_is_what_runs(self, tmp_path: Path) -> None:
        job = MINIMAL.replace("image: cpmlive-flash:0.0.4", "image: {base: cpmlive-flash:0.0.4, tag: mine/cpm:1}")
        assert "mine/cpm:1" in node_argv(_plan(tmp_path, "runtime=docker", job=job))

    def test_a_stated_working_directory_replaces_the_snapshot(self, tmp_path: Path) -> None:
        plan = _plan(tmp_path, "runtime=docker", "container.workdir=/work")
        (workdir,) = [s for s in run_options(plan, node(plan)) if s.name == "workdir"]
        assert (workdir.value, workdir.set_by) == ("/work", "--set")
