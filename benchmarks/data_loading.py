"""How fast training data come: checking and encoding text, opening it again, and batches from the index.

One process, one thread. Text: Python's own language reference, over and over, tokenised with the vocabulary that
ships (configs/tokenizers). Prints one line a measurement and, as JSON, all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from cpm_cluster.launch.trainer import trainer_settings
from cpm_cluster.specs.catalogue import Catalogue, packaged_configs, packaged_jobs
from cpm_cluster.specs.compose import load_job
from cpm_cluster.training.data.batches import TrainingData
from cpm_cluster.training.data.corpus import PYTHON_REFERENCE, read_rows
from cpm_cluster.training.data.token_index import Ranks
from cpm_cluster.training.data.tokenizer import Tokenizer, load_tokenizer
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.settings import Settings
from cpm_cluster.training.settings_file import parse_settings

ALONE = Placement(rank=0, world_size=1, local_rank=0)
T = TypeVar("T")


def main() -> int:
    """Measure, print, return the exit code."""
    parser = argparse.ArgumentParser(description="Measure the speed of data loading.")
    parser.add_argument("--megabytes", type=float, default=20, help="text to encode (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens a row (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), arguments.megabytes, arguments.seq_len), indent=1))
    return 0


def measure(folder: Path, megabytes: float, seq_len: int) -> dict[str, float]:
    """Return seconds and rates; ``folder`` is empty and stays so to others."""
    text = write_text(folder / "rows.jsonl", megabytes)
    settings = settings_of(folder, text, seq_len)
    tokenizer = load_tokenizer(settings.tokenizer)
    encoding, data = timed(lambda: open_data(settings, tokenizer))
    reopening, data = timed(lambda: open_data(settings, tokenizer))
    index = sum(path.stat().st_size for path in (folder / "index").rglob("*"))
    tokens = data.samples.summary.tokens
    result = {
        "text_megabytes": text.stat().st_size / 1e6,
        "tokens": tokens,
        "samples": len(data.samples),
        "index_bytes_per_token": index / tokens,
        "encoding_megabytes_per_second": text.stat().st_size / 1e6 / encoding,
        "encoding_tokens_per_second": tokens / encoding,
        "reopening_seconds": reopening,
        "batches_tokens_per_second": batch_rate(data, seconds=3.0),
    }
    return {name: round(value, 3) for name, value in result.items()}


def batch_rate(data: TrainingData, seconds: float) -> float:
    """Return the tokens a second in this rank's batches, packing included."""
    data.next_batches()
    started, tokens = time.perf_counter(), 0
    while (passed := time.perf_counter() - started) < seconds:
        tokens += sum(batch.tokens for batch in data.next_batches())
    return tokens / passed


def open_data(settings: Settings, tokenizer: Tokenizer) -> TrainingData:
    """Open the training data of a run of one rank."""
    ranks = Ranks(ALONE, lambda value: [value], lambda done, total: None, lambda: False)
    return TrainingData(settings, tokenizer, ranks, lambda line: None)


def write_text(path: Path, megabytes: float) -> Path:
    """Write rows until there are so many megabytes."""
    lines = [json.dumps(row._asdict()) + "\n" for row in read_rows([PYTHON_REFERENCE], "train")]
    once = "".join(lines)
    path.write_text(once * max(1, round(megabytes * 1e6 / len(once))))
    return path


def settings_of(folder: Path, text: Path, seq_len: int) -> Settings:
    """Return the settings of the quick start on that text, with rows of that length."""
    catalogue = Catalogue((packaged_configs(),))
    overrides = [f"data.train={text}", f"training.seq_len={seq_len}"]
    job = load_job(packaged_jobs() / "quickstart.yaml", overrides, catalogue, "local")
    return parse_settings(trainer_settings(job, str(folder)))


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds that something took, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    sys.exit(main())
