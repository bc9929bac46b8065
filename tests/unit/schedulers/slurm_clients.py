"""Stand-ins for Slurm's client commands: they record how they were called, and say what a test has set.

They are no Slurm: what Slurm does with these calls, only Slurm can tell.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "squeue", "sinfo", "scancel", "sacct", "srun")
# Each call takes the next of the answers, the last one again and again.
_COMMAND = """\
#!/bin/sh
cd {folder} || exit 99
printf '%s\\0' "$#" "$@" >> calls
/usr/bin/env -0 > environment
/bin/cat > stdin
turn=$(/bin/cat turn)
[ -e $((turn + 1)).code ] && echo $((turn + 1)) > turn
/bin/cat "$turn.stderr" >&2
/bin/cat "$turn.stdout"
exit "$(/bin/cat "$turn.code")"
"""


class SlurmClients:
    """A folder of executables that is all of PATH, and what they have been asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir(parents=True)
        for name in COMMANDS:
            (folder / name).mkdir()
            program = self.bin / name
            program.write_text(_COMMAND.format(folder=shlex.quote(str(folder / name))), "utf-8")
            program.chmod(0o755)
            self.says(name)

    def says(self, name: str, *answers: str | tuple[str, str, int]) -> None:
        """What a command prints from now on, a call an answer: its output, or (output, errors, exit code)."""
        folder = self._folder / name
        for old in folder.iterdir():
            old.unlink()
        for number, answer in enumerate(answers or ("",), 1):
            output, errors, code = (answer, "", 0) if isinstance(answer, str) else answer
            for kind, text in (("stdout", output), ("stderr", errors), ("code", str(code))):
                (folder / f"{number}.{kind}").write_text(text, "utf-8")
        (folder / "turn").write_text("1")

    def remove(self, *names: str) -> None:
        """This site does not have these."""
        for name in names:
            (self.bin / name).unlink()

    def calls(self, name: str) -> list[list[str]]:
        """Each call's argv, without the program."""
        file = self._folder / name / "calls"
        words = file.read_text("utf-8").split("\0")[:-1] if file.exists() else []
        found = []
        while words:
            count = int(words[0])
            found.append(words[1 : count + 1])
            words = words[count + 1 :]
        return found

    def environment(self, name: str) -> dict[str, str]:
        """That of the last call."""
        text = (self._folder / name / "environment").read_text("utf-8")
        return dict(pair.split("=", 1) for pair in text.split("\0")[:-1])

    def stdin(self, name: str) -> str:
        """What the last call was given to read."""
        return (self._folder / name / "stdin").read_text("utf-8")


def queued(*jobs: dict[str, Any]) -> str:
    """squeue --json with these jobs: {"job_id": 7, "job_state": ["RUNNING"]}."""
    return json.dumps({"errors": [], "jobs": list(jobs)})


def job(state: str, job_id: int = 7, **more: Any) -> dict[str, Any]:
    """One of them; `state` holds words such as `CANCELLED COMPLETING`."""
    return {"job_id": job_id, "job_state": state.split(), "state_reason": "None", "nodes": "g2001", **more}


def accounted(state: str, job_id: str = "7", submitted: str = "2026-01-02T03:04:05", code: str = "0:0") -> str:
    """A line of sacct in our format."""
    return f"{job_id}|{state}|{code}|0:0|g[2001-2002]|2026-01-02T03:05:00|2026-01-02T03:06:00|{submitted}|None\n"
