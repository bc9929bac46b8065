"""The trainer in processes of its own, on the GPU or on the CPU, from settings as a job gives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu_train import JOB, spec_of

from cpm_cluster.launch.trainer import trainer_settings

PATIENCE_S = 240.0
# Of a step some milliseconds long on either.
SHAPES = {
    "cpu": {"layers": 2, "hidden": 32, "heads": 4, "ffn": 48, "vocab": 2048},
    "gpu": {"layers": 8, "hidden": 1024, "heads": 8, "ffn": 2816, "vocab": 2048},
}
ROWS = {"cpu": {"seq_len": 64, "micro_batch": 1}, "gpu": {"seq_len": 1024, "micro_batch": 4}}


class Training:
    """A run of the trainer alone, in a folder."""

    def __init__(self, folder: Path, place: str, training: dict[str, Any], **job: Any) -> None:
        folder.mkdir()
        self.folder, self.place = folder, place
        on_gpu = place == "gpu"
        written = {
            **JOB,
            "name": "small",
            "model": SHAPES[place],
            "resources": {"gpus_per_node": 1} if on_gpu else {"gpus_per_node": 0, "processes_per_node": 1},
            "training": {**ROWS[place], "lr": 1e-3, "zero_stage": 0, "log_every": 1, "eval_every": 0, **training},
            **job,
        }
        settings = trainer_settings(spec_of(written, folder), str(folder))
        assert settings is not None
        (folder / "trainer.json").write_text(json.dumps(settings))
        self.task = settings["task"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, or go on from the newest checkpoint."""
        (self.folder / "control/stop").unlink(missing_ok=True)
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.place == "cpu" else {}
        argv = [sys.executable, "-m", f"cpm_cluster.training.{self.task}", str(self.folder / "trainer.json")]
        environment = {**os.environ, **hidden, "OMP_NUM_THREADS": "1"}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(argv, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def finish(self) -> int:
        """Wait for the end; the exit code."""
        assert self.process is not None
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            self.process.kill()

    def run(self) -> None:
        """From here to the last step."""
        self.start()
        assert self.finish() == 0, self.log

    def stop_after(self, steps: int) -> None:
        """Ask for an end once so many steps are recorded."""
        assert self.process is not None
        deadline = time.monotonic() + PATIENCE_S
        while len(self.losses) < steps:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log
            time.sleep(0.005)
        (self.folder / "control").mkdir(exist_ok=True)
        (self.folder / "control/stop").touch()

    @property
    def losses(self) -> list[float]:
        """Of the steps recorded so far."""
        path = self.folder / "metrics.jsonl"
        whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line)["loss"] for line in whole.splitlines()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """What it has learned."""
        (path,) = (self.folder / "weights").iterdir()
        found: dict[str, torch.Tensor] = torch.load(path, weights_only=True, map_location="cpu")
        return found

    @property
    def log(self) -> str:
        """What it printed."""
        return (self.folder / "log").read_text()
