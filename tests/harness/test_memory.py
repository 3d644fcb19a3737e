"""memory.py: the forecast matches the tensors that a run creates."""

import copy
import json
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, config_of, make_prompts
from pretended_gpu import FAST_FORMS, PretendedGPU, reserved_bytes
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from config import workload_of
from engine import fastpath, sampling, scoring
from engine.fastpath import prepare_gpu
from engine.loading import Loaded, add_adapter, load, trainable, use_own_attention
from engine.passes import PassSize
from engine.prompts import Prompts
from engine.sizes import GIB, shape_config
from harness.memory import (
    LORA_RANK,
    Estimate,
    Workload,
    cache_bytes,
    estimate,
    flags_that_fit,
    memory_table,
    minimum_bytes,
    peaks,
    resident_bytes,
    trained_bytes,
)
from main import make_optimizer, make_sampler, take_step
from shapes import make_example

DEFAULT = Workload(
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
    sizes = resident_bytes(workload_of(config))
    loaded = load(TINY, device="cpu", dtype=dtype, reference=True)
    optimizer = make_optimizer(config, loaded.policy)
    for parameter in loaded.policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = bytes_of(p.grad for p in loaded.policy.parameters())
    assert trained_bytes(workload_of(config)) == gradients
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert sizes["optimizer"] == bytes_of(tensor for tensor in states if tensor is not None)
    assert sizes["weights"] == bytes_of(loaded.policy.parameters())
    assert sizes["reference"] == bytes_of(loaded.reference.parameters())
    assert resident_bytes(replace(workload_of(config), reference=False))["reference"] == 0
    assert minimum_bytes(workload_of(config)) == sum(sizes.values()) + gradients


@pytest.mark.parametrize("flags", [["--lora-rank", "4"], ["--freeze-vision"]])
def test_what_is_not_trained_takes_its_weights_only(flags):
    config = config_of("--preset", "tiny", "--device", "cpu", *flags)
    workload, sizes = workload_of(config), resident_bytes(workload_of(config))
    options = {"lora_rank": config.lora_rank, "freeze_vision": config.freeze_vision}
    loaded = load(TINY, device="cpu", dtype="float32", reference=True, **options)
    moved = bytes_of(trainable(loaded.policy))
    assert trained_bytes(workload) == moved < sizes["weights"]
    assert sizes["optimizer"] == 2 * moved
    assert sizes["reference"] == (0 if config.lora_rank else sizes["weights"])
    assert estimate(workload, free=None).sizes["vision tower"] == 0


def test_smaller_passes_do_not_shrink_what_the_vision_tower_keeps():
    """The tower encodes all images of a step at once, and keeps activations until the last pass."""
    workload = workload_of(config_of("--preset", "tiny", "--device", "cpu"))
    whole, parts = (
        estimate(replace(workload, micro_batch=size), free=None).sizes["vision tower"]
        for size in (8, 1)
    )
    assert parts == whole > 0


def test_the_key_value_cache_is_that_of_the_sampler(processor):
    flags = ["--preset", "tiny", "--device", "cpu", "--max-new-tokens", "16", "--image-size", "84"]
    config = config_of(*flags)
    loaded = load(TINY, device="cpu", dtype="float32")
    sampler = make_sampler(config, loaded)
    prompts = make_prompts(processor, 3)
    sampler.generate(prompts, group_size=4, temperature=0.0)
    buffers = bytes_of(tensor for cache in sampler.caches for tensor in (cache.keys, cache.values))
    workload = replace(workload_of(config), prompts_per_step=3, group_size=4)
    more_text = workload.prompt_tokens - prompts.input_ids.shape[1]
    assert more_text > 0  # the forecast assumes Qwen's vocabulary
    slots = -(-(workload.prompt_tokens + 16) // 8) * 8
    assert cache_bytes(workload) * sampler.caches[0].keys.shape[2] == buffers * slots


def test_the_default_run_by_hand():
    """8.292 billion parameters of 2 bytes; 28 layers with 4 heads of 128, 32 rows of 712 slots."""
    weights, sizes = 2 * 8_292_166_656, resident_bytes(DEFAULT)
    assert sizes["weights"] == sizes["reference"] == trained_bytes(DEFAULT) == weights
    assert sizes["optimizer"] == 3 * weights  # two moments and Kahan's compensation, bf16
    assert sizes["key-value cache"] == 32 * 712 * 28 * 2 * 4 * 128 * 2
    assert sum(sizes.values()) < minimum_bytes(DEFAULT) < estimate(DEFAULT, free=None).total


PUBLISHED = {  # the layout of the hub's config.json: language model fields at the top level
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2},
}
PUBLISHED["vision_config"] |= {"out_hidden_size": 64, "patch_size": 14}


@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_in_the_published_layout_is_foreseen(tmp_path, tied):
    """At layer 0 every gradient exists except the tower's and those of untied embeddings."""
    config = PUBLISHED | {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    workload = workload_of(config_of("--model", str(tmp_path), "--device", "cuda"))
    gradients = peaks(workload, kept=0)["of the first layer"]["gradients"]
    without_tower = trained_bytes(replace(workload, freeze_vision=True))
    assert gradients == without_tower - (0 if tied else 2 * 1000 * 64)
    assert estimate(workload, free=None).total > minimum_bytes(workload)


# --- the measured peak ----------------------------------------------------------------------

RAGGED = [50 + round(200 * ((11 * row) % 32) / 31) for row in range(32)]  # mean 150, longest 250
THREE = "Qwen/Qwen2.5-VL-3B-Instruct"


def step_on_gpu(flags: list[str], *, gib: float, processes: int = 1, **lengths) -> PretendedGPU:
    """Take a step at the true shape on a pretended GPU, with completions of maximum length."""
    config = replace(config_of(*flags), device="cuda", dtype="bfloat16")
    lengths = {"length": config.max_new_tokens, **lengths}
    with (
        PretendedGPU(gib=gib, **lengths) as gpu,
        mock.patch.dict(fastpath.VERDICTS, dict.fromkeys(FAST_FORMS, True)),
        mock.patch.object(sampling, "FINISHED_CHECK_EVERY", 2),  # more tokens need no more memory
    ):
        prepare_gpu()
        loaded = random_model(config)
        optimizer = make_optimizer(config, part_of(loaded.policy, processes))
        for parameter in optimizer.param_groups[0]["params"]:  # as after the first step
            optimizer._init_state(optimizer.param_groups[0], optimizer.state[parameter], parameter)
        batch = [
            make_example(config.spec, split="train", index=i, seed=0, image_size=56)
            for i in range(config.prompts_per_step)
        ]
        batches = iter([(batch, true_prompts(config, loaded.policy))])
        pass_size = PassSize(config.micro_batch, config.layers_to_checkpoint)
        gpu.reset_peak()
        take_step(config, 0, batches, make_sampler(config, loaded), loaded, optimizer, pass_size)
    return gpu


def random_model(config) -> Loaded:
    """Return policy and reference, created on the GPU: nothing is copied or initialised."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        policy = Qwen2_5_VLForConditionalGeneration(shape_config(config.model)).eval()
    torch.set_default_dtype(torch.float32)
    policy.generation_config.eos_token_id = [151_645, 151_643]
    use_own_attention(policy)
    processor = AutoProcessor.from_pretrained(TINY)
    if config.lora_rank:
        adapter = add_adapter(policy, config.model, config.lora_rank, seed=0)
        return Loaded(policy.to("cuda"), None, processor, adapter)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None
    policy.model.visual.requires_grad_(not config.freeze_vision)
    return Loaded(policy, reference, processor)


def part_of(policy, processes: int) -> torch.nn.Module:
    """Return the parameters that one process updates: torch shards them by size."""
    shares = {torch.nn.ParameterList(): 0 for _ in range(processes)}
    for parameter in sorted(trainable(policy), key=torch.Tensor.numel, reverse=True):
        least = min(shares, key=shares.get)
        least.append(parameter)
        shares[least] += parameter.numel()
    return next(iter(shares))


def true_prompts(config, policy) -> Prompts:
    """Return prompts of Qwen's length: 129 text tokens, and 64 for an image of 16 x 16 patches."""
    count = config.prompts_per_step
    ids = torch.randint(10, 400, (count, 129 + 64))
    ids[:, 8:72] = policy.config.image_token_id
    is_image = (ids == policy.config.image_token_id).long()
    return Prompts(
        ids, torch.randn(count, 256, 1176), is_image, torch.tensor([[1, 16, 16]] * count)
    )


@pytest.mark.parametrize(
    ("flags", "gib", "processes"),
    [
        (["--checkpoint-layers", "28"], 140, 1),
        (["--lora-rank", "32", "--micro-batch", "2"], 40, 1),
        (["--model", THREE], 80, 1),
        (["--prompts-per-step", "2"], 80, 4),
    ],
)
def test_the_peak_of_a_step_is_foreseen(flags, gib, processes):
    gpu = step_on_gpu(flags, gib=gib, processes=processes)
    workload = workload_of(config_of(*flags, "--device", "cuda", "--dtype", "bfloat16"))
    workload = replace(
        workload, processes=processes, prompts_per_step=workload.prompts_per_step * processes
    )
    found = estimate(workload, free=int(gib * GIB))
    outside = found.sizes["libraries"] + found.sizes["gaps between tensors"]
    assert found.total - outside == pytest.approx(gpu.peak, rel=0.03)
    reserved = reserved_bytes(gpu.history)
    row = [" ".join(flags), processes, *(size / GIB for size in (gpu.peak, reserved))]
    row += [(found.total - outside) / GIB, found.sizes["gaps between tensors"] / GIB]
    print("|", " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in row), "|")
    assert gpu.peak <= reserved <= gpu.peak + found.sizes["gaps between tensors"]


def test_an_h200_keeps_all_layers_of_the_default_step(monkeypatch):
    """4 x 8 completions of 150 tokens on average, the longest of 250: no layer is recomputed."""
    chosen, choose = [], scoring.layers_to_checkpoint
    monkeypatch.setattr(
        scoring, "layers_to_checkpoint", lambda *sizes: chosen.append(choose(*sizes)) or chosen[-1]
    )
    gpu = step_on_gpu([], gib=139.8, length=250, lengths=RAGGED)
    assert chosen == [0]
    assert reserved_bytes(gpu.history) < (139.8 - gpu.context_gib) * GIB


def test_layers_are_kept_as_far_as_memory_allows():
    found = estimate(DEFAULT, free=139 * GIB)
    kept = kept_of(found)
    assert 0 < kept < 28
    assert found.total <= 139 * GIB < estimate(forced(DEFAULT, kept + 3), free=None).total
    assert kept_of(estimate(forced(DEFAULT, 23), free=139 * GIB)) == 23
    assert kept_of(estimate(DEFAULT, free=1000 * GIB)) == 28


def kept_of(found) -> int:
    """Return how many of 28 layers keep their activations."""
    name = next(name for name in found.sizes if name.startswith("decoder layers"))
    return 28 - int(name.split()[2])


def forced(workload: Workload, kept: int) -> Workload:
    return replace(workload, layers_to_checkpoint=28 - kept)


def test_smaller_passes_take_less_unless_gradients_fill_what_they_leave():
    """With all weights trained, earlier passes' gradients exist while the log-probs need memory."""
    adapters = replace(DEFAULT, lora_rank=LORA_RANK)
    for workload, less in ((adapters, True), (forced(DEFAULT, 28), True), (DEFAULT, False)):
        whole, parts = (
            estimate(replace(workload, micro_batch=size), free=None).total for size in (4, 1)
        )
        assert (parts < whole) == less


@pytest.mark.parametrize("gib", [102, 92, 60, 16])
def test_what_would_fit_does(gib):
    flags = flags_that_fit(DEFAULT, gib * GIB)
    changes = {
        "--micro-batch": ("micro_batch", int),
        "--max-new-tokens": ("max_new_tokens", int),
        "--group-size": ("group_size", int),
        "--model": ("model", str),
        "--lora-rank": ("lora_rank", int),
        "--beta": ("reference", lambda value: float(value) > 0),
    }
    words, workload = flags.split(), DEFAULT
    assert estimate(workload, free=None).total > gib * GIB
    for flag, value in zip(words[::2], words[1::2], strict=True):
        name, read = changes[flag]
        workload = replace(workload, **{name: read(value)})
    assert estimate(workload, free=None).total <= gib * GIB


def test_what_would_fit_is_the_least():
    assert flags_that_fit(DEFAULT, 102 * GIB) == "--max-new-tokens 256"
    assert flags_that_fit(DEFAULT, 98 * GIB) == "--beta 0"
    adapters = replace(DEFAULT, lora_rank=LORA_RANK)
    assert flags_that_fit(adapters, 22 * GIB) == "--micro-batch 1"
    assert flags_that_fit(DEFAULT, 60 * GIB) == f"--lora-rank {LORA_RANK}"
    assert flags_that_fit(DEFAULT, 8 * GIB) is None


def test_the_docs_show_what_is_forecast():
    page = (ROOT / "docs" / "running.md").read_text()
    assert memory_table(estimate(DEFAULT, free=None)) in page
    rows = [line.split("|") for line in page.splitlines() if re.match(r"\| [37]B \|", line)]
    assert len(rows) == 7
    for _, model, _, flags, gib, _, _ in rows:
        words = flags.strip().strip("`").split()
        processes = int(words[0]) if "processes" in words else 1
        flags = ["--prompts-per-step", "8"] if processes > 1 else words
        flags = ["--model", THREE, *flags] if "3B" in model else flags
        workload = replace(workload_of(config_of(*flags)), processes=processes)
        assert float(gib) == pytest.approx(estimate(workload, free=None).total / GIB, abs=0.05)


def test_the_table_adds_up():
    lines = memory_table(Estimate("of the tower", {"a": 3 * GIB, "b": GIB // 2})).splitlines()
    assert [line.split() for line in lines] == [
        ["at", "the", "gradient", "of", "the", "tower:"],
        ["a", "3.00", "GiB"],
        ["b", "0.50", "GiB"],
        ["total", "3.50", "GiB"],
    ]
