"""What the trainer's task needs to be told: a model, data, weights, prompts."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.specs.checks.rules import Finding, reads
from cpm_cluster.specs.job import TRAINING_TASKS, Data, JobSpec


@reads("engine", "command", "model")
def _model_named(spec: JobSpec) -> Iterator[Finding]:
    if spec.engine != "command" and not spec.command and spec.model is None:
        yield "model", f"is missing: engine {spec.engine} needs an architecture, a name in configs/models"


@reads("engine", "command", "task", "data")
def _data_named(spec: JobSpec) -> Iterator[Finding]:
    if spec.engine == "command" or spec.command:  # of which more has been said
        return
    data = spec.data or Data()
    if spec.task in TRAINING_TASKS and not data.train:
        yield "data.train" if spec.data else "data", "is missing: write data: {train: path/to/rows.jsonl}"
    weighted = [source.weight is not None for source in data.train]
    if any(weighted) and not all(weighted):
        yield "data.train", "gives a weight to some of its sources; give one to all, or to none"
    if any(source.weight is not None for source in data.eval):
        yield (
            "data.eval",
            "gives a weight, but evaluation takes every sample once; remove it: each source's loss is reported, too",
        )
    if data.format == "cpm9g" and not data.trust_pickle:
        yield (
            "data.format",
            "cpm9g is read by unpickling, which runs whatever the file says; write trust_pickle: true if it is yours,"
            " or make jsonl of it",
        )


@reads("engine", "task", "data", "evaluation", "generation", "init_from", "method")
def _task(spec: JobSpec) -> Iterator[Finding]:
    if spec.engine == "command":
        return
    if spec.task == "evaluate" and not (spec.data and spec.data.eval) and not spec.evaluation.choices:
        yield "task", "evaluate needs data: {eval: …} for perplexity, or evaluation: {choices: …}"
    if spec.task == "generate" and spec.generation is None:
        yield "generation", "is missing: task generate needs generation: {prompts: path/to/prompts.jsonl}"
    if spec.task != "generate" and spec.generation is not None:
        yield "generation", f"belongs to task generate, not to {spec.task}; remove it, or write task: generate"
    if spec.task not in TRAINING_TASKS and spec.init_from is None:
        yield "init_from", f"is missing: task {spec.task} needs trained weights"
    if spec.task not in TRAINING_TASKS and spec.engine != "torch":
        yield "engine", f"{spec.engine} trains; for task {spec.task} write torch"
    if spec.task not in TRAINING_TASKS and spec.method is not None and spec.method.init_from is None:
        yield "method.lora.init_from", f"is missing: task {spec.task} needs trained updates; or write method: full"
