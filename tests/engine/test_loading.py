"""loading.py: models that load, and models that are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from engine.loading import load, use_own_attention
from engine.model_files import ModelError


def test_load_gives_a_frozen_equal_reference():
    loaded = load(TINY, device="cpu", dtype="float32", reference=True)
    pairs = zip(loaded.policy.parameters(), loaded.reference.parameters(), strict=True)
    assert all(torch.equal(p, r) and not r.requires_grad and p.requires_grad for p, r in pairs)
    assert load(TINY, device="cpu", dtype="float32").reference is None


def test_bf16_loading_keeps_the_rotary_frequencies_in_fp32():
    model = load(TINY, device="cpu", dtype="bfloat16").policy
    assert model.dtype == torch.bfloat16
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def replace_weight(folder: Path, value: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.gate_proj.weight"))
    weights[name] = value
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda at: replace_weight(at, None),
            "1 weights are missing, e.g. .*layers.0.mlp.gate_proj",
        ),
        (lambda at: (at / "config.json").unlink(), "no config.json in this folder"),
        (lambda at: (at / "config.json").write_text("{"), "config.json: cannot be read"),
        (
            lambda at: (at / "config.json").write_text("{}"),
            "model_type is missing, must be qwen2_5_vl",
        ),
        (lambda at: (at / "config.json").write_text("[]"), "config.json: is not a JSON object"),
        (lambda at: (at / "tokenizer.json").unlink(), "the tokenizer is incomplete"),
        (lambda at: (at / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda at: (at / "generation_config.json").write_text("{"), "cannot be read"),
        (
            lambda at: (at / "generation_config.json").write_text('{"eos_token_id": "x"}'),
            "no valid eos_token_id",
        ),
        (lambda at: (at / "processor_config.json").unlink(), "cannot be loaded"),
        (lambda at: (at / "chat_template.jinja").write_text("{{ broken"), "cannot be loaded"),
        (lambda at: (at / "chat_template.jinja").write_text("no image"), "cannot be loaded"),
    ],
)
def test_a_damaged_folder_is_told_in_one_line(tmp_path, damage, told):
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    damage(folder)
    with pytest.raises(ModelError, match=told) as refusal:
        load(str(folder), device="cpu", dtype="float32")
    assert len(str(refusal.value).splitlines()) == 1


def test_pickled_weights_are_refused(tmp_path):
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no weights"):
        load(str(folder), device="cpu", dtype="float32")


def test_a_model_with_sliding_windows_is_refused(model):
    model.config.text_config.layer_types[0] = "sliding_attention"
    with pytest.raises(ModelError, match="sliding-window attention"):
        use_own_attention(model)


def test_models_that_cannot_be_used(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    AutoConfig.from_pretrained(TINY).save_pretrained(tmp_path / "no_weights")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "missing"): "no such folder",
        str(tmp_path / "empty"): "no config.json in this folder",
        str(tmp_path / "llama"): "model_type is llama, must be qwen2_5_vl",
        str(tmp_path / "no_weights"): "cannot be loaded",
    }
    for model, reason in cases.items():
        with pytest.raises(ModelError, match=reason) as refusal:
            load(model, device="cpu", dtype="float32")
        assert "\n" not in str(refusal.value)
