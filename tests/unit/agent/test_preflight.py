"""Whether a node is fit for a job: one class a check, against this very machine where that is possible."""

from __future__ import annotations

import json
import os
import resource
import time

import pytest
from made_runs import container

from cpm_cluster.agent import preflight
from cpm_cluster.agent.preflight import Finding, clock, refuse
from cpm_cluster.agent.surroundings import NodeError
from cpm_cluster.launch.plan import Archive, NodeFacts

NODE = NodeFacts("g2003", 0, "7", 1, "127.0.0.1", "61000", ("GPU-a", "GPU-b"), "", "")
MORE_THAN_THERE_IS = 1 << 60


@pytest.fixture
def plan(made_run):
    """A plan of two GPUs, in a run directory that is there."""

    def make(**settings):
        return made_run(**{"gpus_per_node": 2, "signal_lead_s": 600, **settings}).run.plan

    return make


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in on PATH that runs a shell script; without it there is none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def install(script):
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n", "utf-8")
        program.chmod(0o755)

    return install


def found(check, plan, node=NODE, environment=None):
    """What one check finds."""
    return [finding for finding in preflight.preflight(plan, node, environment or {}) if finding.check == check]


class TestGpus:
    def test_a_process_on_a_gpu_of_this_step_is_named(self, plan, nvidia_smi):
        nvidia_smi("printf 'GPU-z, 1, python\\nGPU-b, 4321, /usr/bin/python3, odd\\n'")
        (finding,) = found("gpus", plan())
        assert finding.fatal
        assert finding.text == "process 4321 (/usr/bin/python3, odd) is on GPU GPU-b already; tell the admin"

    @pytest.mark.parametrize("said", ["", "GPU-z, 1, python\n", "No running processes found\n"])
    def test_processes_elsewhere_do_not_matter(self, plan, nvidia_smi, said):
        nvidia_smi(f"printf '{said}'")
        assert found("gpus", plan()) == []

    def test_nvidia_smi_that_fails_is_told_but_ends_nothing(self, plan, nvidia_smi):
        nvidia_smi("echo 'GPU-a, 1, x'; exit 15")
        (finding,) = found("gpus", plan())
        assert not finding.fatal and "nvidia-smi fails or does not answer" in finding.text

    def test_as_is_one_that_is_not_there(self, plan, nvidia_smi):
        (finding,) = found("gpus", plan())
        assert not finding.fatal

    def test_nobody_waits_for_one_that_hangs(self, plan, nvidia_smi, monkeypatch):
        monkeypatch.setattr(preflight, "NVIDIA_SMI_PATIENCE_S", 0.2)
        nvidia_smi("exec /bin/sleep 30")
        began = time.monotonic()
        assert len(found("gpus", plan())) == 1
        assert time.monotonic() - began < 10

    def test_a_job_without_gpus_asks_nobody(self, plan, nvidia_smi, tmp_path):
        nvidia_smi(f": > {tmp_path}/asked")
        preflight.preflight(plan(gpus_per_node=0), NodeFacts("n", 0, "7", 1, "", "", (), "", ""), {})
        assert not (tmp_path / "asked").exists()


class TestComputeCapability:
    @pytest.mark.parametrize(
        ("card", "sm", "ptx"),
        [("8.0", (70, 80), None), ("8.6", (80,), None), ("9.0", (80,), 80), ("[N/A]", (70,), None), ("9.0", (), None)],
        ids=["its own", "an older minor", "PTX is compiled", "a driver that does not tell", "an image not known"],
    )
    def test_a_card_that_the_image_has_code_for(self, plan, nvidia_smi, card, sm, ptx):
        nvidia_smi(f"case $1 in --query-gpu=compute_cap) echo '{card}' ;; esac")
        assert found("gpus", plan(container=container(image="i:1", sm=sm, ptx=ptx, shm_bytes=1))) == []

    def test_another_card_ends_the_attempt_before_anything_is_loaded(self, plan, nvidia_smi):
        nvidia_smi("case $1 in --query-gpu=compute_cap) printf '9.0\\n9.0\\n' ;; esac")
        (finding,) = found("gpus", plan(container=container(image="i:1", sm=(70, 80, 86), shm_bytes=1)))
        assert finding.fatal
        assert finding.text == "its GPUs are sm_90, and i:1 has code for sm_70, sm_80, sm_86 only"


class TestDriver:
    def told(self, plan, nvidia_smi, version, wanted):
        nvidia_smi(f"case $1 in --query-gpu=driver_version) printf '{version}\\n{version}\\n' ;; esac")
        return found("driver", plan(container=container(min_driver=wanted, shm_bytes=1)))

    def test_one_that_is_too_old_for_the_image_is_told_with_both_versions(self, plan, nvidia_smi):
        (finding,) = self.told(plan, nvidia_smi, "470.57.02", "525.60.13")
        assert finding.fatal
        assert finding.text == "its NVIDIA driver is 470.57.02, the image needs 525.60.13 or newer"

    @pytest.mark.parametrize("version", ["525.60.13", "535.104.05", "1000.1"])
    def test_one_that_is_new_enough(self, plan, nvidia_smi, version):
        assert self.told(plan, nvidia_smi, version, "525.60.13") == []

    @pytest.mark.parametrize("version", ["", "[N/A]", "Unknown Error"])
    def test_one_whose_version_is_not_known_is_not_refused(self, plan, nvidia_smi, version):
        assert self.told(plan, nvidia_smi, version, "525.60.13") == []

    def test_an_image_that_needs_no_certain_one(self, plan, nvidia_smi):
        assert self.told(plan, nvidia_smi, "1.0", None) == []


class TestLockedMemory:
    """mlock(2) itself, in a child whose RLIMIT_MEMLOCK is lowered; root would be above that."""

    def told(self, plan, limit):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
                if os.geteuid() == 0:
                    os.setuid(65534)
                findings = [vars(finding) for finding in preflight._memlock(plan)]
                os.write(writer, json.dumps(findings).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        return [Finding(**fields) for fields in json.loads(text)]

    def test_too_little_of_it_is_told(self, plan):
        (finding,) = self.told(plan(), 64 << 10)
        assert not finding.fatal
        assert finding.text == "64 MiB cannot be locked (Cannot allocate memory): InfiniBand needs memlock unlimited"

    def test_with_infiniband_the_job_cannot_run(self, plan):
        (finding,) = self.told(plan(container=container(infiniband=True)), 64 << 10)
        assert finding.fatal

    def test_a_job_without_gpus_pins_nothing(self, plan):
        assert self.told(plan(gpus_per_node=0), 64 << 10) == []

    def test_enough_of_it(self, plan, monkeypatch):
        monkeypatch.setattr(preflight, "LOCKED_BYTES", 4 << 10)
        assert self.told(plan(), 64 << 10) == []


class TestSharedMemory:
    """/dev/shm of this machine, against a need that it has not or has."""

    def test_too_little_of_it_is_fatal(self, plan, monkeypatch):
        monkeypatch.setattr(preflight, "LEAST_FREE_BYTES", MORE_THAN_THERE_IS)
        (finding,) = found("shm", plan())
        assert finding.fatal and "/dev/shm has " in finding.text and "MiB free" in finding.text

    @pytest.mark.parametrize("settings", [{"gpus_per_node": 0}, {"container": container(shm_bytes=1 << 30)}])
    def test_where_it_is_not_used_it_does_not_matter(self, plan, monkeypatch, settings):
        monkeypatch.setattr(preflight, "LEAST_FREE_BYTES", MORE_THAN_THERE_IS)
        assert found("shm", plan(**settings)) == []

    def test_a_container_with_the_hosts_uses_it(self, plan, monkeypatch):
        monkeypatch.setattr(preflight, "LEAST_FREE_BYTES", MORE_THAN_THERE_IS)
        assert len(found("shm", plan(container=container(shm_bytes=None)))) == 1

    def test_enough_of_it(self, plan, monkeypatch):
        monkeypatch.setattr(preflight, "LEAST_FREE_BYTES", 1)
        assert found("shm", plan()) == []


class TestDisk:
    def test_a_run_directory_without_room_for_a_checkpoint(self, plan, monkeypatch):
        monkeypatch.setattr(preflight, "LEAST_FREE_BYTES", MORE_THAN_THERE_IS)
        wanted = plan(gpus_per_node=0)
        (finding,) = found("disk", wanted)
        assert finding.fatal and finding.text.startswith(f"{wanted.run_dir} has ")
        assert finding.text.endswith("there is no room for a checkpoint")

    @pytest.fixture
    def image(self, plan, tmp_path):
        """A plan that loads an image of this size into a data root that is not there yet."""

        def make(size, runtime="docker-rootless"):
            archive = Archive("/images/x.tar", size, None)
            data_root = str(tmp_path / "local" / "docker-{uid}")
            return plan(runtime=runtime, container=container(archive=archive, shm_bytes=1), data_root=data_root)

        (tmp_path / "local").mkdir()
        return make

    def test_a_disk_that_is_small_for_the_image_is_told(self, image, tmp_path):
        (finding,) = found("disk", image(MORE_THAN_THERE_IS))
        assert not finding.fatal
        assert finding.text.startswith(f"{tmp_path}/local has ") and "little for an image" in finding.text

    @pytest.mark.parametrize("size", [None, 1])
    def test_an_image_that_fits_or_whose_size_nobody_knows(self, image, size):
        assert found("disk", image(size)) == []

    def test_where_another_daemon_keeps_its_images_is_not_known(self, image):
        assert found("disk", image(MORE_THAN_THERE_IS, runtime="docker")) == []


class TestTimeLeft:
    @pytest.mark.parametrize(("left", "told"), [(300, True), (900, False), (-5, True)])
    def test_too_little_to_save_in_is_told(self, plan, left, told):
        """600 s are kept for that."""
        findings = found("time", plan(), environment={"SLURM_JOB_END_TIME": str(int(time.time()) + left)})
        assert [finding.fatal for finding in findings] == [False] * told
        assert all("are left of the time limit: too few to save in" in finding.text for finding in findings)

    @pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_END_TIME": ""}, {"SLURM_JOB_END_TIME": "never"}])
    def test_a_job_whose_end_is_not_known(self, plan, environment):
        assert found("time", plan(), environment=environment) == []


@pytest.mark.parametrize(
    ("skew", "told"), [(0.0, None), (5.0, None), (-4.9, None), (42.4, "+42 s"), (-3600, "-3600 s")]
)
def test_a_clock_that_is_off_is_told_with_how_much(skew, told):
    findings = clock(skew)
    assert [finding.text for finding in findings] == (
        [f"its clock is {told} off node 0's; logs will not merge by time"] if told else []
    )
    assert not any(finding.fatal for finding in findings)


class TestRefusal:
    def test_all_that_is_fatal_is_told_at_once_with_the_node_at_fault(self):
        findings = [Finding("shm", True, "no room"), Finding("clock", False, "off"), Finding("gpus", True, "taken")]
        with pytest.raises(NodeError, match="^g2003 cannot run this job: no room; taken$") as caught:
            refuse(NODE, findings)
        assert caught.value.blamed == ("g2003",)

    def test_warnings_refuse_nothing(self):
        refuse(NODE, [Finding("clock", False, "off")])

    def test_a_node_that_is_fit_has_no_findings_that_end_a_job(self, plan, nvidia_smi):
        nvidia_smi("")
        refuse(NODE, preflight.preflight(plan(container=container(shm_bytes=1 << 30)), NODE, {}))
