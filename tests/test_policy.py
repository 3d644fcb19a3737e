"""policy.py against stock transformers, in fp64."""

import math

import pytest
import torch
from conftest import TINY, make_prompts, random_completions, stock_logprobs
from transformers import AutoConfig, LlamaConfig, Qwen2_5_VLConfig

import policy
from policy import (
    HUB_PARAMETERS,
    ModelError,
    Prompts,
    completion_logprobs,
    completion_texts,
    draw,
    enable_checkpointing,
    encode,
    generate,
    load,
    make_generator,
    parameter_count,
    place,
    token_logprobs,
)
from shapes import ShapeSpec, make_example

PAD = 0


def sample(model, prompts, **options):
    defaults = {"group_size": 2, "max_new_tokens": 12, "temperature": 0.7, "pad_id": PAD}
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    return generate(model, prompts, generator=generator, **{**defaults, **options})


# --- scoring ------------------------------------------------------------------------------


def test_logprobs_equal_stock_transformers(model, prompts):
    ids, mask = random_completions(prompts)
    logprobs, _ = completion_logprobs(model, prompts, ids, mask, temperature=0.7)
    expected = stock_logprobs(model, prompts, ids, mask, temperature=0.7)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)


def test_each_row_sees_its_own_image(model, prompts):
    ids, mask = random_completions(prompts)
    swapped = Prompts(
        prompts.input_ids,
        prompts.mm_token_type_ids,
        prompts.pixel_values[[1, 0, 2]],
        prompts.image_grid_thw,
    )
    logprobs, _ = completion_logprobs(model, prompts, ids, mask, temperature=1.0)
    other, _ = completion_logprobs(model, swapped, ids, mask, temperature=1.0)
    moved = (logprobs - other).abs().amax(1)
    assert (moved[:4] > 1e-3).all()
    assert (moved[4:] < 1e-12).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_gradients_equal_stock_transformers(model, prompts, checkpointing):
    ids, mask = random_completions(prompts)
    factor = torch.randn(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (stock_logprobs(model, prompts, ids, mask, temperature=0.7) * factor).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        enable_checkpointing(model)
    logprobs, _ = completion_logprobs(model, prompts, ids, mask, temperature=0.7)
    (logprobs * factor).sum().backward()
    assert any(name.startswith("model.visual") for name in expected)
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - expected[name]).norm()
        # the key's bias has no gradient at all in exact arithmetic: softmax ignores a constant
        assert difference <= 1e-9 * expected[name].norm() + 1e-12, name


def test_padding_columns_change_nothing(model, prompts):
    ids, mask = random_completions(prompts)
    wide_ids = torch.nn.functional.pad(ids, (0, 5), value=PAD)
    wide_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    logprobs, entropy = completion_logprobs(model, prompts, ids, mask, temperature=1.0)
    wide, wide_entropy = completion_logprobs(model, prompts, wide_ids, wide_mask, temperature=1.0)
    torch.testing.assert_close(wide[:, :9], logprobs, rtol=0, atol=1e-12)
    torch.testing.assert_close(wide_entropy[:, :9], entropy, rtol=0, atol=1e-12)
    assert not wide[:, 9:].any()


def test_what_stands_behind_the_mask_changes_nothing(model, prompts):
    ids, mask = random_completions(prompts)
    noise = torch.where(mask, ids, 77)
    logprobs, _ = completion_logprobs(model, prompts, ids, mask, temperature=1.0)
    noisy, _ = completion_logprobs(model, prompts, noise, mask, temperature=1.0)
    torch.testing.assert_close(noisy, logprobs, rtol=0, atol=1e-12)


def test_a_sampled_image_token_is_a_token_like_any_other(model, prompts):
    ids, mask = random_completions(prompts)
    ids[0, 3] = model.config.image_token_id
    logprobs, _ = completion_logprobs(model, prompts, ids, mask, temperature=1.0)
    assert torch.isfinite(logprobs).all()
    others = slice(1, None)
    plain = stock_logprobs(model, prompts, ids.masked_fill(ids == ids[0, 3], 5), mask, 1.0)
    torch.testing.assert_close(logprobs[others], plain[others], rtol=0, atol=1e-10)
    torch.testing.assert_close(logprobs[0, :3], plain[0, :3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_token_logprobs_do_not_depend_on_the_chunk(monkeypatch, chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5).double(), torch.randn(11, 5).double()
    targets = torch.randint(11, (7,))
    whole = torch.distributions.Categorical(logits=hidden @ weight.T / 0.5)
    monkeypatch.setattr(policy, "SCORE_CHUNK", chunk)
    logprobs, entropy = token_logprobs(hidden, weight, targets, 0.5)
    torch.testing.assert_close(logprobs, whole.log_prob(targets))
    torch.testing.assert_close(entropy, whole.entropy())


def test_token_logprobs_gradient(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(policy, "SCORE_CHUNK", 2)
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(6, (5,))
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, 0.7)[0], (hidden, weight)
    )


def test_logits_of_bf16_weights_are_fp32(model, processor):
    ids, mask = random_completions(make_prompts(processor, 2))
    low = model.to(torch.bfloat16)
    logprobs, _ = completion_logprobs(low, make_prompts(processor, 2), ids, mask, temperature=1.0)
    assert logprobs.dtype == torch.float32


# --- sampling -----------------------------------------------------------------------------


def test_greedy_ids_equal_transformers_generate(model, prompts):
    own = sample(model, prompts, group_size=2, temperature=0.0)
    stock = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=torch.ones_like(prompts.input_ids),
        mm_token_type_ids=prompts.mm_token_type_ids,
        pixel_values=prompts.pixel_values.flatten(0, 1),
        image_grid_thw=prompts.image_grid_thw,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=PAD,
    )[:, prompts.input_ids.shape[1] :]
    assert len(stock.unique()) > 5
    assert own.ids.tolist() == stock.repeat_interleave(2, 0).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_recorded_logprobs_equal_the_scoring_pass(model, prompts, temperature):
    drawn = sample(model, prompts, group_size=3, temperature=temperature)
    with torch.no_grad():
        scored, _ = completion_logprobs(
            model, prompts, drawn.ids, drawn.mask, temperature=temperature
        )
        elsewhere, _ = completion_logprobs(model, prompts, drawn.ids, drawn.mask, temperature=0.9)
    torch.testing.assert_close(drawn.logprobs, scored, rtol=0, atol=1e-10)
    assert (drawn.logprobs - elsewhere).abs().max() > 1e-2


def test_the_first_stop_token_belongs_to_the_completion(model, prompts):
    free = sample(model, prompts, temperature=0.0, max_new_tokens=10)
    stops = [int(free.ids[0, 4]), int(free.ids[2, 6])]  # of prompts 0 and 1: two stop tokens
    model.generation_config.eos_token_id = stops
    stopped = sample(model, prompts, temperature=0.0, max_new_tokens=10)
    for row, (ids, mask) in enumerate(zip(stopped.ids, stopped.mask, strict=True)):
        ends = [i for i, token in enumerate(free.ids[row].tolist()) if token in stops]
        length = ends[0] + 1 if ends else 10
        assert mask.tolist() == [i < length for i in range(mask.shape[0])]
        assert ids[:length].tolist() == free.ids[row, :length].tolist()
        assert (ids[length:] == PAD).all()
        assert (stopped.logprobs[row, length:] == 0).all()
        assert bool(stopped.truncated[row]) == (not ends)


def test_an_immediate_stop_is_a_completion_of_one_token(model, prompts):
    first = sample(model, prompts, temperature=0.0, max_new_tokens=1).ids.flatten().tolist()
    model.generation_config.eos_token_id = sorted(set(first))
    stopped = sample(model, prompts, temperature=0.0)
    assert stopped.mask.tolist() == [[True]] * 6
    assert not stopped.truncated.any()


def test_sampling_ignores_the_checkpoints_generation_config(model, prompts):
    plain = sample(model, prompts)
    model.generation_config.update(temperature=1e-6, repetition_penalty=5.0, top_k=1, top_p=0.1)
    assert torch.equal(sample(model, prompts).ids, plain.ids)


def test_samples_follow_the_seed_and_rows_differ(model, prompts):
    first, again = sample(model, prompts, seed=1), sample(model, prompts, seed=1)
    assert torch.equal(first.ids, again.ids)
    assert not torch.equal(first.ids, sample(model, prompts, seed=2).ids)
    assert len({tuple(row) for row in first.ids.tolist()}) == 6


def test_random_numbers_are_a_function_of_seed_and_step():
    def first(*numbers):
        return torch.rand(1, generator=make_generator("cpu", *numbers)).item()

    assert len({first(seed, step) for seed in (0, 1) for step in (0, 1)}) == 4
    assert first(1, 0) == first(1, 0)


def test_drawn_tokens_follow_the_softmax():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -3.0])
    draws, temperature = 200_000, 1.5
    token, logprob = draw(logits.expand(draws, -1), temperature, torch.Generator().manual_seed(0))
    expected = (logits / temperature).softmax(-1)
    counts = torch.bincount(token[:, 0], minlength=5)
    chi_square = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi_square < 18.47  # the 99.9 % quantile at 4 degrees of freedom
    torch.testing.assert_close(logprob.exp(), expected[token[:, 0]][:, None])


def test_gradient_checkpointing_does_not_change_what_is_sampled(model, prompts):
    plain = sample(model, prompts)
    enable_checkpointing(model)
    model.train()
    assert torch.equal(sample(model, prompts).ids, plain.ids)


def test_texts_are_what_was_sampled_without_the_stop_token(model, processor, prompts):
    tokens = processor.tokenizer.encode("<answer>12.50</answer><|image_pad|>")
    ids = torch.tensor([[*tokens, 2, PAD], [*tokens, 7, 2]])
    mask = torch.tensor([[True] * (len(tokens) + 1) + [False], [True] * (len(tokens) + 2)])
    completions = policy.Completions(ids, mask, mask.float(), mask[:, 0])
    first, second = completion_texts(processor, completions, [2, 0])
    assert first == "<answer>12.50</answer><|image_pad|>"
    assert second == first + processor.tokenizer.decode([7])


# --- prompts ------------------------------------------------------------------------------


def test_images_of_two_sizes_are_refused(processor):
    images = [
        make_example(ShapeSpec(), seed=0, split="train", index=0, image_size=size).image
        for size in (84, 112)
    ]
    with pytest.raises(ValueError, match="one size"):
        encode(processor, images, system="s", prompt="p", device="cpu")


def test_a_224_pixel_image_is_64_tokens(processor):
    example = make_example(ShapeSpec(), seed=0, split="train", index=0)
    prompts = encode(processor, [example.image], system="s", prompt="p", device="cpu")
    image_token = AutoConfig.from_pretrained(TINY).image_token_id
    assert (prompts.input_ids == image_token).sum() == 64


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


def test_parameter_counts():
    model = load(TINY, device="cpu", dtype="float32").policy
    assert parameter_count(TINY) == sum(p.numel() for p in model.parameters())


def test_the_known_size_of_the_7b_model(tmp_path):
    Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152_064,
            "hidden_size": 3584,
            "intermediate_size": 18_944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
        },
    ).save_pretrained(tmp_path)
    assert parameter_count(str(tmp_path)) == HUB_PARAMETERS["Qwen/Qwen2.5-VL-7B-Instruct"]


def test_a_machine_without_gpu_is_told_what_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError) as refusal:
        place(
            "Qwen/Qwen2.5-VL-7B-Instruct",
            training=True,
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
    monkeypatch.setattr(policy, "free_ram", lambda: 1000)
    with pytest.raises(ModelError, match=r"found: 0\.0 GiB free on cpu"):
        place(TINY, command_that_runs="nothing")


def test_a_small_model_goes_to_the_cpu_in_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place(TINY, training=True, command_that_runs="") == ("cpu", "float32")


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


def test_entropy_of_a_uniform_distribution():
    _, entropy = token_logprobs(torch.zeros(1, 3), torch.randn(8, 3), torch.tensor([0]), 1.0)
    assert entropy.item() == pytest.approx(math.log(8))
