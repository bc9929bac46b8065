"""Stand-ins for Slurm's commands, `module`, the name service, nvidia-smi, docker, podman, conda and the agent's Python.

They record how they were called, and answer with what a test has set.

They are no Slurm: what Slurm does with these calls, only Slurm can tell.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

# The count goes first, so that empty words and words with newlines are kept apart.
_RECORD = 'printf \'%s\\0\' "$#" "$@" >> {file}'
_SRUN = """\
env -0 > {folder}/environment.partial && mv {folder}/environment.partial {folder}/environment
sleep "$(cat {folder}/duration)"
exit "$(cat {folder}/exit_code)"
"""
_SCONTROL = 'if [ "$1" = show ]; then cat {folder}/hostnames; fi\n'
# `python3 PACKAGE RUN_DIR begin`, `… end CODE`
_PYTHON = """\
case "$3" in
    begin) exit "$(cat {folder}/begin_exit_code)" ;;
    end) exit "$(cat {folder}/end_exit_code)" ;;
esac
"""
AGENT_PYTHON = "/opt/cpm/bin/python3"
_NVIDIA_SMI = "printf 'GPU-a\\nGPU-b\\n'\n"
_GETENT = """\
cat {folder}/addresses
[ -s {folder}/addresses ] || exit 2
"""


class StandIns:
    """A folder of executables for PATH, and what they have been asked to do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        bodies = {"srun": _SRUN, "scontrol": _SCONTROL, "getent": _GETENT, "nvidia-smi": _NVIDIA_SMI}
        bodies["python3"] = _PYTHON
        for name in (*bodies, "sbatch", "docker", "podman", "conda"):
            self._write(name, bodies.get(name, ""))
        self.answers(exit_code="0", duration="0", begin_exit_code="0", end_exit_code="0")
        self.answers(hostnames="g2001\n", addresses="10.77.0.1  STREAM g2001\n10.77.0.1  DGRAM\n")

    def answers(self, **texts: str) -> None:
        """What they say from now on."""
        for name, text in texts.items():
            (self.folder / name).write_text(text, encoding="utf-8")

    def environment(self, **variables: str) -> dict[str, str]:
        """What a script starts with: these variables, a `module` function, and no more than Slurm's."""
        module = f"() {{ {self._recording('module')}\n}}"
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "g[2001-2008]", "SLURMD_NODENAME": "g2001"}
        path = f"{self.bin}:/usr/bin:/bin"
        return {"PATH": path, "LC_ALL": "C.UTF-8", "BASH_FUNC_module%%": module, **slurm, **variables}

    def start(self, script: str, **variables: str) -> subprocess.Popen[str]:
        """A batch script in an environment of its own, in a folder where it may leave nothing."""
        path = self.folder / "job.sbatch"
        path.write_text(script.replace(AGENT_PYTHON, "python3"), encoding="utf-8")
        cwd = self.folder / "cwd"
        cwd.mkdir(exist_ok=True)
        return subprocess.Popen(
            ["bash", str(path)],
            env=self.environment(**variables),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """As `start`, to its end."""
        process = self.start(script, **variables)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def left_behind(self) -> list[str]:
        """Files that scripts made in their working directory."""
        return sorted(os.listdir(self.folder / "cwd"))

    def calls(self, name: str) -> list[list[str]]:
        """Each call's argv, without the program."""
        file = self.folder / f"{name}.calls"
        words = file.read_bytes().decode("utf-8").split("\0")[:-1] if file.exists() else []
        found = []
        while words:
            count = int(words[0])
            found.append(words[1 : count + 1])
            words = words[count + 1 :]
        return found

    def forget(self) -> None:
        """Begin anew."""
        for file in self.folder.glob("*.calls"):
            file.unlink()

    def environment_of_tasks(self) -> dict[str, str]:
        """What the tasks of the newest srun inherit."""
        text = (self.folder / "environment").read_bytes().decode("utf-8")
        return dict(pair.split("=", 1) for pair in text.split("\0")[:-1])

    def _recording(self, name: str) -> str:
        return _RECORD.format(file=shlex.quote(str(self.folder / f"{name}.calls")))

    def _write(self, name: str, body: str) -> None:
        path = self.bin / name
        text = body.format(folder=shlex.quote(str(self.folder)))
        path.write_text(f"#!/bin/sh\n{self._recording(name)}\n{text}", encoding="utf-8")
        path.chmod(0o755)
