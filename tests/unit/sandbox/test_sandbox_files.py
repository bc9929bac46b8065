"""The sandbox's files: what Slurm is told agrees with itself, with the cluster file, and stays in one folder."""

from __future__ import annotations

import os
import pwd
import re
import socket
import subprocess
import sys
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from cpm_cluster.sandbox import gpus
from cpm_cluster.sandbox.cgroups import Confinement, confinement
from cpm_cluster.sandbox.daemons import CONTROLLER_PORT, DATABASE_PORT, NODE_PORT, all_daemons
from cpm_cluster.sandbox.slurm_conf import Rendered, render, write
from cpm_cluster.sandbox.state import Sandbox
from cpm_cluster.specs.catalogue import packaged_configs
from cpm_cluster.specs.nodes import read_yaml

STATE = Sandbox(root=Path("/opt/box"))
CGROUPS = Confinement("proctrack/cgroup", "task/cgroup", memory=True)


def texts(state: Sandbox = STATE, confined: Confinement = CGROUPS) -> dict[str, str]:
    return {file.path.name: file.text for file in render(state, confined)}


def settings(text: str) -> dict[str, str]:
    """Lines `Key=value` of a configuration file; of lines with several keys, the first."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))


def records(text: str, kind: str) -> list[dict[str, str]]:
    """Lines such as `NodeName=g2001 CPUs=64`, as mappings."""
    lines = [line for line in text.splitlines() if line.startswith(f"{kind}=")]
    return [dict(word.split("=", 1) for word in line.split()) for line in lines]


def test_every_node_has_an_address_of_its_own_in_the_subnet() -> None:
    nodes = records(texts()["slurm.conf"], "NodeName")
    assert [node["NodeName"] for node in nodes] == [f"g{number}" for number in range(2001, 2009)]
    assert [node["NodeAddr"] for node in nodes] == [f"10.77.0.{number}" for number in range(1, 9)]
    addresses = {STATE.login_address, *(host.address for host in STATE.hosts)}
    assert len(addresses) == 10
    assert all(address in STATE.subnet and address != STATE.subnet.broadcast_address for address in addresses)


def test_each_pretend_gpu_has_a_device_and_a_uuid_of_its_own() -> None:
    rows = records(texts()["gres.conf"], "NodeName")
    assert len(rows) == 64
    assert len({row["File"] for row in rows}) == 64
    table = [line.split() for line in texts()["gpus.txt"].splitlines()]
    assert [(host, device) for host, _, _, device in table] == [(row["NodeName"], row["File"]) for row in rows]
    uuids = {uuid for _, _, uuid, _ in table}
    assert len(uuids) == 64
    assert all(re.fullmatch(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", uuid) for uuid in uuids)
    assert gpus.table(Sandbox(root=Path("/elsewhere"))).split()[2] == table[0][2], "the same one each time"


def test_the_cluster_file_describes_what_slurm_is_told() -> None:
    node = records(texts()["slurm.conf"], "NodeName")[0]
    partitions = records(texts()["slurm.conf"], "PartitionName")
    cluster = read_yaml(packaged_configs() / "clusters" / "sandbox.yaml", "cluster", problems := [])
    assert cluster is not None and not problems
    facts = {name: getattr(value, "text", None) for name, value in cluster.entries.items()}
    assert facts["node_names"] == "g[2001-2008]"
    assert int(facts["cpus_per_node"] or 0) == int(node["CPUs"])
    assert facts["gpus_per_node"] == node["Gres"].removeprefix("gpu:")
    assert facts["memory_per_node"] == f"{int(node['RealMemory']) // 1024}G"
    assert set(cluster.entries["partitions"].entries) == {partition["PartitionName"] for partition in partitions}
    assert [p["PartitionName"] for p in partitions if p.get("Default") == "YES"] == [facts["default_partition"]]


def test_a_job_of_all_cpus_has_all_memory() -> None:
    conf = texts()["slurm.conf"]
    node = records(conf, "NodeName")[0]
    assert int(settings(conf)["DefMemPerCPU"]) * int(node["CPUs"]) == int(node["RealMemory"])


def test_only_the_other_partition_is_preempted() -> None:
    modes = {p["PartitionName"]: p["PreemptMode"] for p in records(texts()["slurm.conf"], "PartitionName")}
    tiers = {p["PartitionName"]: int(p["PriorityTier"]) for p in records(texts()["slurm.conf"], "PartitionName")}
    assert modes == {"gpu1": "OFF", "preempt": "REQUEUE"}
    assert tiers["preempt"] < tiers["gpu1"]


def test_daemons_meet_at_the_ports_and_sockets_that_they_are_told() -> None:
    slurm, slurmdbd, mariadb = (settings(texts()[name]) for name in ("slurm.conf", "slurmdbd.conf", "mariadb.cnf"))
    assert (slurm["SlurmctldPort"], slurm["SlurmdPort"]) == (str(CONTROLLER_PORT), str(NODE_PORT))
    assert slurm["AccountingStoragePort"] == slurmdbd["DbdPort"] == str(DATABASE_PORT)
    assert slurm["AccountingStorageHost"] == slurmdbd["DbdAddr"] == str(STATE.head.address)
    assert slurm["SlurmctldHost"] == f"{STATE.head.name}({STATE.head.address})"
    # Slurm's programs authenticate to slurmctld by the one key, and to slurmdbd by the other
    assert slurm["AuthInfo"].startswith(f"socket={STATE.munge_socket},")
    assert slurm["AccountingStoragePass"] == slurmdbd["AuthInfo"] == str(STATE.munge_socket)
    daemons = {daemon.name: daemon for daemon in all_daemons(STATE)}
    assert daemons["slurmdbd"].environment["MYSQL_UNIX_PORT"] == mariadb["socket"]
    assert f"--socket={STATE.munge_socket}" in daemons["munged"].argv


def test_every_daemon_runs_in_namespaces_of_the_sandbox_where_down_finds_it() -> None:
    namespaces = [word for daemon in all_daemons(STATE) for word in daemon.argv if word.startswith("--net=")]
    assert namespaces == ["--net=/opt/box/head/net"] * 4 + [f"--net=/opt/box/nodes/g{n}/net" for n in range(2001, 2009)]


def test_nothing_lies_outside_the_folder() -> None:
    known = {"/sys/fs/cgroup", "/bin/true", "/bin/sh", "/usr/bin/env"}
    for name, text in texts().items():
        code = "\n".join(line for line in text.splitlines() if not line.startswith("#") or line.startswith("#!"))
        paths = set(re.findall(r"(?<![\w.:)/}])/[a-z][\w./%-]+", code))
        assert {path for path in paths if not path.startswith("/opt/box/")} <= known, name


def test_every_placeholder_is_filled_in() -> None:
    assert [name for name, text in texts().items() if re.search(r"\$\{", text)] == []


def test_another_subnet_and_other_nodes_are_rendered_throughout() -> None:
    state = Sandbox(root=Path("/opt/box"), subnet=IPv4Network("192.168.9.0/24"), node_names=("n1", "n2"))
    conf = texts(state)["slurm.conf"]
    assert [node["NodeAddr"] for node in records(conf, "NodeName")] == ["192.168.9.1", "192.168.9.2"]
    assert {partition["Nodes"] for partition in records(conf, "PartitionName")} == {"n1,n2"}
    assert "10.77" not in conf


@pytest.mark.parametrize("controllers", [("freezer", "devices"), ("freezer", "devices", "memory")])
def test_control_groups_of_version_1_confine_jobs(tmp_path: Path, controllers: tuple[str, ...]) -> None:
    for name in controllers:
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").touch()
    found = confinement(tmp_path)
    assert (found.proctrack, found.caveat) == ("proctrack/cgroup", "")
    conf = settings(texts(confined=found)["cgroup.conf"])
    assert conf["ConstrainDevices"] == "yes"
    assert conf["ConstrainRAMSpace"] == ("yes" if "memory" in controllers else "no")


def test_without_them_slurm_goes_by_parents_and_says_what_that_costs(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").touch()  # version 2
    found = confinement(tmp_path)
    conf = settings(texts(confined=found)["slurm.conf"])
    assert (conf["ProctrackType"], conf["TaskPlugin"]) == ("proctrack/linuxproc", "task/none")
    assert "not kept from other GPUs" in found.caveat
    assert "cgroup.conf" not in texts(confined=found)


def test_files_are_written_once_with_the_mode_that_their_readers_insist_on(tmp_path: Path) -> None:
    me = pwd.getpwuid(os.getuid()).pw_name
    secret = Rendered(tmp_path / "slurmdbd.conf", "Key=1\n", 0o600, me)
    assert write([secret]) is True
    assert (secret.path.read_text(), secret.path.stat().st_mode & 0o777) == ("Key=1\n", 0o600)
    assert write([secret]) is False
    assert [path.name for path in tmp_path.iterdir()] == ["slurmdbd.conf"]


def test_a_task_finds_the_stand_in_before_the_real_one(tmp_path: Path) -> None:
    prolog = tmp_path / "task-prolog"
    prolog.write_text(texts()["task-prolog"])
    done = subprocess.run(["sh", prolog], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout == "export PATH=/opt/box/bin:/usr/bin:/bin\n"


class NvidiaSmi:
    """The stand-in as rendered, on a node that is this machine; GPU 5's device cannot be opened."""

    def __init__(self, folder: Path, host: str) -> None:
        self.program = folder / "nvidia-smi"
        self.uuids = [f"GPU-{index}" for index in range(8)]
        for index in range(8):
            if index != 5:
                (folder / f"nvidia{index}").touch()
        rows = [f"{host} {i} {uuid} {folder}/nvidia{i}\n" for i, uuid in enumerate(self.uuids)]
        (folder / "gpus.txt").write_text("".join(rows))
        self.program.write_text(texts()["nvidia-smi"].replace("/opt/box/etc/gpus.txt", f"{folder}/gpus.txt"))

    def __call__(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(self.program), *words]
        return subprocess.run(argv, env=environment, capture_output=True, text=True)


@pytest.fixture
def nvidia_smi(tmp_path: Path) -> NvidiaSmi:
    return NvidiaSmi(tmp_path, socket.gethostname())


def test_it_lists_the_gpus_that_the_caller_may_open(nvidia_smi: NvidiaSmi) -> None:
    lines = nvidia_smi("-L").stdout.splitlines()
    assert lines[0] == "GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0)"
    assert [line.split("UUID: ")[1] for line in lines] == [f"{uuid})" for uuid in nvidia_smi.uuids if uuid != "GPU-5"]
    assert [line.split(":")[0] for line in lines] == [f"GPU {index}" for index in range(7)], "numbered without gaps"


@pytest.mark.parametrize(
    ("variable", "value", "seen"),
    [
        ("SLURM_STEP_GPUS", "2,3", ["GPU-2", "GPU-3"]),
        ("SLURM_JOB_GPUS", "4,5,6", ["GPU-4", "GPU-6"]),
        ("CUDA_VISIBLE_DEVICES", "0", [f"GPU-{index}" for index in range(8) if index != 5]),  # nor does the real one
    ],
)
def test_it_goes_by_the_allocation(nvidia_smi: NvidiaSmi, variable: str, value: str, seen: list[str]) -> None:
    done = nvidia_smi("--query-gpu=uuid", "--format=csv,noheader", **{variable: value})
    assert done.stdout.split() == seen


def test_the_step_has_the_last_word_on_the_job(nvidia_smi: NvidiaSmi) -> None:
    done = nvidia_smi("-L", SLURM_JOB_GPUS="0,1,2,3", SLURM_STEP_GPUS="3")
    assert done.stdout.count("UUID") == 1
    assert "GPU-3" in done.stdout


def test_it_answers_queries_as_nvidia_smi_formats_them(nvidia_smi: NvidiaSmi) -> None:
    query = "--query-gpu=index,name,memory.total"
    assert nvidia_smi(query, "--format=csv", "-i", "1").stdout.splitlines() == [
        "index, name, memory.total [MiB]",
        "1, NVIDIA A100-SXM4-80GB, 81920 MiB",
    ]
    bare = nvidia_smi(query, "--format=csv,noheader,nounits", "--id=GPU-0")
    assert bare.stdout == "0, NVIDIA A100-SXM4-80GB, 81920\n"
    assert nvidia_smi("--query-compute-apps=pid", "--format=csv,noheader").stdout == ""


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--query-gpu=colour"], 2, 'Field "colour" is not a valid field to query.'),
        (["topo", "-m"], 2, "the stand-in of the sandbox does not know -m topo"),
        (["-L", "-i", "99"], 6, "No devices were found"),
    ],
)
def test_it_refuses_what_it_cannot_answer(nvidia_smi: NvidiaSmi, words: list[str], code: int, message: str) -> None:
    done = nvidia_smi(*words)
    assert (done.returncode, message in done.stdout) == (code, True)


def test_it_finds_no_driver_on_other_hosts(tmp_path: Path) -> None:
    assert NvidiaSmi(tmp_path, "another-host")("-L").returncode == 9
