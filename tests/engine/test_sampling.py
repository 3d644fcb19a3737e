"""sampling.py against transformers' generate, and against the scoring pass."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import TINY, compiled_graphs, make_prompts, scored, stock
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from engine import fastpath, sampling
from engine.fastpath import relative_difference
from engine.loading import use_own_attention
from engine.prompts import Prompts
from engine.sampling import (
    Completions,
    Sampler,
    call_layer,
    completion_texts,
    make_generator,
    split_text,
)

PAD = 0


class Tape(TorchDispatchMode):
    """A CPU stand-in for a CUDA graph: records every tensor operation of a step, once.

    A replay runs the same operations on the same tensors with the same numbers. Every Python
    decision of the step (a slot, a shape, a branch) is frozen, as in a captured graph.
    """

    def __init__(self, step):
        super().__init__()
        self.calls = []
        step()  # as on a GPU, which compiles the step before the capture
        with self:
            self.result = step()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __call__(self):
        new = {}

        def current(x):
            return new.get(id(x), x) if isinstance(x, torch.Tensor) else x

        for func, args, kwargs, recorded in self.calls:
            out = func(*tree_map(current, args), **tree_map(current, kwargs))
            for old, fresh in zip(tree_leaves(recorded), tree_leaves(out), strict=True):
                if isinstance(old, torch.Tensor):
                    new[id(old)] = fresh
        return new.get(id(self.result), self.result)


class RecordedSampler(Sampler):
    """Takes the GPU's path: captures the first step and replays it for all steps."""

    def fastest_decode_step(self):
        self.sampled.fill_(1)
        return Tape(self.decode_step)


def make_sampler(model, kind=Sampler, max_new_tokens=12) -> Sampler:
    return kind(model, max_new_tokens=max_new_tokens, pad_id=PAD)


def sample(model, prompts, *, kind=Sampler, max_new_tokens=12, seed=0, **options) -> Completions:
    options = {"group_size": 2, "temperature": 0.7, **options}
    generator = torch.Generator().manual_seed(seed)
    sampler = make_sampler(model, kind, max_new_tokens)
    return sampler.generate(prompts, generator=generator, **options)


def stock_generate(model, prompts: Prompts, *, group_size: int = 2, max_new_tokens: int = 12):
    """Greedy completions of transformers' generate, repeated for each group."""
    return (
        stock(model)
        .generate(
            input_ids=prompts.input_ids,
            attention_mask=torch.ones_like(prompts.input_ids),
            mm_token_type_ids=prompts.mm_token_type_ids,
            pixel_values=prompts.pixel_values.flatten(0, 1),
            image_grid_thw=prompts.image_grid_thw,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=PAD,
        )[:, prompts.input_ids.shape[1] :]
        .repeat_interleave(group_size, 0)
    )


both_kinds = pytest.mark.parametrize("kind", [Sampler, RecordedSampler])


# --- greedy -------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_ids_equal_transformers_generate(model, processor, kind, dtype):
    """Also with buffers that earlier prompts have used."""
    model = model.to(dtype)
    sampler = make_sampler(model, kind)
    many = make_prompts(processor, 5)
    for prompts in (many[:3], many[2:5], many[:3]):
        own = sampler.generate(prompts, group_size=2, temperature=0.0)
        expected = stock_generate(model, prompts)
        assert len(expected.unique()) > 5
        assert own.ids.tolist() == expected.tolist()


def test_without_the_images_offset_the_ids_are_wrong(model, prompts, monkeypatch):
    """A negative control: counts positions in tokens, as in text without images."""
    embed = sampling.embed_prompts

    def ignore_offset(*args):
        embeds, positions, first = embed(*args)
        return embeds, positions, torch.full_like(first, embeds.shape[1])

    monkeypatch.setattr(sampling, "embed_prompts", ignore_offset)
    own = sample(model, prompts, temperature=0.0)
    assert own.ids.tolist() != stock_generate(model, prompts).tolist()


@both_kinds
@pytest.mark.parametrize("pad_stops", [False, True])
def test_several_stop_tokens_and_an_early_end(model, prompts, kind, pad_stops):
    free = stock_generate(model, prompts, max_new_tokens=40)
    stops = {int(free[0, 4]), int(free[2, 9]), int(free[4, 12])} | ({PAD} if pad_stops else set())
    model.generation_config.eos_token_id = sorted(stops)
    expected = stock_generate(model, prompts, max_new_tokens=40)
    own = sample(model, prompts, kind=kind, temperature=0.0, max_new_tokens=40)
    assert own.ids.shape[1] < 20
    assert own.ids.tolist() == expected.tolist()


def test_the_first_stop_token_belongs_to_the_completion(model, prompts):
    free = sample(model, prompts, temperature=0.0, max_new_tokens=10)
    stops = [int(free.ids[0, 4]), int(free.ids[2, 6])]  # two stop tokens, from prompts 0 and 1
    model.generation_config.eos_token_id = stops
    stopped = sample(model, prompts, temperature=0.0, max_new_tokens=10)
    for row, (ids, mask) in enumerate(zip(stopped.ids, stopped.mask, strict=True)):
        ends = [i for i, token in enumerate(free.ids[row].tolist()) if token in stops]
        length = ends[0] + 1 if ends else 10
        assert stopped.lengths[row] == length
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


# --- sampling -----------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_recorded_logprobs_equal_the_scoring_pass(model, prompts, temperature, kind):
    drawn = sample(model, prompts, kind=kind, group_size=3, temperature=temperature)
    with torch.no_grad():
        expected = scored(model, prompts, drawn.ids, drawn.mask, temperature=temperature)
        elsewhere = scored(model, prompts, drawn.ids, drawn.mask, temperature=0.9)
    torch.testing.assert_close(drawn.logprobs, expected, rtol=0, atol=1e-10)
    assert (drawn.logprobs - elsewhere).abs().max() > 1e-2


def test_sampling_ignores_the_checkpoints_generation_config(model, prompts):
    plain = sample(model, prompts)
    model.generation_config.update(temperature=1e-6, repetition_penalty=5.0, top_k=1, top_p=0.1)
    assert torch.equal(sample(model, prompts).ids, plain.ids)


@both_kinds
def test_samples_follow_the_seed_and_rows_differ(model, prompts, kind):
    sampler = make_sampler(model, kind)
    options = {"group_size": 2, "temperature": 0.7}
    first, again, other = (
        sampler.generate(prompts, generator=make_generator("cpu", 0, step), **options)
        for step in (1, 1, 2)
    )
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.logprobs, again.logprobs)
    assert not torch.equal(first.ids, other.ids)
    assert len({tuple(row) for row in first.ids.tolist()}) == 6


def test_a_recorded_step_draws_what_the_plain_step_draws(model, prompts):
    plain, recorded = (sample(model, prompts, kind=k) for k in (Sampler, RecordedSampler))
    assert torch.equal(plain.ids, recorded.ids)
    assert torch.equal(plain.logprobs, recorded.logprobs)


def test_rows_that_have_ended_are_left_out(model, prompts, monkeypatch):
    """The others move within the caches, and keep their own prompt and noise."""
    model.generation_config.eos_token_id = list(
        range(0, 486, 8)
    )  # every eighth token is a stop token
    decoded = []
    draw = Sampler.sample_token

    def counting(self, hidden):
        decoded.append(len(hidden))
        return draw(self, hidden)

    monkeypatch.setattr(Sampler, "sample_token", counting)
    drawn = sample(model, prompts, group_size=4, max_new_tokens=24)
    assert decoded == [
        sum(length > before for length in drawn.lengths) for before in range(max(drawn.lengths))
    ]
    assert len(set(decoded)) > 5
    with torch.no_grad():
        expected = scored(model, prompts, drawn.ids, drawn.mask, temperature=0.7) * drawn.mask
    torch.testing.assert_close(drawn.logprobs, expected, rtol=0, atol=1e-10)
    decoded.clear()
    recorded = sample(model, prompts, kind=RecordedSampler, group_size=4, max_new_tokens=24)
    assert set(decoded) == {12}  # a captured step runs all rows
    assert torch.equal(recorded.ids, drawn.ids)


def test_random_numbers_are_a_function_of_seed_and_step():
    def first(*numbers):
        return torch.rand(1, generator=make_generator("cpu", *numbers)).item()

    assert len({first(seed, step) for seed in (0, 1) for step in (0, 1)}) == 4
    assert first(1, 0) == first(1, 0)


def test_drawn_tokens_follow_the_softmax(model, prompts):
    """Bins the first tokens of 20,000 rows of one prompt: the 4 likeliest tokens, and the rest."""
    rows, temperature = 20_000, 1.5
    sampler = make_sampler(model, max_new_tokens=1)
    generator = torch.Generator().manual_seed(0)
    drawn = sampler.generate(
        prompts[:1], group_size=rows, temperature=temperature, generator=generator
    )
    tokens = torch.arange(model.config.text_config.vocab_size)[:, None]
    with torch.no_grad():
        every_token = scored(
            model, prompts[:1], tokens, torch.ones_like(tokens).bool(), temperature=temperature
        )[:, 0]
    expected, order = every_token.exp().sort(descending=True)
    counts = torch.bincount(drawn.ids[:, 0], minlength=len(tokens))[order]
    expected, counts = (torch.cat([x[:4], x[4:].sum()[None]]) for x in (expected, counts))
    assert expected.sum().item() == pytest.approx(1)
    assert (expected > 0.01).all()
    chi_square = ((counts - rows * expected) ** 2 / (rows * expected)).sum()
    assert chi_square < 18.47  # the 99.9 % quantile at 4 degrees of freedom


@both_kinds
def test_an_update_in_place_is_seen_by_the_next_rollout(model, prompts, kind):
    sampler = make_sampler(model, kind)
    before = sampler.generate(prompts, group_size=2, temperature=0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            change = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + 0.2 * change)
    after = sampler.generate(prompts, group_size=2, temperature=0.0)
    assert before.ids.tolist() != after.ids.tolist()
    assert after.ids.tolist() == stock_generate(model, prompts).tolist()


def test_buffers_are_made_anew_for_another_shape(model, prompts, processor):
    sampler = make_sampler(model)
    for some, group_size in ((prompts, 2), (prompts[:1], 2), (prompts[:2], 3)):
        own = sampler.generate(some, group_size=group_size, temperature=0.0)
        assert own.ids.tolist() == stock_generate(model, some, group_size=group_size).tolist()


def test_greedy_and_sampled_calls_share_their_buffers(model, prompts):
    sampler = make_sampler(model, RecordedSampler)
    greedy = sampler.generate(prompts, group_size=2, temperature=0.0)
    generator = torch.Generator().manual_seed(0)
    warm = sampler.generate(prompts, group_size=2, temperature=0.7, generator=generator)
    again = sampler.generate(prompts, group_size=2, temperature=0.0)
    assert torch.equal(warm.ids, sample(model, prompts).ids)
    assert torch.equal(greedy.ids, again.ids)
    assert torch.equal(greedy.logprobs, again.logprobs)


# --- decode steps on a GPU ----------------------------------------------------------------


def test_reading_prompts_and_decoding_wait_for_nothing(model, prompts):
    """Meta tensors have no values: reading one raises."""
    sampler = make_sampler(model.to("meta"))
    with torch.no_grad():
        sampler.make_buffers(6, prompts.input_ids.shape[1])
        hidden = sampler.prefill(prompts.to("meta"), group_size=2)
        sampler.sample_token(hidden)
        assert sampler.decode_step().shape == (6, model.config.text_config.vocab_size)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(sampler.finished.all())


class Replayed:
    """A stand-in for `CapturedGraph` without a GPU: a call runs the step."""

    def __init__(self, step):
        self.decode_step = step

    def __call__(self):
        return self.decode_step()


class Misreplayed(Replayed):
    """A graph that replays wrong values."""

    def __call__(self):
        return self.decode_step().roll(1, 0)


def no_graphs(step):
    raise RuntimeError("operation not permitted when stream is capturing")


def no_compiler():
    raise RuntimeError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("recording", "compiler", "kept", "warning"),
    [
        (Replayed, lambda: sampling.call_layer, "Replayed", None),
        (
            Misreplayed,
            lambda: sampling.call_layer,
            "decode_step",
            "a CUDA graph of the decode step: it",
        ),
        (
            no_graphs,
            lambda: sampling.call_layer,
            "decode_step",
            "step: RuntimeError: operation not",
        ),
        (Replayed, no_compiler, "Replayed", "layers: RuntimeError: Failed to find C compiler"),
    ],
)
def test_on_a_gpu_the_step_is_as_fast_as_can_be_trusted(
    model, prompts, monkeypatch, recording, compiler, kept, warning
):
    """Simulates a GPU and its failures; the completions are correct in every case."""
    plain = sample(model, prompts)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"), raising=False)
    monkeypatch.setattr(sampling, "CapturedGraph", recording)
    monkeypatch.setattr(sampling, "compile_layer", compiler)
    monkeypatch.setattr(fastpath, "VERDICTS", {})
    sampler = make_sampler(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            generator = torch.Generator().manual_seed(0)
            drawn = sampler.generate(prompts, group_size=2, temperature=0.7, generator=generator)
            assert torch.equal(drawn.ids, plain.ids)
            assert torch.equal(drawn.logprobs, plain.logprobs)
    assert kept in (type(sampler.advance).__name__, getattr(sampler.advance, "__name__", ""))
    texts = [str(each.message) for each in told if "slower without" in str(each.message)]
    assert len(texts) == (warning is not None)
    assert all(warning in text for text in texts)


def rounding_elsewhere(layer, hidden, rope, mask, cache):
    """A layer as a compiler might fuse it: rounds only its result."""
    exact, twin = copy.deepcopy(layer).float(), cache.float()
    rope, mask = tuple(x.float() for x in rope), mask.float()
    out = call_layer(exact, hidden.float(), rope, mask, twin).to(hidden.dtype)
    cache.keys.copy_(twin.keys), cache.values.copy_(twin.values)
    return out


def with_wrong_mask(layer, hidden, rope, mask, cache):
    """Attends to future slots, and not to the prompt's first ten."""
    wrong = torch.zeros_like(mask)
    wrong[..., :10] = -torch.inf
    return call_layer(layer, hidden, rope, wrong, cache)


def with_wrong_positions(layer, hidden, rope, mask, cache):
    return call_layer(layer, hidden, (rope[0], torch.zeros_like(rope[1])), mask, cache)


def in_the_wrong_slot(layer, hidden, rope, mask, cache):
    other = copy.copy(cache)
    other.next_slot = cache.next_slot + 1
    return call_layer(layer, hidden, rope, mask, other)


def deep_bf16_model(processor) -> Qwen2_5_VLForConditionalGeneration:
    """28 layers in bf16, with a few huge values in the residual stream, as in trained models."""
    config = AutoConfig.from_pretrained(TINY)
    config.text_config.update({"num_hidden_layers": 28, "layer_types": ["full_attention"] * 28})
    config.vision_config.update({"depth": 1, "fullatt_block_indexes": [0]})
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    layers = model.model.language_model.layers
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.mul_(3 if parameter.ndim > 1 else 1)
        layers[2].mlp.down_proj.weight[:3] *= 200
    model.generation_config.eos_token_id = [2, 0]
    use_own_attention(model)
    frequencies = model.model.language_model.rotary_emb.inv_freq.clone()
    model.bfloat16()
    model.model.language_model.rotary_emb.inv_freq = frequencies
    return model


@pytest.fixture(scope="module")
def at_first_step(processor):
    """A sampler of the deep model after prefill."""
    sampler = make_sampler(deep_bf16_model(processor))
    sampler.model.eval()
    prompts = make_prompts(processor, 2)
    with torch.no_grad():
        sampler.make_buffers(4, prompts.input_ids.shape[1])
        sampler.prefill(prompts, 2)
    return sampler


@torch.no_grad()
def off_by(sampler, compiled, monkeypatch) -> float:
    monkeypatch.setattr(sampling, "compile_layer", lambda: compiled)
    return sampler.check_compiled()


def test_a_compiled_layer_that_rounds_elsewhere_is_trusted(at_first_step, monkeypatch):
    """Even if the logits after 28 layers exceed the tolerance."""
    sampler = at_first_step
    assert off_by(sampler, rounding_elsewhere, monkeypatch) <= 0
    assert off_by(sampler, call_layer, monkeypatch) <= 0
    with torch.no_grad():
        plain = sampler.try_decode_step(sampler.decode_step)
        monkeypatch.setattr(sampler, "run_layer", rounding_elsewhere)
        assert (
            relative_difference(sampler.try_decode_step(sampler.decode_step), plain)
            > fastpath.TOLERANCE
        )


@pytest.mark.parametrize("wrong", [with_wrong_mask, with_wrong_positions, in_the_wrong_slot])
def test_a_compiled_layer_that_is_wrong_is_noticed(at_first_step, monkeypatch, wrong):
    assert off_by(at_first_step, wrong, monkeypatch) > fastpath.TOLERANCE


def test_more_shapes_than_the_compiler_allows(model, prompts, monkeypatch):
    """A program may vary the group size: torch refuses more than 8 recompilations per process."""
    monkeypatch.setattr(type(model), "device", torch.device("cuda"), raising=False)
    monkeypatch.setattr(sampling, "CapturedGraph", Replayed)
    monkeypatch.setattr(fastpath, "VERDICTS", {})
    options = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    monkeypatch.setattr(
        sampling, "compile_layer", lambda: torch.compile(sampling.call_layer, **options)
    )
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2):  # the default is 8
        for group_size in (1, 2, 3, 4):
            sampler = make_sampler(model, max_new_tokens=2)
            sampler.generate(prompts[:1], group_size=group_size, temperature=0.0)
            assert sampler.run_layer is not sampling.call_layer


class Stream:
    device_index = 0


@pytest.mark.parametrize("pool_is_ended_by", ["torch", "us"])
def test_a_recording_that_fails_leaves_stream_and_pool_as_they_were(monkeypatch, pool_is_ended_by):
    """torch restores neither if the end of a capture fails (torch/cuda/graphs.py)."""
    main_stream, side_stream, events = Stream(), Stream(), []
    current = [main_stream]

    @contextmanager
    def capture(graph, *, pool, capture_error_mode):
        current[0] = side_stream
        events.append(("begin", pool))
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def end_pool(device, pool):
        events.append(("end", pool))
        if pool_is_ended_by == "torch":
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_pool, raising=False)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        sampling.CapturedGraph(lambda: torch.zeros(1))
    assert current == [main_stream]
    assert events == [("begin", (0, 7)), ("end", (0, 7))]


def test_one_compiled_graph_fits_all_layers(model, prompts, compiled_layer):
    """An update of the weights does not recompile it."""
    sampler = make_sampler(model)
    sampler.run_layer = compiled_layer
    for _ in range(2):
        own = sampler.generate(prompts, group_size=2, temperature=0.0)
        assert own.ids.tolist() == stock_generate(model, prompts).tolist()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    assert compiled_graphs() == 1


# --- texts --------------------------------------------------------------------------------


def test_texts_are_what_was_sampled_without_the_stop_token(model, processor, prompts):
    tokens = processor.tokenizer.encode("<answer>12.50</answer><|image_pad|>")
    ids = torch.tensor([[*tokens, 2, PAD], [*tokens, 7, 2]])
    mask = torch.tensor([[True] * (len(tokens) + 1) + [False], [True] * (len(tokens) + 2)])
    completions = Completions(ids, mask, mask.sum(1).tolist(), mask.float(), mask[:, 0])
    first, second = completion_texts(processor, completions, [2, 0])
    assert first == "<answer>12.50</answer><|image_pad|>"
    assert second == first + processor.tokenizer.decode([7])


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_token_texts_join_to_the_text_also_where_a_character_has_several_tokens(processor, cut):
    tokenizer = processor.tokenizer
    text = "<reasoning>20² ≈ 400 \N{GRINNING FACE}\n面積 ½ <answer>1.00 🟦"
    row = tokenizer.encode(text)
    assert len(row) > len(tokenizer.encode("<reasoning>20 400\n <answer>1.00"))
    row = row[: len(row) - cut]  # the limit may cut a character
    texts = split_text(tokenizer, row)
    assert len(texts) == len(row)
    assert "".join(texts) == tokenizer.decode(row)
    assert any(each == "" for each in texts)
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts[:-4])
