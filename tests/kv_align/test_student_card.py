"""The card beside a student says what it is, and the hub gets both where one is named; a hub that fails ends no run."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from kv_align.config.config import HubConfig
from kv_align.experiment.experiment import run as do_run
from kv_align.experiment.student_card import push_to_hub, student_card
from kv_align.runs.run_dir import RunDirectory, read_json
from tests.short_runs import short_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = RunDirectory(tmp_path_factory.mktemp("card"))
    assert do_run(short_config("trainer.max_steps=3", "arm=mine", "seed=3"), directory.path) == "finished"
    return directory


def test_the_card_says_what_taught_the_student_and_how_and_what_came_out(run: RunDirectory) -> None:
    card = ModelCard.load(run.student / "README.md")
    summary = read_json(run.summary_file)
    assert summary is not None
    assert card.data.library_name == "transformers"
    assert "kv-align" in card.data.tags
    assert card.data.base_model is None
    assert "# A student taught by the embedded model of kv-align" in card.text
    for line in ("arm: mine", "loss: kv", "aligner: structured", "steps: 3", "seed: 3"):
        assert f"\n{line}\n" in card.text
    assert f"| validation perplexity | {summary['validation_perplexity']:.3f} |" in card.text
    assert f"content_hash: {summary['content_hash']}" in card.text
    assert "a single run, which shows nothing of a method" in card.text
    assert "## Licence" in card.text


def test_a_name_on_the_hub_is_the_base_and_a_folder_of_this_machine_is_not_told(
    run: RunDirectory, tmp_path: Path
) -> None:
    summary = read_json(run.summary_file)
    assert summary is not None
    config = short_config("arm=mine")
    named = config.model.model_copy(
        update={"student": "Qwen/Qwen2.5-0.5B", "student_start": "pretrained", "teacher": str(tmp_path)}
    )
    text = student_card(config.model_copy(update={"model": named}), run, summary)
    assert "base_model: Qwen/Qwen2.5-0.5B" in text
    assert str(tmp_path.parent) not in text
    assert f"a local model ({tmp_path.name})" in text


class FakeHub(BaseHTTPRequestHandler):
    """What the client asks of the hub to make a repository and to commit files to it."""

    committed: dict[str, bytes]
    made: dict[str, object]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/api/repos/create":
            type(self).made = json.loads(body)
            self._answer({"url": f"http://{self.headers['Host']}/me/mine"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._answer(
                {"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]}
            )
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.committed[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = f"http://{self.headers['Host']}/me/mine/commit/1"
            self._answer({"commitOid": "1" * 40, "commitUrl": commit, "success": True})
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        self._answer({"id": "me/mine", "sha": "0" * 40, "siblings": []})

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def _answer(self, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[str]:
    FakeHub.committed, FakeHub.made = {}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def push(folder: Path, endpoint: str, home: Path) -> str:
    """Push in a process of its own: the client reads the hub's address when it is imported."""
    code = (
        "import logging, sys; logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "from kv_align.config.config import HubConfig; from kv_align.experiment.student_card import push_to_hub\n"
        "push_to_hub(__import__('pathlib').Path(sys.argv[1]), HubConfig(repo='me/mine'))"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_x",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
    }
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_hub_gets_the_student_and_its_card(run: RunDirectory, hub: str, tmp_path: Path) -> None:
    assert "hub.repo=me/mine holds the student and its card" in push(run.student, hub, tmp_path)
    assert FakeHub.committed == {each.name: each.read_bytes() for each in run.student.iterdir()}
    assert (FakeHub.made["name"], FakeHub.made["visibility"]) == ("mine", "private")


def test_a_hub_that_cannot_be_reached_ends_no_run_and_nothing_is_pushed_by_default(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    push_to_hub(run.student, HubConfig(repo="me/mine"))  # offline, as all tests are
    assert f"later: hf upload me/mine {run.student}" in caplog.text
    caplog.clear()
    push_to_hub(run.student, HubConfig())
    assert caplog.text == ""
