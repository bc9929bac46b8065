"""Users' own CPM-9G scripts, started as upstream starts them; cpm9g_stand_in.py takes the place of their Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from local_runs import PATIENCE_S

from cpm_cluster.agent.surroundings import free_port
from cpm_cluster.launch.plan import NodeFacts
from cpm_cluster.launch.program import program_argv, program_environment
from cpm_cluster.launch.resolve import Submitter, resolve
from cpm_cluster.specs.catalogue import default_catalogue, packaged_jobs
from cpm_cluster.specs.compose import load_job

STAND_IN = Path(__file__).with_name("cpm9g_stand_in.py")
LOSS = re.compile(r"\| Iter: +(\d+)(?:/\d+)? \| loss: ([0-9.]+) \|")
RANKS = re.compile(r"stand-in (\w+)\.py: rank (\d+) of (\d+), vocab (\S+)")
# As upstream's shell scripts are made: options gathered line by line, then one torchrun line.
TRAIN_SH = """\
#! /bin/bash
GPUS_PER_NODE=2
OPTS=""
OPTS+=" --model-config /CPM-9G/models/config.json"
OPTS+=" --vocab /CPM-9G/models/vocab.txt"
OPTS+=" --train-iters 3000"
OPTS+=" --epoch 1"
OPTS+=" --lr 1.5e-5"
OPTS+=" --loss-scale 1048576"
OPTS+=" --offload"
OPTS+=" $@"
CMD="torchrun --nnodes=1 --nproc_per_node=${GPUS_PER_NODE} --rdzv_id=1 --rdzv_backend=c10d \
--rdzv_endpoint=$MASTER_ADDR:$MASTER_PORT apps/cpm9g/sft_cpm9g.py ${OPTS}"
echo ${CMD}
$CMD
"""


def install(folder: Path) -> Path:
    """A checkout of upstream's code, as far as it is needed."""
    (folder / "apps/cpm9g").mkdir(parents=True)
    for script in ("pretrain_cpm9g", "sft_cpm9g", "sft_cpm9g_delta"):
        shutil.copy(STAND_IN, folder / f"apps/cpm9g/{script}.py")
    (folder / "train.sh").write_text(TRAIN_SH)
    return folder


def packaged_command(job: str) -> list[str]:
    """The command of a job file that ships with cpm-cluster."""
    return [str(word) for word in yaml.safe_load((packaged_jobs() / f"{job}.yaml").read_text())["command"]]


def check(log: str, script: str, world_size: int) -> None:
    """Every rank was there, once, with the same world; rank 0 printed upstream's lines."""
    found = RANKS.findall(log)
    expected = [(script, str(rank), str(world_size), "/CPM-9G/models/vocab.txt") for rank in range(world_size)]
    assert sorted(found) == expected, log
    assert LOSS.findall(log) == [("1", "10.0000"), ("2", "5.0000"), ("3", "3.3333")], log


@pytest.mark.parametrize(
    "command, script",
    [
        (["bash", "train.sh", "--flash", "cuda"], "sft_cpm9g"),
        (packaged_command("lora_cpm9g_command"), "sft_cpm9g_delta"),
    ],
    ids=["a shell file with upstream's line", "the packaged LoRA"],
)
def test_two_ranks_of_one_node(runs, command, script):
    install(runs.jobs / "9G-Train")

    done = runs.submit(runs.command(*command, code="9G-Train"))

    assert done.returncode == 0, done.stdout + done.stderr
    check(runs.newest().text("attempt-1/node-0/node.log"), script, world_size=2)


@pytest.mark.parametrize("way", ["line", "list"])
def test_two_nodes_meet_without_being_told_a_host_name(tmp_path, way):
    """Two launchers beside each other, each with what the agent of its node would give it."""
    code = install(tmp_path / "9G-Train")
    overrides = ["resources.gpus_per_node=1"]
    job = packaged_jobs() / "pretrain_cpm9g_command.yaml"
    if way == "line":
        text = job.read_text()
        assert "--rdzv_endpoint=$MASTER_ADDR:$MASTER_PORT" in text and "--nproc_per_node=8" in text
        job = tmp_path / "job.yaml"
        job.write_text(text.replace("--nproc_per_node=8", "--nproc_per_node=1"))
    else:
        argv = ["torchrun", "apps/cpm9g/pretrain_cpm9g.py", "--vocab=/CPM-9G/models/vocab.txt", "--lr=1e-5"]
        overrides.append(f"command=[{', '.join(argv)}]")
    spec = load_job(job, overrides, default_catalogue(tmp_path, tmp_path), "slurm")
    plan = resolve(spec, "run", str(tmp_path), Submitter(sys.executable, "0:0"))
    port = str(free_port())
    launchers = []
    for index in range(plan.nodes):
        node = NodeFacts(f"node-{index}", index, "1", 1, "127.0.0.1", port, (), "", "")
        surroundings = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GLOO_SOCKET_IFNAME": "lo"}
        launchers.append(
            subprocess.Popen(
                program_argv(plan, node),
                cwd=code,
                env={**program_environment(plan, node, str(tmp_path)), **surroundings},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        logs = [launcher.communicate(timeout=PATIENCE_S)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()

    assert [launcher.returncode for launcher in launchers] == [0, 0], logs
    check("".join(logs), "pretrain_cpm9g", world_size=2)
