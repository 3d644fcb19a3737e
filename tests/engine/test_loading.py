"""policy.py: prompts, loading, and what a machine without the means is told."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_prompts, stock
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from engine import loading as policy
from engine.loading import (
    ModelError,
    embed_prompts,
    encode,
    encode_text,
    load,
    parameter_count,
    place,
    shape_config,
    use_own_attention,
)
from rewards import SYSTEM_MESSAGE, make_prompt
from shapes import ShapeSpec, make_example

# --- prompts ------------------------------------------------------------------------------


def test_images_of_two_sizes_are_refused(processor):
    images = [
        make_example(ShapeSpec(), seed=0, split="train", index=0, image_size=size).image
        for size in (84, 112)
    ]
    with pytest.raises(ValueError, match="one size"):
        encode(processor, images, system="s", prompt="p")


def test_a_224_pixel_image_is_64_tokens(processor):
    example = make_example(ShapeSpec(), seed=0, split="train", index=0)
    prompts = encode(processor, [example.image], system="s", prompt="p")
    image_token = AutoConfig.from_pretrained(TINY).image_token_id
    assert (prompts.input_ids == image_token).sum() == 64


def test_prompts_are_what_the_processor_makes_of_whole_chats(processor):
    """Text is tokenized once for all images; the processor, given all at once, makes the same."""
    examples = [make_example(ShapeSpec(), seed=0, split="train", index=i) for i in range(3)]
    images = [example.image for example in examples]
    chats = [
        [
            {"role": "system", "content": SYSTEM_MESSAGE},
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": make_prompt()}],
            },
        ]
        for _ in images
    ]
    text = processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    whole = processor(text=text, images=images, return_tensors="pt")
    own = encode(processor, images, system=SYSTEM_MESSAGE, prompt=make_prompt())
    assert torch.equal(own.input_ids, whole["input_ids"])
    assert torch.equal(own.mm_token_type_ids, whole["mm_token_type_ids"])
    assert torch.equal(own.pixel_values.flatten(0, 1), whole["pixel_values"])
    assert torch.equal(own.image_grid_thw, whole["image_grid_thw"])


def test_the_text_is_tokenized_once(processor):
    make_prompts(processor, 2)
    before = encode_text.cache_info().misses
    make_prompts(processor, 3)
    assert encode_text.cache_info().misses == before


@pytest.mark.parametrize("size", [224, 84, 140])  # 4 equal windows an image; one; 4 unequal ones
def test_embeddings_and_positions_are_those_of_transformers(model, processor, size):
    images = [
        make_example(ShapeSpec(), seed=1, split="train", index=i, image_size=size).image
        for i in range(3)
    ]
    prompts = encode(processor, images, system=SYSTEM_MESSAGE, prompt=make_prompt())
    twin = stock(model).model
    embeds, positions, first = embed_prompts(model, prompts)
    features = twin.get_image_features(prompts.pixel_values.flatten(0, 1), prompts.image_grid_thw)
    expected = twin.get_input_embeddings()(prompts.input_ids)
    is_image = prompts.input_ids == model.config.image_token_id
    expected[is_image] = torch.cat(list(features.pooler_output))
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-12)
    stock_positions, delta = twin.get_rope_index(
        prompts.input_ids, prompts.mm_token_type_ids, image_grid_thw=prompts.image_grid_thw
    )
    assert torch.equal(positions, stock_positions)
    assert torch.equal(first, prompts.input_ids.shape[1] + delta)
    assert (delta < 0).all()  # an image takes fewer positions than it has tokens


# --- loading ------------------------------------------------------------------------------


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
        (lambda at: replace_weight(at, None), "1 weights are missing, as .*layers.0.mlp.gate_proj"),
        (lambda at: (at / "config.json").unlink(), "no readable model in this folder"),
        (lambda at: (at / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda at: (at / "config.json").write_text("{}"), "is a nameless model, not qwen2_5_vl"),
        (lambda at: (at / "config.json").write_text("[]"), "config.json: holds no object"),
        (lambda at: (at / "tokenizer.json").unlink(), "the tokenizer is incomplete"),
        (lambda at: (at / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda at: (at / "generation_config.json").write_text("{"), "cannot be read"),
        (
            lambda at: (at / "generation_config.json").write_text('{"eos_token_id": "x"}'),
            "no eos_token_id",
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
    with pytest.raises(ModelError, match="there are no weights in it"):
        load(str(folder), device="cpu", dtype="float32")


def test_a_model_with_sliding_windows_is_refused(model):
    model.config.text_config.layer_types[0] = "sliding_attention"
    with pytest.raises(ModelError, match="slides over a window"):
        use_own_attention(model)


def test_parameter_counts():
    model = load(TINY, device="cpu", dtype="float32").policy
    assert parameter_count(shape_config(TINY)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "parameters"),  # as the hub counts them
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    ],
)
def test_the_shapes_known_without_a_download(model, parameters):
    assert parameter_count(shape_config(model)) == parameters


def test_a_machine_without_gpu_is_told_what_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError) as refusal:
        place(
            "Qwen/Qwen2.5-VL-7B-Instruct",
            trained=8_292_166_656,
            reference=True,
            command_that_runs="python main.py --preset tiny",
        )
    gib = 8_292_166_656 * 12 / 2**30  # bf16: weight, gradient, Kahan, two moments, reference
    message = str(refusal.value)
    assert f"{gib:.1f} GiB" in message
    assert "no CUDA GPU" in message
    assert "python main.py --preset tiny" in message
    assert "\n" not in message


def test_too_little_memory_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(policy, "free_memory", lambda device: (1000, 2000))
    with pytest.raises(ModelError, match=r"found: 0\.0 GiB free on cpu"):
        place(TINY, command_that_runs="nothing")


def test_a_small_model_goes_to_the_cpu_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place(TINY, trained=1000, command_that_runs="") == ("cpu", "float32")


def test_models_that_cannot_be_used(tmp_path):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    AutoConfig.from_pretrained(TINY).save_pretrained(tmp_path / "no_weights")
    (tmp_path / "empty").mkdir()
    cases = {
        str(tmp_path / "missing"): "no such folder",
        str(tmp_path / "empty"): "no readable model in this folder",
        str(tmp_path / "llama"): "is a llama model, not qwen2_5_vl",
        str(tmp_path / "no_weights"): "cannot be loaded",
    }
    for model, reason in cases.items():
        with pytest.raises(ModelError, match=reason) as refusal:
            load(model, device="cpu", dtype="float32")
        assert "\n" not in str(refusal.value)
