"""memory.py: the foreseen sizes are those of the tensors that a run makes."""

from dataclasses import replace

import pytest
import torch
from conftest import TINY, config_of, make_prompts

from main import make_optimizer, make_sampler, work_of
from memory import EXACT, LORA_RANK, Work, cache_bytes, estimate, table, what_would_fit
from policy import GIB, load, trainable
from scoring import activation_bytes

DEFAULT = Work(
    model="Qwen/Qwen2.5-VL-7B-Instruct",
    device="cuda",
    dtype="bfloat16",
    prompts_per_step=4,
    group_size=8,
    max_new_tokens=512,
    image_size=224,
    micro_batch=4,
    layers_to_checkpoint=None,
    reference=True,
)


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_gradients_optimizer_and_reference_are_exact(dtype):
    config = config_of("--preset", "tiny", "--device", "cpu", "--dtype", dtype)
    sizes = estimate(work_of(config), free=None)
    loaded = load(TINY, device="cpu", dtype=dtype, reference=True)
    optimizer = make_optimizer(config, loaded.policy)
    for parameter in loaded.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert sizes["gradients"] == bytes_of(p.grad for p in loaded.policy.parameters())
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert sizes["optimizer"] == bytes_of(tensor for tensor in states if tensor is not None)
    assert sizes["weights"] == bytes_of(loaded.policy.parameters())
    assert sizes["reference"] == bytes_of(loaded.reference.parameters())
    assert estimate(replace(work_of(config), reference=False), free=None)["reference"] == 0


@pytest.mark.parametrize("flags", [["--lora-rank", "4"], ["--freeze-vision"]])
def test_what_is_not_trained_takes_its_weights_only(flags):
    config = config_of("--preset", "tiny", "--device", "cpu", *flags)
    sizes = estimate(work_of(config), free=None)
    options = {"lora_rank": config.lora_rank, "freeze_vision": config.freeze_vision}
    loaded = load(TINY, device="cpu", dtype="float32", reference=True, **options)
    moved = bytes_of(trainable(loaded.policy))
    assert sizes["gradients"] == moved < sizes["weights"]
    assert sizes["optimizer"] == 2 * moved
    assert sizes["reference"] == (0 if config.lora_rank else sizes["weights"])
    assert sizes["vision tower"] == 0


def test_smaller_passes_do_not_shrink_what_the_vision_tower_keeps():
    """It sees a step's images at once, and keeps that until the last pass is done."""
    work = work_of(config_of("--preset", "tiny", "--device", "cpu"))
    whole, parts = (estimate(replace(work, micro_batch=size), free=None) for size in (8, 1))
    assert parts["vision tower"] == whole["vision tower"] > 0


def test_the_key_value_cache_is_that_of_the_sampler(processor):
    flags = ["--preset", "tiny", "--device", "cpu", "--max-new-tokens", "16", "--image-size", "84"]
    config = config_of(*flags)
    loaded = load(TINY, device="cpu", dtype="float32")
    sampler = make_sampler(config, loaded)
    prompts = make_prompts(processor, 3)
    sampler.generate(prompts, group_size=4, temperature=0.0)
    buffers = bytes_of(tensor for cache in sampler.caches for tensor in (cache.keys, cache.values))
    work = replace(work_of(config), prompts_per_step=3, group_size=4)
    more_text = work.prompt_tokens - prompts.input_ids.shape[1]
    assert more_text > 0  # the estimate is for Qwen's vocabulary
    slots = -(-(work.prompt_tokens + 16) // 8) * 8
    assert cache_bytes(work) * sampler.caches[0].keys.shape[2] == buffers * slots


def test_the_default_run_by_hand():
    """8.292 billion parameters, 2 bytes each; 28 layers of 4 heads of 128 for 32 rows of 776."""
    sizes = estimate(DEFAULT, free=None)
    weights = 2 * 8_292_166_656
    assert sizes["weights"] == sizes["gradients"] == sizes["reference"] == weights
    assert sizes["optimizer"] == 3 * weights  # two moments and the compensation, bf16
    assert sizes["key-value cache"] == 32 * 776 * 28 * 2 * 4 * 128 * 2
    tokens = 4 * 264 + 32 * 512
    layers = sizes["decoder layers, 28 of 28 checkpointed"]
    assert layers == tokens * (28 * 3584 * 2 + 2 * (4 * 18_944 + 15 * 3584))
    assert 100 * GIB < sum(sizes.values()) < 120 * GIB
    assert sum(sizes[name] for name in EXACT) < sum(sizes.values())


def test_layers_are_kept_as_far_as_memory_allows():
    free = 139 * GIB
    sizes = estimate(DEFAULT, free=free)
    name = next(name for name in sizes if name.startswith("decoder layers"))
    checkpointed = int(name.split()[2])
    assert 0 < checkpointed < 28
    assert sum(sizes.values()) <= free
    per_layer = (4 * 264 + 32 * 512) * activation_bytes(DEFAULT.config.text_config, torch.bfloat16)
    assert sum(sizes.values()) + per_layer > 0.85 * free - per_layer
    asked = estimate(replace(DEFAULT, layers_to_checkpoint=5), free=free)
    assert "decoder layers, 5 of 28 checkpointed" in asked
    assert "decoder layers, 0 of 28 checkpointed" in estimate(DEFAULT, free=1000 * GIB)


def test_smaller_passes_take_less():
    whole, parts = (
        sum(estimate(replace(DEFAULT, micro_batch=size), free=None).values()) for size in (4, 1)
    )
    assert parts < whole


@pytest.mark.parametrize("gib", [104, 92, 60, 16])
def test_what_would_fit_does(gib):
    flags = what_would_fit(DEFAULT, gib * GIB)
    changes = {
        "--micro-batch": ("micro_batch", int),
        "--max-new-tokens": ("max_new_tokens", int),
        "--group-size": ("group_size", int),
        "--model": ("model", str),
        "--lora-rank": ("lora_rank", int),
        "--beta": ("reference", lambda value: float(value) > 0),
    }
    words, work = flags.split(), DEFAULT
    assert sum(estimate(work, free=None).values()) > gib * GIB
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name, read = changes[flag]
        work = replace(work, **{name: read(value)})
    assert sum(estimate(work, free=None).values()) <= gib * GIB


def test_what_would_fit_is_the_least():
    assert what_would_fit(DEFAULT, 104 * GIB) == "--micro-batch 1"
    assert what_would_fit(DEFAULT, 60 * GIB) == f"--lora-rank {LORA_RANK}"
    assert what_would_fit(DEFAULT, 8 * GIB) is None


def test_the_table_adds_up():
    lines = table({"a": 3 * GIB, "b": GIB // 2}).splitlines()
    assert [line.split() for line in lines] == [
        ["a", "3.00", "GiB"],
        ["b", "0.50", "GiB"],
        ["total", "3.50", "GiB"],
    ]
