"""How far predicted memory lies from measured runs: the planner beside two public estimators, on the same rows.

    python benchmarks/planner_accuracy.py [ROWS.csv] [--hold-out] [--json FILE]

* cpm-cluster: the predictions of `cpm plan --evaluate`, whose constants were fitted to the packaged rows. "held out"
  (with --hold-out) is GPU memory by constants that were fitted again without the row's source.
* DeepSpeed: estimate_zero2_model_states_mem_needs and estimate_zero3_… of the installed package, GPU and host, with the
  row's parameters, largest matrix, GPUs per node, nodes, offloads and zero.Init. They promise parameters, gradients and
  optimizer states alone. Rows: full training with Adam on DeepSpeed, ZeRO-2 or 3.
* accelerate: `accelerate estimate-memory`, column "Training using Adam", of the dtype float32 for fp32 rows and float16
  for others. All of it is accelerate's code but for the look-up on the hub, in whose place a config.json of the row's
  shape is read. An untied output head counts, although it leaves that out for most models. It promises a batch of one,
  and says nothing of the host. Rows: full training with Adam, all states on each GPU (one process, DDP, ZeRO-0).

Predictions are compared with the reading of the row as it is: nvidia-smi's, or torch's counters. A peer says "fits"
where its figure is at most what the card has (and the host, where its size is known). Our "tight" is not "fits".
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fit_planner import fit

from cpm_cluster.planner.deepspeed_states import largest_matrix
from cpm_cluster.planner.evaluate import Prediction, fit_score, gpu_error, host_error, predict
from cpm_cluster.planner.gpu_memory import gpu_memory, gpu_need, reading
from cpm_cluster.planner.host_memory import GB, host_memory
from cpm_cluster.planner.memory_constants import MIB
from cpm_cluster.planner.rows import Row, read_rows
from cpm_cluster.planner.setup import Setup, Shape

ROWS = Path(__file__).resolve().parent.parent / "tests" / "data" / "measured_runs.csv"
OURS, HELD_OUT = "cpm-cluster", "held out"
PACKAGES = ("cpm-cluster", "deepspeed", "accelerate", "transformers", "torch")
QUIET = {"DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
QUANTITIES: dict[str, Callable[[Row, Prediction], float | None]] = {
    "GPU memory": gpu_error,
    "host memory": host_error,
}


@dataclass(frozen=True)
class Peer:
    """A public estimator, and the rows that it is made for."""

    name: str
    rows: str
    applies: Callable[[Setup], bool]
    predict: Callable[[Row], Prediction]
    knows_hosts: bool


@dataclass(frozen=True)
class Score:
    """Relative errors; the median keeps its sign, so that below 0 the need was underestimated."""

    n: int
    mape: float
    median: float
    within_10: float
    within_20: float


def full_with_adam(setup: Setup) -> bool:
    return setup.mode == "full" and setup.optimizer == "adamw"


def is_sharded(setup: Setup) -> bool:
    return full_with_adam(setup) and setup.engine == "deepspeed" and setup.zero_stage >= 2 and setup.tp * setup.pp == 1


def is_replicated(setup: Setup) -> bool:
    alone = setup.engine in ("none", "ddp") or (setup.engine == "deepspeed" and setup.zero_stage == 0)
    return full_with_adam(setup) and alone and setup.tp * setup.pp == 1 and not setup.offload_optimizer


def by_deepspeed(row: Row) -> Prediction:
    setup = row.setup
    zero2 = importlib.import_module("deepspeed.runtime.zero.stage_1_and_2").estimate_zero2_model_states_mem_needs
    zero3 = importlib.import_module("deepspeed.runtime.zero.stage3").estimate_zero3_model_states_mem_needs
    where = {"num_gpus_per_node": setup.gpus_per_node, "num_nodes": setup.nodes, "cpu_offload": setup.offload_optimizer}
    if setup.zero_stage == 2:
        host, gpu = zero2(setup.shape.parameters, **where)
    else:
        where |= {"cpu_offload_params": setup.offload_param, "zero_init": setup.zero_init}
        host, gpu, _ = zero3(setup.shape.parameters, largest_matrix(setup), **where)
    return prediction_of(row, gpu, host)


def by_accelerate(row: Row) -> Prediction:
    dtype = "float32" if row.setup.precision == "fp32" else "float16"
    return prediction_of(row, training_bytes(row.setup.shape, dtype), 0)


def prediction_of(row: Row, gpu: float, host: float) -> Prediction:
    """Of an estimator that gives one figure of each, in bytes."""
    setup, mib = row.setup, gpu / MIB
    fits_gpu = not setup.gpu_memory_mib or mib <= setup.gpu_memory_mib
    fits_host = not setup.host_memory_gb or host <= setup.host_memory_gb * GB
    return Prediction(row.id, round(mib, 1), round(host / GB, 2), fits_gpu and fits_host, None, mib, mib)


@cache
def training_bytes(shape: Shape, dtype: str) -> float:
    """Training using Adam, as `accelerate estimate-memory` prints it for a model of that shape."""
    estimate = importlib.import_module("accelerate.commands.estimate")
    config, with_head = config_of(shape)
    # what the hub would say of the model: a class that it names is built, otherwise the one without output head
    said = {} if shape.tied_embeddings else {"auto_map": {with_head: ""}}
    vars(estimate)["verify_on_hub"] = lambda *_: Namespace(library_name="transformers", config=said)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        Path(folder, "config.json").write_text(json.dumps(config), encoding="utf-8")
        asked = Namespace(model_name=folder, library_name="transformers", trust_remote_code=False, dtypes=[dtype])
        ((_, _, _, usage),) = estimate.gather_data(asked)
    return float(max(usage.values()))


def config_of(shape: Shape) -> tuple[dict[str, Any], str]:
    """config.json of a model of that shape in transformers, and its class with an output head."""
    common = {"vocab_size": shape.vocab, "tie_word_embeddings": shape.tied_embeddings}
    if shape.kind == "t5":
        return {
            "model_type": "t5",
            "d_model": shape.hidden,
            "d_kv": round(shape.size_of_head),
            "d_ff": shape.ffn,
            "num_heads": shape.heads,
            "num_layers": shape.layers // 2,
            "num_decoder_layers": shape.layers - shape.layers // 2,
            "feed_forward_proj": "gated-gelu" if shape.gated_mlp else "relu",
            **common,
        }, "AutoModelForSeq2SeqLM"
    common |= {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
    }
    if shape.kind == "bert":
        return {"model_type": "megatron-bert", **common}, "AutoModelForMaskedLM"
    common |= {"num_key_value_heads": shape.kv_heads}
    if shape.head_dim:
        common["head_dim"] = shape.head_dim
    # StarCoder2 is Llama's block with a plain MLP
    return {"model_type": "llama" if shape.gated_mlp else "starcoder2", **common}, "AutoModelForCausalLM"


PEERS = (
    Peer("DeepSpeed", "full training with Adam on DeepSpeed, ZeRO-2 or 3", is_sharded, by_deepspeed, True),
    Peer(
        "accelerate",
        "full training with Adam, states whole on each GPU",
        is_replicated,
        by_accelerate,
        False,
    ),
)


def held_out(rows: Sequence[Row]) -> dict[str, Prediction]:
    """Predictions by constants of GPU memory that were fitted without the source of the row.

    Raises:
        ValueError: all rows are of one source.
    """
    if len({row.source for row in rows}) < 2:
        raise ValueError("--hold-out fits to other sources than a row's own: it needs rows of two sources or more")
    found = {}
    for source in sorted({row.source for row in rows if usable(row)}):
        constants = fit([row for row in rows if row.source != source])
        for row in rows:
            if row.source != source:
                continue
            setup = row.setup
            shown = reading(gpu_memory(setup, constants), setup).bytes / MIB
            need = gpu_need(setup, constants).verdict(setup.gpu_memory_mib)
            fits_host = not setup.host_memory_gb or host_memory(setup).high <= setup.host_memory_gb * GB
            fits = need in ("fits", "capacity unknown") and fits_host
            found[row.id] = replace(predict(row), gpu_mem_mb=round(shown, 1), fits=fits)
    return found


def usable(row: Row) -> bool:
    return row.use_gpu or row.use_host or row.use_fit


def group_of(row: Row) -> str:
    setup = row.setup
    return f"{setup.engine} ZeRO-{setup.zero_stage}" if setup.engine == "deepspeed" else setup.engine


def score(errors: Sequence[float]) -> Score:
    sizes = [abs(error) for error in errors]
    within = [sum(size <= bound for size in sizes) / len(sizes) for bound in (0.10, 0.20)]
    figures = statistics.mean(sizes), statistics.median(errors), *within
    return Score(len(sizes), *(round(figure, 4) for figure in figures))


def compare(title: str, rows: Sequence[Row], engines: dict[str, dict[str, Prediction]], hosts: bool) -> dict[str, Any]:
    """Scores of each engine's predictions (by row id) of the same rows: all, and by training engine."""
    scores: dict[str, Any] = {}
    groups = {"all": list(rows)} | {
        name: [row for row in rows if group_of(row) == name] for name in sorted(set(map(group_of, rows)))
    }
    for quantity, error_of in QUANTITIES.items():
        for group, members in groups.items():
            for engine, predictions in engines.items():
                if quantity == "host memory" and (not hosts or engine == HELD_OUT):
                    continue
                errors = [error_of(row, predictions[row.id]) for row in members]
                if known := [error for error in errors if error is not None]:
                    scores.setdefault(quantity, {}).setdefault(group, {})[engine] = asdict(score(known))
    judged = [row for row in rows if hosts or row.reading.outcome != "oom_host"]
    fits = {
        engine: asdict(fit_score([(row, predictions[row.id]) for row in judged]))
        for engine, predictions in engines.items()
    }
    return {
        "rows": title,
        "scores": scores,
        "fit": fits,
        "predictions": [
            {
                "id": row.id,
                "outcome": row.reading.outcome,
                "measured": {"gpu_mem_mb": row.reading.gpu_memory_mib, "host_mem_gb": row.reading.host_memory_gb},
            }
            | {engine: figures(predictions[row.id], hosts, engine) for engine, predictions in engines.items()}
            for row in rows
        ],
    }


def figures(prediction: Prediction, hosts: bool, engine: str) -> dict[str, Any]:
    names = ["gpu_mem_mb", "fits"] + (["host_mem_gb"] if hosts and engine != HELD_OUT else [])
    return {name: getattr(prediction, name) for name in names}


def all_figures(rows: Sequence[Row], hold_out: bool) -> dict[str, Any]:
    used = [row for row in rows if usable(row)]
    ours = {OURS: {row.id: predict(row) for row in used}}
    if hold_out:
        ours[HELD_OUT] = held_out(rows)
    sections = [compare("all rows of the table", used, ours, True)]
    for peer in PEERS:
        members = [row for row in used if peer.applies(row.setup)]
        if members:
            theirs = {row.id: peer.predict(row) for row in members}
            title = f"{peer.name}'s rows: {peer.rows}"
            sections.append(compare(title, members, {**ours, peer.name: theirs}, peer.knows_hosts))
    return {"versions": {name: importlib.metadata.version(name) for name in PACKAGES}, "sections": sections}


def table(found: dict[str, Any]) -> Iterator[str]:
    yield ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    for section in found["sections"]:
        yield f"\n{section['rows']}"
        for quantity, groups in section["scores"].items():
            yield f"  {quantity:<26}{'':<12}   n    MAPE   median  within 10 %  within 20 %"
            for group, engines in groups.items():
                for engine, s in engines.items():
                    yield (
                        f"    {group:<24}{engine:<12}{s['n']:>4}  {s['mape']:>6.1%}  {s['median']:>+7.1%}"
                        f"  {s['within_10']:>11.0%}  {s['within_20']:>11.0%}"
                    )
            yield from ratio(quantity, groups["all"])
        yield f"  {'fit or no fit':<26}{'':<12}   n    died  false fits  ran  said to fit  balanced accuracy"
        for engine, f in section["fit"].items():
            balanced = "-" if f["balanced_accuracy"] is None else f"{f['balanced_accuracy']:.1%}"
            yield (
                f"    {'all':<24}{engine:<12}{f['rows']:>4}  {f['died']:>6}  {len(f['false_fits']):>10}"
                f"  {f['fitted']:>3}  {f['said_to_fit']:>11}  {balanced:>17}"
            )


def ratio(quantity: str, engines: dict[str, Any]) -> Iterator[str]:
    """Of the mean errors, against each peer."""
    for engine in engines.keys() - {OURS, HELD_OUT}:
        of = [f"{name} {engines[name]['mape'] / engines[engine]['mape']:.2f}" for name in engines if name != engine]
        yield f"    ratio of MAPE, {quantity}, to {engine}'s: {', '.join(of)}"


def main() -> int:
    """Print the tables; 2 for rows that cannot be read, or a peer that isn't installed."""
    parser = argparse.ArgumentParser(description="Predicted memory beside measured runs and named peers.")
    parser.add_argument(
        "rows", type=Path, nargs="?", default=ROWS, metavar="ROWS.csv", help="default: the packaged rows"
    )
    parser.add_argument("--hold-out", action="store_true", help="predict each source without having fitted to it, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    os.environ |= QUIET
    try:
        found = {"file": options.rows.name, **all_figures(read_rows(options.rows), options.hold_out)}
    except (OSError, ValueError) as error:
        print(f"planner_accuracy: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"planner_accuracy: {error.name} is not installed; `make bench` does it, in .venv-bench", file=sys.stderr)
        return 2
    print(f"{options.rows.name}; the planner's constants were fitted to the packaged measured_runs.csv")
    print("\n".join(table(found)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
