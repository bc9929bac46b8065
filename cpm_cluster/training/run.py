"""A training run from first to last step, on one rank: load, resume, train, evaluate, save, sample."""

from __future__ import annotations

import time
from pathlib import Path

from cpm_cluster.training.checkpoint import Checkpoints, Progressed
from cpm_cluster.training.corpus import Use, read_rows
from cpm_cluster.training.engines import Engine, StepResult, open_engine
from cpm_cluster.training.errors import UserError, clear_errors
from cpm_cluster.training.files import write_json
from cpm_cluster.training.generate import continue_text
from cpm_cluster.training.packing import (
    Batch,
    PackedStream,
    Sample,
    best_fit,
    collate,
    encode_rows,
    share_of,
)
from cpm_cluster.training.placement import Placement, confirm_world, expect_world_size
from cpm_cluster.training.progress import Progress, Speed
from cpm_cluster.training.records import Records
from cpm_cluster.training.schedules import learning_rate
from cpm_cluster.training.settings import Settings
from cpm_cluster.training.stop import StopRequest
from cpm_cluster.training.tokenizer import Tokenizer, load_tokenizer


def finetune(settings: Settings, placement: Placement, settings_text: bytes) -> str:
    """Train as the settings say, on this rank; return "finished" or "stopped"."""
    output_dir = Path(settings.output_dir)
    prepare(output_dir, placement)
    stop = StopRequest(output_dir)
    progress = Progress(settings, placement.rank)
    progress.enter("loading")
    try:
        expect_world_size(placement, settings.expected_world_size)
        engine = open_engine(settings, placement)
        confirm_world(engine.all_gather, placement, settings.expected_world_size, settings_text)
        outcome = Run(settings, placement, engine, stop, progress).run()
        engine.close()
        return outcome
    except Exception:
        progress.enter("failed")
        raise


class Run:
    """One attempt at a run: the components, and the order in which they act."""

    def __init__(
        self, settings: Settings, placement: Placement, engine: Engine, stop: StopRequest, progress: Progress
    ) -> None:
        """Read tokenizer and data, build the model, resume where an earlier attempt saved."""
        self.settings, self.placement, self.engine = settings, placement, engine
        self.stop, self.progress, self.speed = stop, progress, Speed()
        self.output_dir = Path(settings.output_dir)
        self.tokenizer = open_tokenizer(settings)
        samples = self.load_samples("train")
        self.eval_batches = self.load_eval_batches()
        engine.build()
        self.checkpoints = Checkpoints(settings, placement.rank)
        self.progressed = self.checkpoints.resume(engine)
        self.stream = PackedStream(samples, settings.training.seq_len, settings.seed, self.progressed.position)
        self.records = Records(settings, placement.rank, self.progressed.step)
        self.loss: float | None = None
        self.eval_loss: float | None = None

    def run(self) -> str:
        """Sample, train to the last step or a stop, save, sample again; return the outcome."""
        step, steps = self.progressed.step, self.settings.training.steps
        self.note_step_in_progress()
        if step == 0:
            self.write_samples(step)
        else:
            self.say(f"continuing after step {step}")
        self.progress.enter("training")
        while step < steps:
            if self.engine.any_flag(self.stop.pending):
                return self.finish("stopped")
            step += 1
            self.train(step)
            if step % self.settings.training.checkpoint.every == 0:
                self.save()
        self.save()
        self.write_samples(step)
        self.progress.enter("saving")
        self.engine.export_weights(self.output_dir / "weights")
        return self.finish("finished")

    def train(self, step: int) -> None:
        """One optimizer step, and what is due after it."""
        training = self.settings.training
        lr = learning_rate(step, training)
        started = time.monotonic()
        result = self.engine.train_step(self.next_batches(), lr)
        self.speed.note(time.monotonic() - started, result.tokens)
        tokens_seen = self.progressed.tokens_seen + result.tokens
        self.progressed = Progressed(step, tokens_seen, *self.stream.position)
        self.loss = result.loss
        evaluated = bool(self.eval_batches) and due(step, training.eval_every, training.steps)
        if evaluated:
            self.progress.enter("evaluating")
            self.eval_loss = self.engine.evaluate(self.eval_batches)
            self.progress.enter("training")
        self.record(result, lr, evaluated)

    def record(self, result: StepResult, lr: float, evaluated: bool) -> None:
        """Tell the live display and, every ``log_every`` steps, the records."""
        training, step = self.settings.training, self.progressed.step
        measured = {
            "step": step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": self.speed.tokens_per_second,
            "tokens_seen": self.progressed.tokens_seen,
        }
        eta = self.speed.eta_seconds(training.steps - step)
        self.progress.note(**measured, eval_loss=self.eval_loss, eta_seconds=eta)
        if evaluated or due(step, training.log_every, training.steps):
            extra = {"eval_loss": self.eval_loss if evaluated else None, "loss_scale": result.loss_scale}
            self.records.metrics({**measured, **extra, "time": time.time()})

    def save(self) -> None:
        """Write a checkpoint of the finished steps unless there is one."""
        if self.checkpoints.newest_step == self.progressed.step:
            return
        self.progress.enter("saving")
        self.checkpoints.save(self.engine, self.progressed)
        self.progress.enter("training", checkpoint_step=self.checkpoints.newest_step)

    def finish(self, outcome: str) -> str:
        """Leave a checkpoint and ``outcome.json``; close the records."""
        self.save()
        self.records.close()
        if self.placement.rank == 0:
            content = {
                "outcome": outcome,
                "step": self.progressed.step,
                "checkpoint_step": self.checkpoints.newest_step,
                "final_loss": self.loss,
            }
            write_json(self.output_dir / "outcome.json", content)
        self.say(f"{outcome} after step {self.progressed.step}")
        self.progress.enter("done" if outcome == "finished" else "stopped")
        return outcome

    def write_samples(self, step: int) -> None:
        """Continue every prompt; all ranks compute, rank 0 records."""
        self.progress.enter("sampling")
        samples = self.settings.samples
        for number, prompt in enumerate(samples.prompts):
            text = continue_text(
                self.engine.next_token_logits,
                self.tokenizer,
                prompt,
                samples.max_tokens,
                samples.temperature,
                self.settings.seed + number,
            )
            self.records.sample(number, step, prompt, text)

    def next_batches(self) -> list[Batch]:
        """Return this rank's micro batches of the next step."""
        training, world_size = self.settings.training, self.placement.world_size
        rows = self.stream.take(world_size * training.grad_accum * training.micro_batch)
        groups = share_of(rows, self.placement.rank, world_size, training.micro_batch)
        return [collate(group, training.seq_len) for group in groups]

    def load_samples(self, use: Use) -> list[Sample]:
        """Read, check and encode the data of one use; say how many samples are too long."""
        data, seq_len = self.settings.data, self.settings.training.seq_len
        sources = data.train if use == "train" else data.eval
        rows = read_rows([source.path for source in sources], use)
        samples, dropped = encode_rows(rows, self.tokenizer, seq_len)
        if dropped:
            self.say(f"{dropped} of {len(rows)} {use} samples are longer than {seq_len} tokens and were dropped")
        return samples

    def load_eval_batches(self) -> list[Batch]:
        """Return this rank's share of the evaluation data; empty when the settings ask for no evaluation."""
        if not self.settings.data.eval or self.settings.training.eval_every == 0:
            return []
        training = self.settings.training
        rows = best_fit(self.load_samples("eval"), training.seq_len)
        groups = share_of(rows, self.placement.rank, self.placement.world_size, training.micro_batch)
        return [collate(group, training.seq_len) for group in groups]

    def say(self, line: str) -> None:
        """Print a line for people, once."""
        if self.placement.rank == 0:
            print(line, flush=True)

    def note_step_in_progress(self) -> None:
        """Show where a resumed run stands."""
        done = self.progressed
        self.progress.note(step=done.step, tokens_seen=done.tokens_seen, checkpoint_step=self.checkpoints.newest_step)


def due(step: int, every: int, last: int) -> bool:
    """Tell whether something that happens every so many steps, and after the last one, happens after this step."""
    return step % every == 0 or step == last


def prepare(output_dir: Path, placement: Placement) -> None:
    """Make the output directory and remove what an earlier attempt said about its end."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir {output_dir} cannot be made: {error.strerror}") from error
    clear_errors(output_dir, placement.rank, placement.world_size)
    outcome = output_dir / "outcome.json"
    if placement.rank == 0 and outcome.exists():
        outcome.unlink()


def open_tokenizer(settings: Settings) -> Tokenizer:
    """Return the tokenizer; raises UserError when the model has no embedding for some of its ids."""
    tokenizer = load_tokenizer(settings.tokenizer)
    if tokenizer.size > settings.model.vocab:
        raise UserError(
            f"the tokenizer {settings.tokenizer} has {tokenizer.size} ids but model.vocab is {settings.model.vocab}"
        )
    return tokenizer
