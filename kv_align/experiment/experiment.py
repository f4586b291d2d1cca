"""One run, top to bottom: configure, build, fit, evaluate, write."""

from __future__ import annotations

import logging
import traceback
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from kv_align.config.compose import arm_name
from kv_align.config.config import Config
from kv_align.config.identity import content_hash, going_on
from kv_align.config.inputs import check_inputs
from kv_align.experiment.closing_table import print_summary
from kv_align.experiment.conclusion import conclude
from kv_align.experiment.quiet import quiet_libraries
from kv_align.experiment.start import start
from kv_align.experiment.student_card import push_to_hub
from kv_align.models.devices import is_out_of_memory
from kv_align.runs.errors import ConfigError
from kv_align.runs.heartbeat import heartbeat
from kv_align.runs.preemption import Preempted, Preemption
from kv_align.runs.provenance import attempt_provenance
from kv_align.runs.record import write_record
from kv_align.runs.run_dir import RunDirectory, State, read_json
from kv_align.runs.stopwatch import Stopwatch
from kv_align.training.distributed.processes import is_first, own_directory

LOGGER = logging.getLogger(__name__)


def run(config: Config, path: Path, criteria_hash: str | None = None, began: float | None = None) -> State:
    """Do a run in a directory, or go on with it, and return its end state.

    A finished run of the same configuration is left as it is and its summary is shown.

    Parameters
    ----------
    config, path
        What to do, and where.
    criteria_hash
        Of the criteria that were frozen with the run's plan, for its provenance; None for a run of no plan.
    began
        When what is done for this run began, in seconds since the epoch; None: now.

    Raises
    ------
    ConfigError
        For bad input; nothing of an earlier run is touched then.
    """
    stopwatch = Stopwatch(began)
    quiet_libraries()
    whole = RunDirectory(path)
    with ExitStack() as stack:
        directory = stack.enter_context(own_directory(whole))
        stack.enter_context(directory.lock())
        preemption = stack.enter_context(Preemption())
        stack.enter_context(heartbeat(directory.status_file))
        check_inputs(config)
        config = going_on(whole, config)
        before, identity = whole.status(), content_hash(config)
        if before is not None and before.content_hash == identity and whole.is_complete():
            LOGGER.info("%s already holds this run, finished: nothing to do", path)
            _warn_of_other_code(whole)
            if is_first():
                print_summary(whole)
            return "finished"
        status = directory.begin(
            config.model_dump(by_alias=True), arm=arm_name(config), content_hash=identity, total_steps=0
        )
        try:
            built = start(config, directory, whole.checkpoints, criteria_hash, stopwatch)
            if built.processes.number > 1:
                preemption.agree = built.processes.any
            preemption.leave_if_asked()
            status = directory.update(replace(status, total_steps=built.num_steps))
            state, reason = built.loop.fit(status, preemption)
            status = directory.status() or status
            if state == "running":
                with built.parallel.full_weights():
                    conclude(config, directory, built, preemption)
                state = "finished"
            status = replace(
                status, training_s=built.loop.progress.elapsed_s, overhead_s=sum(stopwatch.parts().values())
            )
            directory.update(status, state=state, step=built.loop.progress.step, reason=reason)
            built.part()
        except ConfigError as error:
            directory.update(directory.status() or status, state="failed", reason=str(error))
            raise
        except (Preempted, KeyboardInterrupt) as left:
            state, reason = "interrupted", str(left) or "interrupted by hand; run it again to go on"
            directory.update(directory.status() or status, state=state, reason=reason)
        except Exception as error:
            LOGGER.error("%s", traceback.format_exc())
            kind = "out of memory" if is_out_of_memory(error) else type(error).__name__
            directory.update(directory.status() or status, state="failed", reason=f"{kind}: {error}")
            return "failed"
    if state == "finished" and is_first():
        write_record(directory)
        print_summary(directory)
        push_to_hub(directory.student, config.hub)
    elif state != "finished":
        LOGGER.warning("the run is %s: %s", state, reason)
    preemption.pass_on()
    return state


def _warn_of_other_code(directory: RunDirectory) -> None:
    """Say so where a finished run was made by other code or packages than there are now."""
    attempts, now = (read_json(directory.provenance_file) or {}).get("attempts", []), attempt_provenance()
    differs = [what for what in ("git_commit", "git_diff", "packages") if attempts and attempts[-1][what] != now[what]]
    if differs:
        LOGGER.warning("it was made with another %s than now: its numbers are of that", ", ".join(differs))
