"""The training loop: steps, logging, evaluations, checkpoints, resume. Plain, on Accelerate; the step is `distill`.

A run is a function of its configuration: what a step sees depends on the seed and its number alone, so an attempt that
goes on from a checkpoint ends where an undisturbed one would.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kv_align.align.schedule import phase_at
from kv_align.config.config import Config
from kv_align.data.batch import Batch
from kv_align.data.loader import data_order, micro_batches
from kv_align.data.prepared import PreparedSplit
from kv_align.models.devices import memory_gb
from kv_align.runs.preemption import Preempted, Preemption
from kv_align.runs.progress import progress_bar
from kv_align.runs.run_dir import RunDirectory, State, Status, append_row
from kv_align.runs.stopwatch import Stopwatch
from kv_align.teacher.teacher import StateSource
from kv_align.training import checkpoint
from kv_align.training.agreement import Agreement, collapsed, start_variances
from kv_align.training.distributed.ddp import Parallel
from kv_align.training.distributed.processes import Processes
from kv_align.training.optimizer import make_optimizer, make_schedule
from kv_align.training.progress import Progress
from kv_align.training.step import Counts, Distiller, StepResult
from kv_align.training.trackers import trackers_of

LOGGER = logging.getLogger(__name__)
_HEARTBEAT_S = 5.0


class Loop:
    """Trains one distiller.

    Parameters
    ----------
    config, run, checkpoints
        What to do, and where to write it; the checkpoints are the same folder in all processes.
    parallel, processes, distiller, teacher
        The distiller is on its device and not yet prepared.
    train
        The training split.
    num_steps
        Optimizer steps.
    evaluate
        Called with the number of steps done at every declared interval; returns the columns to write.
    stopwatch
        Counts what is no step.
    """

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        checkpoints: Path,
        parallel: Parallel,
        processes: Processes,
        distiller: Distiller,
        teacher: StateSource,
        train: PreparedSplit,
        num_steps: int,
        evaluate: Callable[[int], dict[str, Any]],
        stopwatch: Stopwatch,
    ) -> None:
        self._config, self._run, self._checkpoints = config, run, checkpoints
        self._parallel, self._accelerator, self._processes = parallel, parallel.accelerator, processes
        self._teacher, self._train, self._num_steps, self._evaluate = teacher, train, num_steps, evaluate
        optimizer = make_optimizer(distiller, config.trainer)
        self._schedule = make_schedule(optimizer, config.trainer, num_steps)
        # The schedule is not prepared: Accelerate would step it once per process.
        self._wrapped, self._optimizer = parallel.prepare(distiller, optimizer)
        self._distiller = distiller
        self._order = data_order(config, len(train.examples))
        self.trackers = trackers_of(config, run)
        self.progress, self._stopwatch = Progress(), stopwatch

    def resume(self) -> bool:
        """Go back to the newest sound checkpoint, if there is one; whether there was."""
        # Of a checkpoint whose earlier steps are nowhere no whole run would come; looked for where the first process writes.
        there = RunDirectory(self._checkpoints.parent).metrics_file.exists()
        newest = checkpoint.newest_sound(self._checkpoints) if there else None
        if newest is not None:
            state = checkpoint.restore(self._accelerator, newest, self._schedule)
            self._stopwatch.go_on(state.pop("overhead", {}))
            self.progress = Progress(**state)
            LOGGER.info("resuming at step %d of %d", self.progress.step, self._num_steps)
        self._teacher.fill(self._places_to_come())
        done = self.progress.step if newest is not None else -1
        # The last evaluation comes after the last checkpoint, and will be made again.
        self._run.rewind(done, min(done, self._num_steps - 1))
        return newest is not None

    def _places_to_come(self) -> set[int]:
        """Return the examples that are still read: after two epochs, all of them, without counting through a million."""
        number, steps = len(self._train.examples), range(self.progress.step, self._num_steps)
        if len(steps) >= 2 * max(1, number // self._config.trainer.batch_size):
            return set(range(number))
        return {place for step in steps for place in self._order[step]}

    def fit(self, status: Status, preemption: Preemption) -> tuple[State, str]:
        """Run the steps that are left.

        Parameters
        ----------
        status
            The run's, renewed on the way.
        preemption
            Says when to save a checkpoint and leave.

        Returns
        -------
        `running` when all steps are done, else the end state; and its reason.
        """
        trainer, progress = self._config.trainer, self.progress
        if progress.step == 0 or progress.evaluation_due:
            self._write_evaluation()
        last_beat = time.time()
        plain_steps: list[tuple[float, int]] = []
        with progress_bar("training", self._num_steps, progress.step, may_leave=False) as advance:
            for step_batches in self.batches(progress.step):
                began = time.perf_counter()
                logged = (progress.step + 1) % trainer.log_interval == 0 or progress.step in (0, self._num_steps - 1)
                losses, row = self.step(step_batches, logged)
                if row is None:
                    reason = f"the loss or its gradient was not finite at step {progress.step + 1}"
                    append_row(self._run.metrics_file, {"step": progress.step + 1, **losses})
                    return "diverged", reason
                progress.step += 1
                tokens = sum(int(batch.student.mask.sum()) for batch in step_batches)
                progress.tokens += tokens
                step_time_s = time.perf_counter() - began
                progress.elapsed_s += step_time_s
                advance(1, f"loss {losses['total_loss']:.3f}")
                if not logged:
                    plain_steps.append((step_time_s, tokens))
                else:
                    # Diagnostics cost arms differently: a step's own time is that of the steps without them.
                    self._log(row, plain_steps or [(step_time_s, tokens)])
                    plain_steps = []
                if logged or time.time() - last_beat > _HEARTBEAT_S:
                    peak_gb, whole_gb = memory_gb(self._accelerator.device)
                    status = replace(status, peak_memory_gb=peak_gb, gpu_memory_gb=whole_gb)
                    status, last_beat = self._run.update(status, step=progress.step), time.time()
                done = progress.step == self._num_steps
                if progress.step % self._config.evaluation.interval == 0 and not done:
                    progress.evaluation_due = True
                    with suppress(Preempted):  # it is made when the run goes on
                        self._write_evaluation()
                leaving = progress.evaluation_due or preemption.anyone()
                if progress.step % trainer.checkpoint_interval == 0 or done or leaving:
                    self._save()
                if leaving and not done:
                    return "interrupted", f"{preemption.reason()} at step {progress.step}; run it again to go on"
        return "running", ""

    def step(self, step_batches: list[Batch], logged: bool) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Do one optimizer step.

        Returns
        -------
        The losses of the step, and its row for the metrics file with them in it; the row is None, and nothing was
        updated, where the loss or a gradient is not finite. Diagnostics are in it only where `logged`.
        """
        step, trainer = self.progress.step, self._config.trainer
        self._wrapped.train()
        counts = Counts.of(step_batches)
        weights = self._distiller.loss.weights(step, self._num_steps)
        phase = phase_at(step, self._config.align)
        quality, shares, reach = Agreement(), dict[str, Tensor](), self._parallel.reach(self._distiller.student)
        # It costs a backward pass of its own.
        reached = logged and self._distiller.compares_states and self._is_due(trainer.grad_norm_interval)
        for place, batch in enumerate(step_batches):
            here = self._processes.rows(batch).to(self._accelerator.device)
            last = place == len(step_batches) - 1
            with nullcontext() if last else self._parallel.no_sync(self._wrapped):
                with self._accelerator.autocast():
                    states = self._teacher.read(here, self._distiller.loss.requests)
                    result: StepResult = self._wrapped(here, states, counts, weights, phase)
                if logged and self._distiller.compares_states:
                    quality.add(result.comparison)
                if reached:
                    reach.add(result)
                self._accelerator.backward(result.total * self._processes.number)
            for name, loss in result.losses.items():
                shares[name] = shares[name] + loss if name in shares else loss
        sums = self._processes.sum(torch.stack(list(shares.values())))
        norms_of = self._clip(trainer.clip_norm)
        # All at once: it is the one place where a step waits for its device.
        numbers = torch.cat((sums, torch.stack([norm.to(sums) for norm in norms_of.values()]))).tolist()
        losses = dict(zip(shares, numbers, strict=False))
        norms = dict(zip(norms_of, numbers[len(shares) :], strict=True))
        if not all(math.isfinite(value) for value in (losses["total_loss"], *norms.values())):
            self._optimizer.zero_grad(set_to_none=True)
            return losses, None
        learning_rates = self._schedule.get_last_lr()
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        rates = {"lr": learning_rates[0]} | ({"aligner_lr": learning_rates[-1]} if trainer.aligner_lr else {})
        row: dict[str, Any] = {
            **losses,
            **{f"weight_{name}": value for name, value in weights.items()},
            **rates,
            **norms,
        }
        if logged and self._distiller.compares_states:
            quality.reduce(self._processes.sum)
            self._watch(quality, row)
        if reached:
            reach.reduce(self._processes.sum)
            row["kv_grad_norm"] = reach.norm()
            expected = phase.student_learns and any(weights[term] for term in self._distiller.state_terms)
            if expected and not row["kv_grad_norm"]:
                LOGGER.warning("no gradient: the alignment loss does not reach the student (step %d)", step + 1)
        return losses, row

    def _is_due(self, interval: int) -> bool:
        """Whether what is measured every so many steps is due in this one, which is logged; also in the first and last."""
        step, since_last_logged = self.progress.step + 1, self._config.trainer.log_interval
        return step in (1, self._num_steps) or step // interval > (step - since_last_logged) // interval

    def _clip(self, limit: float) -> dict[str, Tensor]:
        """Clip student and aligner each by its own norm: one arm's aligner must not scale its student's update."""
        norms = {"grad_norm": self._parallel.clip(self._distiller.student.parameters(), limit)}
        if self._distiller.trainable_projection is not None:
            norms["aligner_grad_norm"] = self._parallel.clip(self._distiller.trainable_projection.parameters(), limit)
        return norms

    def _watch(self, quality: Agreement, row: dict[str, Any]) -> None:
        """Add the agreement to a row, and warn by name of a collapse."""
        by_kind = quality.result()
        for kind, each in by_kind.items():
            row.update(each.row(kind))
        if not self.progress.start:
            self.progress.start = start_variances(by_kind)
        now = collapsed(self.progress.start, by_kind)
        row["collapsed"] = bool(now)
        for what in now:
            place = what.partition(" is ")[0]
            if place not in self.progress.collapses:
                self.progress.collapses.append(place)
                LOGGER.warning("collapse: %s (step %d)", what, self.progress.step + 1)

    def _log(self, row: dict[str, Any], steps: list[tuple[float, int]]) -> None:
        elapsed_s, tokens = sum(step[0] for step in steps), sum(step[1] for step in steps)
        timing = {
            "step_time_s": elapsed_s / len(steps),
            "tokens_per_s": tokens / elapsed_s,
            "elapsed_s": self.progress.elapsed_s,
        }
        full = {"step": self.progress.step, "tokens": self.progress.tokens, **row, **timing}
        append_row(self._run.metrics_file, full)
        scalars = {name: value for name, value in full.items() if isinstance(value, int | float)}
        self.trackers.log(scalars, self.progress.step)

    def _write_evaluation(self) -> None:
        append_row(self._run.evaluations_file, {"step": self.progress.step, **self._evaluate(self.progress.step)})
        self.progress.evaluation_due = False

    def _save(self) -> None:
        keep, step = self._config.trainer.keep_checkpoints, self.progress.step
        state = {**self.progress.state(), "overhead": self._stopwatch.parts()}
        with self._stopwatch.timed("checkpoints"):
            checkpoint.save(self._accelerator, self._checkpoints, step, state, keep, self._schedule)

    def batches(self, first: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each optimizer step from `first` on; those of the next are read meanwhile."""
        pinned = self._accelerator.device.type == "cuda"
        steps = micro_batches(self._train, self._order, range(first, self._num_steps), self._config.trainer, pinned)
        for now, after in pairwise(chain(steps, ([],))):
            self._teacher.expect([self._processes.rows(batch) for batch in after])
            yield now
