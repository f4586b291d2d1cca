"""A run that is asked to leave does so wherever it is, with what it has done saved."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kv_align.data import prepared
from kv_align.data.arithmetic import Arithmetic
from kv_align.data.encode import write
from kv_align.data.example import Example
from kv_align.evaluation import evaluate
from kv_align.evaluation.evaluate import Evaluator
from kv_align.experiment.assembly import assemble
from kv_align.experiment.calibration import Calibrator
from kv_align.experiment.experiment import run as do_run
from kv_align.runs.preemption import Preempted, Preemption, leave_if_asked
from kv_align.runs.progress import progress_bar
from kv_align.runs.run_dir import RunDirectory, read_rows
from kv_align.teacher.teacher import Teacher
from tests.short_runs import results, short_config
from tests.tiny_tokenizers import byte_level

CONFIG = short_config("evaluation.batch_size=2", "teacher_cache=auto")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KV_ALIGN_TEACHER_CACHE", str(tmp_path_factory.mktemp("cache")))
        path = tmp_path_factory.mktemp("runs") / "undisturbed"
        assert do_run(CONFIG, path) == "finished"
    return results(RunDirectory(path))


def asked_in(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int, when: Callable[..., bool] = lambda: True
) -> None:
    """Send this process a signal when a function is called for the first time that `when` holds."""
    function = getattr(owner, name)
    sent: list[bool] = []

    def asking(*arguments: Any, **options: Any) -> Any:
        if not sent and when():
            sent.append(True)
            signal.raise_signal(number)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, asking)


@pytest.mark.parametrize(
    ("owner", "name", "number", "step"),
    [
        (prepared, "tokenised", signal.SIGTERM, 0),
        (Calibrator, "key_value_variance", signal.SIGUSR2, 0),
        (Evaluator, "validate", signal.SIGINT, 0),
        (Evaluator, "probe", signal.SIGTERM, 0),
        (evaluate, "generate_answers", signal.SIGINT, 6),
        (Evaluator, "teacher_loss", signal.SIGTERM, 6),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_is_asked_to_leave_in_the_middle_of_something_leaves_and_ends_as_if_it_had_not(
    owner: object,
    name: str,
    number: int,
    step: int,
    undisturbed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KV_ALIGN_TEACHER_CACHE", str(tmp_path / "cache"))
    run = RunDirectory(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        asked_in(patch, owner, name, number)
        assert do_run(CONFIG, run.path) == "interrupted"
    status = run.status()
    assert status is not None
    assert status.reason == f"asked to leave by {signal.Signals(number).name}; run it again to go on"
    assert not run.summary_file.exists()
    assert len(read_rows(run.metrics_file)) == step if run.metrics_file.exists() else step == 0
    assert do_run(CONFIG, run.path) == "finished"
    assert results(run) == undisturbed


def test_a_run_asked_to_leave_in_an_evaluation_on_the_way_saves_the_step_and_makes_it_when_it_goes_on(
    undisturbed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KV_ALIGN_TEACHER_CACHE", str(tmp_path / "cache"))
    run = RunDirectory(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        asked_in(patch, Evaluator, "validate", signal.SIGTERM, lambda: (calls.append(1), len(calls) == 2)[1])
        assert do_run(CONFIG, run.path) == "interrupted"
    status = run.status()
    assert status is not None
    assert (status.step, status.reason) == (3, "asked to leave by SIGTERM at step 3; run it again to go on")
    assert [row["step"] for row in read_rows(run.evaluations_file)] == [0]
    assert (run.checkpoints / "step_00000003").is_dir()
    assert do_run(CONFIG, run.path) == "finished"
    assert [row["step"] for row in read_rows(run.evaluations_file)] == [0, 3, 6]
    assert results(run) == undisturbed


@pytest.mark.parametrize("what", ["validate", "probe", "teacher_loss"])
def test_an_evaluation_is_left_after_the_batch_that_is_under_way(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = assemble(short_config("evaluation.batch_size=2"), RunDirectory(tmp_path), tmp_path)
    arguments = (built.distiller, built.validation_teacher) if what == "validate" else ()
    read = Teacher._run
    passes: list[int] = []

    def asking(self: Teacher, *given: Any) -> Any:
        passes.append(1)
        signal.raise_signal(signal.SIGTERM)
        return read(self, *given)

    monkeypatch.setattr(Teacher, "_run", asking)
    with Preemption(), pytest.raises(Preempted):
        getattr(built.evaluator, what)(*arguments)
    assert len(passes) == 1, "no second batch was begun"


def test_problems_and_texts_are_left_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training set of millions, or of conversations that each go through a template, takes minutes."""
    source, made = Arithmetic(train_examples=8), []
    examples = source.examples("train")

    def asking(self: object, *given: Any) -> Example:
        made.append(1)
        signal.raise_signal(signal.SIGTERM)
        return examples[0]

    monkeypatch.setattr(Arithmetic, "_example", asking)
    with Preemption(), pytest.raises(Preempted):
        source.examples("train")
    assert len(made) == 1
    monkeypatch.setattr(Example, "segments", asking)
    with Preemption(), pytest.raises(Preempted):
        write(examples, byte_level())
    assert len(made) == 2


def test_a_bar_that_may_be_left_is_left_and_one_that_saves_first_is_not() -> None:
    with Preemption() as preemption:
        signal.raise_signal(signal.SIGTERM)
        with progress_bar("steps", 2, may_leave=False) as advance:
            advance(1)
        with (
            pytest.raises(Preempted, match=r"^asked to leave by SIGTERM; run it again to go on$"),
            progress_bar("x", 2) as advance,
        ):
            advance(1)
        preemption.agree = lambda mine: False  # another process has not heard of it
        leave_if_asked()
        leave_if_asked(together=True)
        preemption.agree = lambda mine: True
        leave_if_asked()
        with pytest.raises(Preempted):
            leave_if_asked(together=True)
    leave_if_asked()


def test_a_second_interrupt_is_not_waited_with(capsys: pytest.CaptureFixture[str]) -> None:
    with Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.to_leave
        assert capsys.readouterr().err == (
            "kv-align: leaving as soon as what is under way is saved; Ctrl-C again to leave at once\n"
        )
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_before_the_run_notes_it_is_one_line(tmp_path: Path) -> None:
    script = (
        "import signal, sys\nsys.argv = ['train']\nfrom kv_align import train\n"
        "train.train = lambda config, path: signal.raise_signal(signal.SIGINT)\ntrain.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (75, "kv-align: interrupted; run the same command again to go on\n")
