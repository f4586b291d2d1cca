"""A student of which only an adapter learns: the same run as any other, and a plain model in the end."""

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from kv_align.config.compose import arm_name, compose_config
from kv_align.config.config import Config
from kv_align.config.identity import content_hash
from kv_align.config.model_card import EMBEDDED
from kv_align.config.schema import validate
from kv_align.experiment.choices import make_adapter
from kv_align.experiment.experiment import run as do_run
from kv_align.models.capture.prepare import prepare, record
from kv_align.models.load import LanguageModel, load_student, weights_digest
from kv_align.models.lora import Lora
from kv_align.runs.errors import ConfigError
from kv_align.runs.run_dir import RunDirectory, read_rows
from tests.short_runs import results, short_config
from tests.tiny import make_llama

CPU = torch.device("cpu")
LORA = ("adapter=lora", "model.student_start=pretrained")
OPTIONS: dict[str, Any] = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": None}
IDS = torch.arange(1, 25).reshape(2, 12)


def student(*overrides: str) -> LanguageModel:
    config = short_config(*LORA, *overrides)
    return load_student(config.model, config.seed, CPU, make_adapter(config))


def plain() -> LanguageModel:
    config = short_config(*LORA)
    return load_student(config.model, config.seed, CPU)


def moved(reader: LanguageModel) -> LanguageModel:
    """The same, as if it had learned: without it B is zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in reader.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return reader


# The start


def test_it_starts_as_the_student_itself_and_only_its_own_parameters_learn() -> None:
    ours, theirs = student(), plain()
    with torch.no_grad():
        assert torch.equal(ours.model.eval()(IDS).logits, theirs.model.eval()(IDS).logits)
    learning = {name for name, each in ours.model.named_parameters() if each.requires_grad}
    assert learning == {
        f"model.layers.{layer}.self_attn.{module}.lora_{matrix}.default.weight"
        for layer in range(3)
        for module in ("q_proj", "v_proj")
        for matrix in "AB"
    }


def test_its_start_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = weights_digest(student().model)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert weights_digest(student("aligner=flat", "loss=kv+struct").model) == first
    assert weights_digest(student("seed=1").model) != first


# Gradient


def kv_gradients(*, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Gradient of a loss on recorded keys and values alone, by parameter."""
    model = moved(student(f"model.gradient_checkpointing={str(checkpointing).lower()}")).model.train()
    model.zero_grad()
    kv_loss(model).backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    assert all(each.requires_grad for name, each in model.named_parameters() if name in found)
    return found


def kv_loss(model: nn.Module) -> torch.Tensor:
    with record() as recorder:
        model(input_ids=IDS, use_cache=False)
    return recorder.keys(rotated=False).square().mean() + recorder.values().pow(3).mean()


def test_the_gradient_of_keys_and_values_reaches_it_with_and_without_checkpointing() -> None:
    without, with_checkpointing = kv_gradients(checkpointing=False), kv_gradients(checkpointing=True)
    expected = {name for name, each in student().model.named_parameters() if each.requires_grad}
    # Queries of the last layer are behind all keys and values.
    assert set(without) == {name for name in expected if "layers.2.self_attn.q_proj" not in name}
    assert without.keys() == with_checkpointing.keys()
    for name, gradient in without.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(with_checkpointing[name], gradient, rtol=1e-4, atol=1e-7), name


def test_that_gradient_is_the_slope_of_the_loss() -> None:
    model = moved(student()).model.double()  # whose norms still compute in single precision
    kv_loss(model).backward()
    parameter = model.get_parameter("model.layers.0.self_attn.v_proj.lora_A.default.weight")
    assert parameter.grad is not None
    place = divmod(int(parameter.grad.abs().argmax()), parameter.shape[1])
    losses = []
    for step in (1e-2, -2e-2):
        parameter.data[place] += step
        losses.append(kv_loss(model).item())
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(parameter.grad[place].item(), rel=1e-3)


# The end


def adapted(folder: Path) -> PeftModel:
    """The student that it started from with what was saved, as PEFT loads it."""
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED / "student", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT's own
        return PeftModel.from_pretrained(base, str(folder)).eval()


def test_merged_it_is_a_plain_student_with_the_same_logits(tmp_path: Path) -> None:
    reader = moved(student("adapter.target_modules=[k_proj,v_proj,down_proj]"))
    assert reader.adapter is not None
    with torch.no_grad():
        unmerged = reader.model.eval()(IDS).logits
        reader.adapter.save(tmp_path / "adapter")
        reader.adapter.merge()
        merged = reader.model(IDS).logits
    theirs = plain().model
    assert (unmerged - theirs.eval()(IDS).logits).abs().max() > 1  # it is not the student that it started from
    assert torch.allclose(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert reader.model.state_dict().keys() == theirs.state_dict().keys()
    reader.model.save_pretrained(tmp_path / "student")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "student")(IDS).logits, merged)
        assert torch.equal(adapted(tmp_path / "adapter")(IDS).logits, unmerged)


# Runs

RUN = (*LORA, "loss=kv+struct", "adapter.dropout=0.25", "adapter.target_modules=[k_proj,v_proj]", "trainer.lr=1e-3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    directory = RunDirectory(tmp_path_factory.mktemp("lora") / "run")
    assert do_run(short_config(*RUN), directory.path) == "finished"
    return directory


def test_a_run_moves_its_targets_and_nothing_else(finished: RunDirectory) -> None:
    assert all(row["kv_grad_norm"] > 0 for row in read_rows(finished.metrics_file))
    ours = load_file(finished.student / "model.safetensors")
    theirs = load_file(EMBEDDED / "student" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    changed = {name for name in ours if not torch.equal(ours[name], theirs[name].float())}
    assert changed == {f"model.layers.{n}.self_attn.{m}.weight" for n in range(3) for m in ("k_proj", "v_proj")}


def test_a_run_leaves_its_adapter_beside_the_merged_student(finished: RunDirectory) -> None:
    merged = AutoModelForCausalLM.from_pretrained(finished.student)
    with torch.no_grad():
        unmerged = adapted(finished.student_adapter)(IDS).logits
        assert torch.allclose(merged(IDS).logits, unmerged, rtol=1e-4, atol=1e-4)
    summary = json.loads(finished.summary_file.read_text())
    assert "student_adapter/adapter_model.safetensors" in summary["artefacts"]
    assert finished.is_complete()


def test_provenance_tells_what_learned(finished: RunDirectory) -> None:
    provenance = json.loads(finished.provenance_file.read_text())
    learning = 3 * 2 * 16 * (96 + 32)  # layers, targets, rank, width in and out
    total = sum(each.numel() for each in plain().model.parameters())
    assert provenance["parameters"]["student_trainable"] == learning
    assert provenance["parameters"]["student"] == total + learning
    assert provenance["attempts"][-1]["extras"] == {"peft": importlib.import_module("peft").__version__}


def test_a_run_that_goes_on_ends_in_the_same_numbers(finished: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(finished.path, copy.path)
    shutil.rmtree(copy.checkpoints / "step_00000006")
    for left in (copy.student, copy.student_adapter, copy.aligner):
        shutil.rmtree(left)
    copy.summary_file.unlink()
    assert do_run(short_config(*RUN), copy.path) == "finished"
    assert results(copy) == results(finished)
    adapters = [each.student_adapter / "adapter_model.safetensors" for each in (copy, finished)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_peft_is_not_imported_where_it_is_not_asked_for() -> None:
    script = (
        "import sys, torch, kv_align.experiment.experiment\n"
        "from kv_align.config.compose import compose_config\n"
        "from kv_align.models.load import load_student\n"
        "config = compose_config(['model.student_start=pretrained'])[0]\n"
        "load_student(config.model, 0, torch.device('cpu'))\n"
        "print([name for name in ('peft', 'bitsandbytes') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Configuration


def test_without_an_adapter_a_run_is_what_it_was_before_there_were_any() -> None:
    raw = short_config().model_dump(by_alias=True)
    del raw["adapter"]
    before = validate(Config, raw)
    assert content_hash(before) == content_hash(short_config())
    assert len({content_hash(short_config(*LORA, f"adapter.rank={rank}")) for rank in (4, 8)}) == 2


def test_it_is_part_of_an_arms_name() -> None:
    assert arm_name(short_config(*LORA)) == "structured-uniform-lora"
    assert arm_name(short_config(*LORA, "loss=ce")) == "ce-lora"


def test_a_student_from_scratch_is_refused() -> None:
    with pytest.raises(ConfigError) as refused:
        compose_config(["adapter=lora"])
    assert str(refused.value) == (
        "adapter=lora is not allowed with model.student_start=scratch: the weights that it would freeze have learned "
        "nothing; use model.student_start=pretrained or adapter=none."
    )


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(ConfigError) as refused:
        compose_config([*LORA])
    assert str(refused.value) == (
        "adapter=lora is not allowed: the package peft is not installed; install kv-align[lora] or use adapter=none."
    )
    compose_config([])


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("rank=0", "adapter.rank=0 is not allowed: set adapter.rank to a number above 0."),
        ("dropout=1.0", "adapter.dropout=1.0 is not allowed: set adapter.dropout to a number below 1."),
        ("target_modules=[]", "adapter.target_modules=[] is not allowed: set it"),
        (
            "target_modules=k_proj",
            "adapter.target_modules=k_proj is not allowed: set adapter.target_modules to a list.",
        ),
        ("ranks=4", "adapter.ranks is an unknown key"),
    ],
)
def test_bad_options_are_refused_before_anything_is_loaded(option: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose_config([*LORA, f"++adapter.{option}"])
    assert str(refused.value).startswith(sentence.split(": set it")[0])


def test_targets_that_are_not_there_are_named_with_those_that_are() -> None:
    with pytest.raises(ConfigError) as refused:
        student("adapter.target_modules=[v_proj,c_attn]")
    assert str(refused.value) == (
        "lora: target_modules=c_attn is not allowed: LlamaForCausalLM has no linear module of that name; use some of "
        "down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj."
    )


def test_a_weight_that_is_also_the_embeddings_is_refused() -> None:
    with pytest.raises(ConfigError, match="target_modules=lm_head is not allowed: its weight is the input embedding's"):
        student("adapter.target_modules=[lm_head]")
    Lora(make_llama(), 0, **{**OPTIONS, "target_modules": ["lm_head"]})  # whose weights are two


def test_a_family_without_a_choice_of_pefts_needs_its_targets() -> None:
    model = make_llama()
    model.config.model_type = "of_nobody"
    with pytest.raises(
        ValueError, match="target_modules=null is not allowed: PEFT has no choice for of_nobody; set it"
    ):
        Lora(model, 0, **OPTIONS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    ],
    ids=["fused, weights the other way round", "without an attention function"],
)
def test_other_families_are_recorded_and_merged_too(make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    adapter = Lora(model, 3, **OPTIONS)
    prepare(model, "student")
    with record() as recorder:
        before = model.eval()(IDS, use_cache=False).logits
    gradients = torch.autograd.grad(
        recorder.keys(rotated=False).sum() + recorder.values().square().sum(),
        [each for each in model.parameters() if each.requires_grad],
    )
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    adapter.merge()
    assert torch.allclose(model(IDS).logits, before, atol=1e-5)
