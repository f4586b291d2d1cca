"""A trainer without torch that keeps the contract of a run directory: its weights are a chain of hashes over the steps.

What it does wrong is told by `standin.json` in the sweep's folder: `step_s`, and by run id (or its start) `raise_at`,
`out_of_memory_at`, `break_at` (its disk), `diverge_at`, `hang_at` and `allocate_at`, a step each; `once` limits each of
them to the first attempt. `gpu_gb` is the memory of each pretended GPU, and `peak_gb` what a run takes of it from its first
step on (by run id or its start): who finds no room, beside what others have of the same GPU, is out of memory.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from kv_align.config.compose import arm_name
from kv_align.config.identity import content_hash
from kv_align.runs.run_dir import RunDirectory, append_row, file_digest, read_json, write_json


def run(config, path, criteria_hash=None, began=None):
    directory, identity = RunDirectory(path), content_hash(config)
    settings = json.loads((Path(path).parents[1] / "standin.json").read_text())
    if settings.get("ranks"):
        with (directory.path / "ranks.txt").open("a") as file:
            file.write("{RANK}/{WORLD_SIZE}@{LOCAL_RANK} ".format(**os.environ))
        if os.environ["RANK"] != "0":
            return "finished"
        while len((directory.path / "ranks.txt").read_text().split()) < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.02)  # as the trainer does: no process is done before all have begun
    with directory.lock():
        before = directory.status()
        if before is not None and before.content_hash == identity and directory.is_complete():
            print(f"{path} already holds this run, finished: nothing to do", flush=True)
            return "finished"
        steps = config.trainer.max_steps
        status = directory.begin(
            config.model_dump(by_alias=True), arm=arm_name(config), content_hash=identity, total_steps=steps
        )
        with (directory.path / "attempts.txt").open("a") as file:
            file.write(f"{os.getpid()}\n")
        working = directory.path / f"working.{os.getpid()}"  # stays where the process is killed
        working.touch()
        asked = []
        handlers = {each: signal.signal(each, lambda number, frame: asked.append(number)) for each in _ASK}
        try:
            state, reason = _train(config, directory, status, settings, asked)
        except (MemoryError, _FullError) as error:
            state, reason = "failed", f"out of memory: {error}"
        except RuntimeError as error:
            state, reason = "failed", f"RuntimeError: {error}"
        finally:
            working.unlink()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        directory.update(directory.status(), state=state, reason=reason)
        if state == "finished":  # who is killed before this rightly goes on, and is not done twice
            with (directory.path / "finished.txt").open("a") as file:
                file.write(f"{os.getpid()}\n")
    return state


class _FullError(Exception):
    pass


def _take(settings, directory, status):
    """Take memory of the pretended GPU, which is a folder with a file for each process that has some."""
    if "gpu_gb" not in settings:
        return status
    starts = sorted((each for each in settings["peak_gb"] if directory.path.name.startswith(each)), key=len)
    peak = settings["peak_gb"][starts[-1]] if starts else settings["peak_gb"][""]
    gpu = directory.path.parents[1] / f"gpu-{os.environ['CUDA_VISIBLE_DEVICES']}"
    gpu.mkdir(exist_ok=True)
    with (gpu / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in gpu.glob("*.gb"):
            if not Path(f"/proc/{file.stem}").exists():
                file.unlink()
        others = [float(file.read_text()) for file in gpu.glob("*.gb")]
        with (gpu / "at_once.txt").open("a") as file:
            file.write(f"{directory.path.name} {len(others) + 1}\n")
        if sum(others) + peak > settings["gpu_gb"]:
            raise _FullError(f"{directory.path.name} wants {peak} beside {others}")
        (gpu / f"{os.getpid()}.gb").write_text(str(peak))
    return replace(status, peak_memory_gb=peak, gpu_memory_gb=settings["gpu_gb"])


_ASK = (signal.SIGTERM, signal.SIGUSR2)


def _train(config, directory, status, settings, asked):
    step, weights = _restore(directory, status.content_hash)
    directory.rewind(step if step else -1)
    print(f"{directory.path.name} from step {step} on {os.environ.get('CUDA_VISIBLE_DEVICES', 'no GPU')}", flush=True)
    if settings.get("threads"):
        (directory.path / "threads.txt").write_text(os.environ["OMP_NUM_THREADS"])
    while step < status.total_steps:
        wrong = _wrong(settings, directory.path.name, step + 1, status.attempt)
        if wrong == "raise_at":
            raise RuntimeError(f"made to fail at step {step + 1}")
        if wrong == "out_of_memory_at":
            raise MemoryError(f"made to run out of memory at step {step + 1}")
        if wrong == "break_at":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if wrong == "diverge_at":
            return "diverged", f"the loss was not finite at step {step + 1}"
        if wrong == "allocate_at":
            kept = [bytearray(50_000_000) for _ in range(40)]
            time.sleep(60)
            print(len(kept))
        while wrong == "hang_at" and not asked:
            time.sleep(0.02)
        time.sleep(settings.get("step_s", 0.0))
        step += 1
        status = _take(settings, directory, status) if status.peak_memory_gb is None else status
        weights = hashlib.sha256(f"{weights} {step}".encode()).hexdigest()
        append_row(directory.metrics_file, {"step": step, "task_loss": 1.0 / step, "elapsed_s": 0.1 * step})
        status = directory.update(status, step=step)
        if step % config.trainer.checkpoint_interval == 0 or asked:
            _save(directory, step, weights)
        if asked and step < status.total_steps:
            name = signal.Signals(asked[0]).name
            return "interrupted", f"asked to leave by {name} at step {step}; run it again to go on"
    directory.student.mkdir(exist_ok=True)
    (directory.student / "model.safetensors").write_text(weights)
    summary = {"steps": step, "weights": weights, "artefacts": directory.artefact_sizes()}
    write_json(directory.summary_file, summary)
    return "finished", ""


def _save(directory, step, weights):
    final = directory.checkpoints / f"step_{step:08d}"
    temporary = directory.checkpoints / f".writing_{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "weights").write_text(weights)
    write_json(temporary / "manifest.json", {"step": step, "sha256": file_digest(temporary / "weights")})
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    for old in sorted(directory.checkpoints.glob("step_*"))[:-1]:
        shutil.rmtree(old)


def _restore(directory, identity):
    for found in sorted(directory.checkpoints.glob("step_*"), reverse=True):
        manifest = read_json(found / "manifest.json")
        if manifest and file_digest(found / "weights") == manifest["sha256"]:
            return manifest["step"], (found / "weights").read_text()
    return 0, identity


def _wrong(settings, name, step, attempt):
    for kind in ("raise_at", "out_of_memory_at", "break_at", "diverge_at", "hang_at", "allocate_at"):
        for run, at in settings.get(kind, {}).items():
            if name.startswith(run) and at == step and not (attempt > 1 and settings.get("once")):
                return kind
    return None


if __name__ == "__main__":
    sys.exit("imported in the place of kv_align.experiment.experiment")
