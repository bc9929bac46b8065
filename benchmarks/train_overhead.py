"""What the training loop costs beside a bare torch loop of the same model, on a CPU.

    python benchmarks/train_overhead.py [--pairs 15] [--steps 10] [--json FILE]

* loop: `Run.take_step` as `cpm_cluster.training.run` calls it (data, guard, heartbeat, clipping, records and
  TensorBoard at every step), beside forward, loss, backward, clipping and AdamW written down, of the same model,
  kernel and batches, which that has in memory. Both live in one process, blocks of steps alternate, and so does who
  goes first: a pair is two blocks that follow each other. Printed is the median of the ratios of the pairs. torch has
  one thread: of several, which wait for each other, whatever else the machine does costs many times its own time.
* checkpoint: a whole run that saves every few steps, with and without `checkpoint.asynchronous`: how long a save keeps
  training from going on (`checkpoint_seconds` of metrics.jsonl), beside the time of a step.
* data: tokens/s that the data side gives a rank, beside those that the loop uses up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from launch_overhead import machine, verdict
from torch.nn import functional

import cpm_cluster
from cpm_cluster.runs.records import read_lines
from cpm_cluster.specs.catalogue import packaged_configs
from cpm_cluster.training.attempt import Attempt, open_tokenizer
from cpm_cluster.training.data.batches import TrainingData
from cpm_cluster.training.data.packing import IGNORED, Batch
from cpm_cluster.training.data.token_index import Ranks
from cpm_cluster.training.engines import open_engine
from cpm_cluster.training.engines.initial_weights import InitialWeights, fill
from cpm_cluster.training.engines.torch_engine import adamw
from cpm_cluster.training.model.attention import open_kernel, segments_of
from cpm_cluster.training.model.decoder import CPM
from cpm_cluster.training.placement import Placement
from cpm_cluster.training.reporting.heartbeat import Heartbeat
from cpm_cluster.training.reporting.progress import Progress
from cpm_cluster.training.run import Run, train
from cpm_cluster.training.settings import Settings
from cpm_cluster.training.settings_file import parse_settings
from cpm_cluster.training.stop import StopRequest

MOST_RATIO, MOST_STALL, LEAST_DATA = 1.03, 0.05, 20.0
WARM_UP_STEPS = 3
SAVES, STEPS_BETWEEN_SAVES = 8, 6
DATA_STEPS = 200
ALONE = Placement(rank=0, world_size=1, local_rank=0)
CORPUS = [{"path": "builtin:python-reference", "weight": None}]
# A step of some 200 ms on one core: of longer steps the loop would be a smaller part.
SETTINGS: dict[str, Any] = {
    "format": 1,
    "expected_world_size": 1,
    "seed": 1234,
    "deterministic": False,
    "engine": "torch",
    "task": "finetune",
    "model": {
        "name": "cpm-tiny",
        "layers": 4,
        "hidden": 128,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 32,
        "ffn": 352,
        "vocab": 2048,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tied_embeddings": True,
    },
    "init_from": None,
    "tokenizer": str(packaged_configs() / "tokenizers" / "python-reference.txt"),
    "method": {"kind": "full"},
    "adapter": None,
    "data": {"train": CORPUS, "eval": [], "format": "jsonl", "trust_pickle": False},
    "training": {
        "seq_len": 256,
        "micro_batch": 8,
        "grad_accum": 1,
        "steps": 1_000_000,
        "lr": 1e-3,
        "min_lr_ratio": 0.1,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.1,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "clip_grad_norm": 1.0,
        "precision": "fp32",
        "recompute": "none",
        "attention": "auto",
        "zero_stage": 0,
        "offload_optimizer": False,
        "log_every": 1,
        "eval_every": 0,
        "checkpoint": {"every": 1_000_000, "keep": 2, "asynchronous": True},
        "guard": {"nonfinite": "stop", "spike": "skip", "spike_deviations": 8.0, "window": 64, "limit": 10},
    },
    "evaluation": {"choices": [], "shots": 0},
    "generation": None,
    "samples": {"prompts": [], "max_tokens": 0, "temperature": 0.0},
    "work": {"flops_per_token": None, "peak_flops_per_rank": None},
}


def settings_in(output_dir: Path, **training: Any) -> Settings:
    """The settings of a run in a folder, with parts of `training` changed."""
    changed = {**SETTINGS["training"], **training}
    return parse_settings({**SETTINGS, "output_dir": str(output_dir), "training": changed})


class OurLoop:
    """A run that is past its beginning; `steps` goes on with it."""

    def __init__(self, settings: Settings) -> None:
        output_dir = Path(settings.output_dir)
        output_dir.mkdir()
        self._heartbeat = Heartbeat(output_dir, 0)
        self._engine = open_engine(settings, ALONE)
        begun = Attempt(output_dir, StopRequest(output_dir), Progress(settings, 0), self._heartbeat)
        self.run = Run(settings, ALONE, self._engine, begun)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.run.take_step(self.run.progressed.step + 1)

    def close(self) -> None:
        self.run.records.close()
        self._engine.close()
        self._heartbeat.close("finished")


class BareLoop:
    """What one would write without a trainer; the loss is looked at in every step, too."""

    def __init__(self, settings: Settings, batches: list[Batch]) -> None:
        training = settings.training
        self._model = CPM(settings.model, kernel=open_kernel(settings, 0, torch.device("cpu"), torch.float32))
        fill(self._model, InitialWeights(None, None), settings)
        self._optimizer = adamw(dict(self._model.named_parameters()), training)
        self._batches, self._done, self._clip = batches, 0, training.clip_grad_norm
        self.loss = float("nan")

    def steps(self, count: int) -> None:
        self._model.train()
        for _ in range(count):
            batch = self._batches[self._done % len(self._batches)]
            segments = segments_of(batch.documents)
            logits = self._model(batch.input_ids, batch.documents, batch.positions, segments)
            loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self.loss = loss.item()
            self._done += 1


def seconds(act: Callable[[int], None], steps: int) -> tuple[float, float]:
    """Of one step, in a block of several: wall time, and CPU time of all threads, which others do not lengthen."""
    started, used = time.perf_counter(), time.process_time()
    act(steps)
    return (time.perf_counter() - started) / steps, (time.process_time() - used) / steps


def loop_figures(work: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Both loops, block by block; and what the data side gives when nobody computes."""
    settings = settings_in(work / "loop")
    ours = OurLoop(settings)
    ranks = Ranks(ALONE, ours.run.engine.all_gather, lambda done, total: None, lambda: False)
    data = TrainingData(settings, open_tokenizer(settings), ranks, print)
    bare = BareLoop(settings, [data.next_batches()[0] for _ in range(pairs * steps + WARM_UP_STEPS)])
    ours.steps(WARM_UP_STEPS)
    bare.steps(WARM_UP_STEPS)
    ours_both: list[tuple[float, float]] = []
    bare_both: list[tuple[float, float]] = []
    for pair in range(pairs):
        for loop, found in ((ours, ours_both), (bare, bare_both))[:: 1 if pair % 2 else -1]:
            found.append(seconds(loop.steps, steps))
    (ours_s, ours_cpu), (bare_s, bare_cpu) = zip(*ours_both, strict=True), zip(*bare_both, strict=True)
    cpu_ratio = statistics.median(one / other for one, other in zip(ours_cpu, bare_cpu, strict=True))
    ratios = sorted(one / other for one, other in zip(ours_s, bare_s, strict=True))
    ratio, step_s = statistics.median(ratios), statistics.median(ours_s)
    used = ours.run.progressed.tokens_seen / ours.run.progressed.step / step_s
    agreed = abs((ours.run.loss or 0.0) - bare.loss)
    ours.close()
    given = data_speed(data)
    return {
        "loop": {
            "ours_s": ours_s,
            "bare_s": bare_s,
            "step_s": step_s,
            "bare_step_s": statistics.median(bare_s),
            "ratio": ratio,
            "cpu_ratio": cpu_ratio,
            "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if pairs > 1 else [ratio, ratio],
            "last_losses_differ_by": agreed,
            "wanted": {"ratio": MOST_RATIO},
            "as_wanted": ratio <= MOST_RATIO,
        },
        "data": {
            "tokens_per_s": given,
            "used_tokens_per_s": used,
            "times": given / used,
            "wanted": {"times": LEAST_DATA},
            "as_wanted": given >= LEAST_DATA * used,
        },
    }


def data_speed(data: TrainingData) -> float:
    """Tokens a second of one rank's batches, padding left out."""
    started, tokens = time.perf_counter(), 0
    for _ in range(DATA_STEPS):
        tokens += sum(batch.tokens for batch in data.next_batches())
    return tokens / (time.perf_counter() - started)


def checkpoint_figures(work: Path, asynchronous: bool) -> dict[str, Any]:
    """How long a save stops training, and the steps while one is being written beside those after it."""
    output_dir = work / f"saving-{'asynchronous' if asynchronous else 'at-once'}"
    every = {"every": STEPS_BETWEEN_SAVES, "keep": 2, "asynchronous": asynchronous}
    train(settings_in(output_dir, steps=SAVES * STEPS_BETWEEN_SAVES + 1, checkpoint=every), ALONE, b"")
    rows = read_lines(output_dir / "metrics.jsonl")[STEPS_BETWEEN_SAVES:]
    times = [(row["step"], row["time"] - before["time"], row["checkpoint_seconds"]) for before, row in pairwise(rows)]
    step_s = statistics.median(whole - stall for _, whole, stall in times)
    after_save = [whole - stall for step, whole, stall in times if step % STEPS_BETWEEN_SAVES == 1]
    stalls: dict[int, float] = {}
    for step, _, stall in times:
        stalls[(step - 1) // STEPS_BETWEEN_SAVES] = stalls.get((step - 1) // STEPS_BETWEEN_SAVES, 0.0) + stall
    stall_s = statistics.median(stalls.values())
    return {
        "bytes": sum(path.stat().st_size for path in sorted((output_dir / "checkpoints").glob("step-*"))[-1].iterdir()),
        "step_s": step_s,
        "stall_s": stall_s,
        "stall_of_a_step": stall_s / step_s,
        "first_step_after_s": statistics.median(after_save),
        "wanted": {"stall_of_a_step": MOST_STALL},
        "as_wanted": stall_s <= MOST_STALL * step_s,
    }


def all_figures(work: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Every comparison, and what it was measured on."""
    load_before = os.getloadavg()[0]
    with open(work / "printed", "w", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        found = loop_figures(work, pairs, steps)
        found["checkpoint"] = checkpoint_figures(work, asynchronous=True)
        found["checkpoint_at_once"] = checkpoint_figures(work, asynchronous=False)
    return {
        "units": "seconds of an optimizer step, tokens a second",
        "taken": time.strftime("%FT%T%z"),
        "machine": machine() | {"load_before_and_after": [load_before, os.getloadavg()[0]]},
        "versions": {"cpm-cluster": cpm_cluster.__version__, "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "pairs": pairs,
        "steps_in_a_block": steps,
        **found,
    }


def table(figures: dict[str, Any]) -> Iterator[str]:
    """The figures for people."""
    box, loop, data = figures["machine"], figures["loop"], figures["data"]
    before, after = box["load_before_and_after"]
    yield f"{box['cpus']} × {box['cpu']}, {box['memory_gib']} GiB, Linux {box['kernel']}"
    yield f"load {before:.1f} before, {after:.1f} after, torch {figures['versions']['torch']}"
    low, high = loop["ratio_quartiles"]
    yield f"loop        {1000 * loop['step_s']:.1f} ms a step, bare torch {1000 * loop['bare_step_s']:.1f} ms"
    yield f"            their last losses differ by {loop['last_losses_differ_by']:.1e}"
    yield f"            ratio of {figures['pairs']} pairs {loop['ratio']:.3f} ({low:.3f} to {high:.3f}){verdict(loop)}"
    yield f"            ratio of their CPU time {loop['cpu_ratio']:.3f}"
    yield f"            wanted: at most {MOST_RATIO:g}"
    for key, name in (("checkpoint", "asynchronous"), ("checkpoint_at_once", "at once")):
        saving = figures[key]
        yield f"checkpoint  {name}: {saving['bytes'] / 1e6:.0f} MB stop training for {1000 * saving['stall_s']:.1f} ms"
        after_s, step_s = 1000 * saving["first_step_after_s"], 1000 * saving["step_s"]
        share = saving["stall_of_a_step"]
        yield f"            {share:.1%} of a step; the next step takes {after_s:.1f} ms, others {step_s:.1f} ms"
    yield f"            wanted: at most {MOST_STALL:.0%} asynchronously{verdict(figures['checkpoint'])}"
    yield f"data        {data['tokens_per_s']:,.0f} tokens/s, {data['times']:,.0f} × what the loop uses{verdict(data)}"
    yield f"            wanted: at least {LEAST_DATA:g} ×"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15, help="blocks of each loop (15)")
    parser.add_argument("--steps", type=int, default=10, help="steps in a block (10)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    if min(options.pairs, options.steps) < 1:
        parser.error("--pairs and --steps take 1 or more")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        figures = all_figures(Path(work), options.pairs, options.steps)
    print("\n".join(table(figures)))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if all(figures[name]["as_wanted"] for name in ("loop", "checkpoint", "data")) else 1


if __name__ == "__main__":
    sys.exit(main())
