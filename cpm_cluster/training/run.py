"""A training run from first to last step, on one rank: load, resume, train, evaluate, save, sample."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from operator import mul

from cpm_cluster.training.attempt import Attempt, attempt, open_tokenizer, write_outcome
from cpm_cluster.training.checkpoint import START, CheckpointError, Checkpoints, Progressed, newest_saved
from cpm_cluster.training.data.batches import TrainingData, evaluation_sources
from cpm_cluster.training.data.token_index import Ranks
from cpm_cluster.training.engines import Engine, StepResult, open_engine
from cpm_cluster.training.guard import Incident, LossGuard
from cpm_cluster.training.inference.sampling import continue_text
from cpm_cluster.training.placement import Placement, confirm_world
from cpm_cluster.training.reporting.measurements import Meter
from cpm_cluster.training.reporting.progress import Speed
from cpm_cluster.training.reporting.records import Records, finite_or_none
from cpm_cluster.training.schedules import learning_rate
from cpm_cluster.training.settings import Settings
from cpm_cluster.training.stop import Stopped


def train(settings: Settings, placement: Placement, settings_text: bytes) -> str:
    """Train as the settings say, on this rank; return "finished" or "stopped"."""
    with attempt(settings, placement) as begun:
        engine = open_engine(settings, placement)
        confirm_world(engine.all_gather, placement, settings.expected_world_size, settings_text)
        try:
            outcome = Run(settings, placement, engine, begun).run()
        except Stopped:
            outcome = end_before_training(placement, begun)
        engine.close()
        begun.heartbeat.close(outcome)
        return outcome


def end_before_training(placement: Placement, begun: Attempt) -> str:
    """Leave ``outcome.json`` of an attempt that was stopped while it read its data; nothing is there to be saved."""
    saved = newest_saved(begun.output_dir)
    if placement.rank == 0:
        write_outcome(begun.output_dir, "stopped", saved or 0, saved)
        print("stopped while the data were read; the next attempt goes on with what has been encoded", flush=True)
    begun.progress.enter("stopped", step=saved or 0, checkpoint_step=saved)
    return "stopped"


class Run:
    """One attempt at a run: the components, and the order in which they act."""

    def __init__(self, settings: Settings, placement: Placement, engine: Engine, begun: Attempt) -> None:
        """Read tokenizer and data, build the model, resume where an earlier attempt saved.

        Raises Stopped, on all ranks, soon after one is asked to stop before the model is there.
        """
        self.settings, self.placement, self.engine = settings, placement, engine
        self.output_dir, self.stop, self.progress, self.heartbeat = begun
        self.speed, self.meter = Speed(settings.work, placement.world_size), Meter()
        self.tokenizer = open_tokenizer(settings)
        ranks = Ranks(placement, self.gather_while_loading, self.note_loading, lambda: self.stop.pending)
        self.data = TrainingData(settings, self.tokenizer, ranks, self.say)
        evaluates = settings.data.eval and settings.training.eval_every
        self.eval_sources = evaluation_sources(settings, self.tokenizer, ranks, self.say) if evaluates else []
        if engine.any_flag(self.stop.pending):
            raise Stopped
        self.heartbeat.enter("loading", 0)
        self.progress.enter("loading", done=None, total=None)
        engine.build()
        self.checkpoints = Checkpoints(settings, placement.rank)
        self.progressed = self.checkpoints.resume(engine)
        self.data.seek(self.progressed.position)
        self.guard = LossGuard(settings.training.guard)
        self.guard.restore(self.progressed.guard)
        self.records = Records(settings, placement.rank, self.progressed.step)
        self.loss: float | None = None
        self.eval_loss: float | None = None
        self.eval_losses: dict[str, float] = {}

    def run(self) -> str:
        """Sample, train to the last step or a stop, save, sample again; return the outcome."""
        training = self.settings.training
        self.note_step_in_progress()
        if self.progressed.step == 0:
            self.write_samples(0)
        else:
            self.say(f"continuing after step {self.progressed.step}")
        if "rollback" in (training.guard.nonfinite, training.guard.spike):
            self.save()
        self.enter("training")
        stop = self.engine.any_flag(self.stop.pending)
        while self.progressed.step < training.steps:
            if stop:
                return self.finish("stopped")
            stop = self.take_step(self.progressed.step + 1)
            if self.progressed.step % training.checkpoint.every == 0:
                self.save()
            else:
                with self.meter.saving():
                    self.checkpoints.poll()
        self.save()
        self.write_samples(self.progressed.step)
        self.enter("saving")
        self.checkpoints.finish()
        self.engine.export_weights(self.output_dir / "weights")
        return self.finish("finished")

    def take_step(self, step: int) -> bool:
        """One optimizer step, and what is due after it; return whether some rank wants to stop."""
        started = time.monotonic()
        self.heartbeat.enter("data", step)
        with self.meter.waiting_for_data():
            batches = self.data.next_batches()
        self.heartbeat.enter("compute", step)
        lr = learning_rate(step, self.settings.training)
        try:
            result = self.engine.train_step(batches, lr, partial(self.guard.accept, step), self.wants_to_stop)
        except FloatingPointError:
            # The guard ends the run, on all ranks alike; what is being saved is of before.
            self.checkpoints.finish()
            raise
        self.speed.note(time.monotonic() - started, result.tokens)
        self.meter.step(result.forward_seconds)
        incident = self.guard.take_incident()
        if incident is not None and incident.action == "rollback":
            self.roll_back(incident)
        else:
            self.advance(step, result, lr, incident)
        return result.stop

    def wants_to_stop(self) -> bool:
        """Tell the engine, which asks when this rank has done its part of a step and is about to await the others."""
        self.heartbeat.enter("exchange", self.progressed.step + 1)
        return self.stop.pending

    def advance(self, step: int, result: StepResult, lr: float, incident: Incident | None) -> None:
        """Count a step, evaluate and record where that is due."""
        tokens_seen = self.progressed.tokens_seen + result.tokens
        self.progressed = Progressed(step, tokens_seen, self.data.position, self.guard.state())
        self.loss = finite_or_none(result.loss)
        if incident is not None:
            self.records.incident(incident, None)
        training, evaluated = self.settings.training, False
        if self.eval_sources and due(step, training.eval_every, training.steps):
            self.evaluate()
            evaluated = True
        self.record(result, lr, evaluated, incident)

    def evaluate(self) -> None:
        """Measure the loss of each source of the evaluation data, and of all their targets together."""
        self.enter("evaluating")
        losses = [self.engine.evaluate(source.batches) for source in self.eval_sources]
        targets = [source.targets for source in self.eval_sources]
        self.eval_loss = finite_or_none(sum(map(mul, losses, targets)) / sum(targets))
        names = [source.name for source in self.eval_sources]
        self.eval_losses = dict(zip(names, losses)) if len(names) > 1 else {}
        self.enter("training")

    def roll_back(self, incident: Incident) -> None:
        """Return to the newest whole checkpoint, but not to its data: go on after those of the offending step."""
        self.enter("loading")
        restored = self.checkpoints.resume(self.engine)
        if restored is START:
            raise CheckpointError(f"{incident.text}, but no checkpoint is whole any more: nothing to go back to")
        self.guard.recall_losses(restored.guard)
        self.progressed = replace(restored, position=self.data.position, guard=self.guard.state())
        self.records.incident(incident, restored.step)
        self.note_step_in_progress()
        self.enter("training", guard_events=self.guard.incidents, last_event=incident.text)

    def record(self, result: StepResult, lr: float, evaluated: bool, incident: Incident | None) -> None:
        """Tell the live display and, every ``log_every`` steps and when something happened, the records."""
        training, step = self.settings.training, self.progressed.step
        measured: dict[str, int | float | None] = {
            "step": step,
            "loss": self.loss,
            "lr": lr,
            "grad_norm": finite_or_none(result.grad_norm),
            "tokens_per_second": self.speed.tokens_per_second,
            "step_seconds": self.speed.step_seconds,
            "mfu": self.speed.mfu,
            "tokens_seen": self.progressed.tokens_seen,
            "epoch": self.data.epoch,
            "guard_events": self.guard.incidents,
        }
        if incident is not None:
            self.progress.note(last_event=incident.text)
        eta = self.speed.eta_seconds(training.steps - step)
        checkpoint_step = self.checkpoints.newest_step
        self.progress.note(**measured, eval_loss=self.eval_loss, eta_seconds=eta, checkpoint_step=checkpoint_step)
        if incident is None and not evaluated and not due(step, training.log_every, training.steps):
            return
        of_ranks = self.meter.read(self.engine.exchange)
        self.progress.note(memory_bytes=of_ranks["memory_allocated_bytes"] or of_ranks["memory_resident_bytes"])
        extra = {
            "eval_loss": self.eval_loss if evaluated else None,
            "eval_losses": self.eval_losses if evaluated else {},
            "loss_scale": result.loss_scale,
            "tokens_per_second_per_rank": self.speed.tokens_per_second / self.placement.world_size,
            "time": time.time(),
        }
        self.records.metrics({**measured, **extra, **of_ranks})

    def save(self) -> None:
        """Begin a checkpoint of the finished steps unless there is one."""
        if self.checkpoints.newest_step == self.progressed.step:
            return
        self.enter("saving")
        with self.meter.saving():
            self.checkpoints.save(self.engine, self.progressed)
        self.enter("training", checkpoint_step=self.checkpoints.newest_step)

    def enter(self, phase: str, **values: object) -> None:
        """Note what this rank does now, for the live display and the watchdog."""
        self.heartbeat.enter(phase, self.progressed.step)
        self.progress.enter(phase, **values)

    def finish(self, outcome: str) -> str:
        """Leave a checkpoint and ``outcome.json``; close the records."""
        self.save()
        self.enter("saving")
        self.checkpoints.finish()
        self.records.close()
        step = self.progressed.step
        if self.placement.rank == 0:
            write_outcome(self.output_dir, outcome, step, self.checkpoints.newest_step, self.loss)
        self.say(f"{outcome} after step {step}")
        self.enter("done" if outcome == "finished" else "stopped", checkpoint_step=self.checkpoints.newest_step)
        return outcome

    def write_samples(self, step: int) -> None:
        """Continue every prompt; all ranks compute, rank 0 records."""
        self.enter("sampling")
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

    def note_loading(self, done: int, total: int) -> None:
        """Show that the data are being read, and how far: bytes of bytes."""
        self.heartbeat.enter("data", 0)
        self.progress.note(phase="loading data", done=done, total=total)

    def gather_while_loading(self, value: int) -> list[int]:
        """Exchange a number with the other ranks; a rank that keeps them waiting shows, as in a step."""
        self.heartbeat.enter("exchange", 0)
        values = self.engine.all_gather(value)
        self.heartbeat.enter("data", 0)
        return values

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
