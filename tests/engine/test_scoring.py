"""scoring.py against stock transformers on repeated prompts, in fp64."""

import math

import pytest
import torch
from conftest import (
    make_prompts,
    random_completions,
    scored,
    stock,
    stock_inputs,
    stock_logits,
    stock_logprobs,
)
from torch.autograd.graph import saved_tensors_hooks

from engine import scoring
from engine.prompts import Prompts
from engine.scoring import (
    HEADROOM,
    ChunkedLogprobs,
    activation_bytes,
    completion_logprobs,
    layers_to_checkpoint,
    logprobs_bytes,
    pack,
)

# --- the packed pass ----------------------------------------------------------------------


def test_the_reference_is_transformers_forward(model, prompts):
    ids, mask = random_completions(prompts)
    twin = stock(model)
    whole = twin(**stock_inputs(prompts, ids, mask)).logits
    torch.testing.assert_close(stock_logits(twin, prompts, ids, mask), whole, rtol=0, atol=1e-12)
    ids[0, 3] = model.config.image_token_id
    with pytest.raises(ValueError, match="do not match"):  # the reason for `stock_logits`
        twin(**stock_inputs(prompts, ids, mask))


@pytest.mark.parametrize("group_size", [1, 2, 4])
def test_logprobs_equal_stock_transformers(model, prompts, group_size):
    ids, mask = random_completions(prompts, group_size=group_size)
    logprobs = scored(model, prompts, ids, mask, temperature=0.7)
    expected = stock_logprobs(stock(model), prompts, ids, mask, temperature=0.7)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("checkpoint_layers", [0, 1, 2, None])
def test_all_gradients_equal_stock_transformers(model, prompts, checkpoint_layers):
    ids, mask = random_completions(prompts)
    ids[0, 3] = model.config.image_token_id  # the policy may sample an image token
    factor = torch.randn(ids.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    twin = stock(model)
    (stock_logprobs(twin, prompts, ids, mask, temperature=0.7) * factor).sum().backward()
    options = {"temperature": 0.7, "checkpoint_layers": checkpoint_layers}
    (scored(model, prompts, ids, mask, **options) * factor).sum().backward()
    assert any(name.startswith("model.visual") for name, _ in model.named_parameters())
    for (name, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        difference = (own.grad - other.grad).norm()
        # the key bias has zero gradient in exact arithmetic: softmax ignores a constant
        assert difference <= 1e-9 * other.grad.norm() + 1e-12, name


def test_checkpointed_layers_run_again_in_the_backward_pass(model, prompts):
    ids, mask = random_completions(prompts)
    runs = [0, 0]
    for number, layer in enumerate(model.model.language_model.layers):

        def count(*_, number=number):
            runs[number] += 1

        layer.register_forward_pre_hook(count)
    scored(model, prompts, ids, mask, checkpoint_layers=1).sum().backward()
    assert runs == [2, 1]


def test_each_row_sees_its_own_image(model, prompts):
    ids, mask = random_completions(prompts)
    swapped = Prompts(
        prompts.input_ids,
        prompts.pixel_values[[1, 0, 2]],
        prompts.mm_token_type_ids,
        prompts.image_grid_thw,
    )
    moved = (scored(model, prompts, ids, mask) - scored(model, swapped, ids, mask)).abs().amax(1)
    assert (moved[:4] > 1e-3).all()
    assert (moved[4:] < 1e-12).all()


def test_a_token_changes_what_comes_after_it_in_its_row_and_nothing_else(model, prompts):
    ids, mask = random_completions(prompts)
    other = ids.clone()
    other[0, 3] = 5 + (ids[0, 3] == 5)
    changed = (scored(model, prompts, ids, mask) - scored(model, prompts, other, mask)).abs() > 1e-9
    assert changed[0].tolist() == [False] * 3 + [True] * 6
    assert not changed[1:].any()


def test_padding_columns_change_nothing(model, prompts):
    ids, mask = random_completions(prompts)
    wide = scored(
        model,
        prompts,
        torch.nn.functional.pad(ids, (0, 5)),
        torch.nn.functional.pad(mask, (0, 5)),
    )
    logprobs = scored(model, prompts, ids, mask)
    torch.testing.assert_close(wide[:, :9], logprobs, rtol=0, atol=1e-12)
    assert not wide[:, 9:].any()


def test_what_stands_behind_the_mask_changes_nothing(model, prompts):
    ids, mask = random_completions(prompts)
    noisy = scored(model, prompts, torch.where(mask, ids, 77), mask)
    assert torch.equal(noisy, scored(model, prompts, ids, mask))


def test_logits_of_bf16_weights_are_fp32(model, processor):
    prompts = make_prompts(processor, 2)
    ids, mask = random_completions(prompts)
    assert scored(model.to(torch.bfloat16), prompts, ids, mask).dtype == torch.float32


def test_a_model_that_would_not_know_the_packing_is_refused(model, prompts):
    ids, mask = random_completions(prompts)
    with pytest.raises(RuntimeError, match="use_own_attention"):
        scored(stock(model), prompts, ids, mask)


@pytest.mark.parametrize("checkpoint_layers", [0, 2])
def test_scoring_waits_for_nothing(model, prompts, checkpoint_layers):
    """Meta tensors have no values: reading one raises."""
    ids, mask = random_completions(prompts)
    lengths = mask.sum(1).tolist()
    logprobs, _ = completion_logprobs(
        model.to("meta"),
        prompts.to("meta"),
        ids.to("meta"),
        lengths,
        temperature=1.0,
        checkpoint_layers=checkpoint_layers,
    )
    logprobs.sum().backward()
    assert all(parameter.grad.device.type == "meta" for parameter in model.parameters())
    for read in (torch.Tensor.item, torch.Tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(logprobs[0, 0])


def test_packing_by_hand():
    """Two prompts of 3 tokens with two completions each, of 2, 1, 3 and 1 tokens."""
    packing, predictors = pack((4, 3), [2, 1, 3, 1], (2, 3), "cpu")
    assert packing.cells.tolist() == [0, 1, 3, 6, 7, 8, 9]
    # states 0 to 3 are the rows' last prompt states, 4 to 10 those of the completion tokens
    assert predictors.tolist() == [0, 4, 1, 2, 7, 8, 3]
    assert packing.visible.int().tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]
    x = torch.arange(13.0)[:, None, None]  # 6 prompt tokens, 7 completion tokens
    assert packing.in_prompts(x)[:, 0, :, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    rows = [[6, 7, 0], [8, 0, 0], [9, 10, 11], [12, 0, 0]]
    assert packing.in_rows(x)[:, 0, :, 0].tolist() == rows
    prefixes = [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    expected = [prefix + row for prefix, row in zip(prefixes, rows, strict=True)]
    assert packing.in_rows_after_prompts(x)[:, 0, :, 0].tolist() == expected
    assert torch.equal(packing.pack(packing.in_prompts(x), packing.in_rows(x)), x)


# --- log-probs ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_log_probs_do_not_depend_on_the_chunk(monkeypatch, chunk):
    torch.manual_seed(0)
    states, weight = torch.randn(7, 5).double(), torch.randn(11, 5).double()
    targets = torch.randint(11, (7,))
    whole = torch.distributions.Categorical(logits=states @ weight.T / 0.5)
    monkeypatch.setattr(scoring, "CHUNK", chunk)
    logprobs, entropy = ChunkedLogprobs.apply(states, weight, targets, 0.5)
    torch.testing.assert_close(logprobs, whole.log_prob(targets))
    torch.testing.assert_close(entropy, whole.entropy())


@pytest.mark.parametrize("trained", ["both", "states", "weight"])
def test_the_gradient_of_log_probs(monkeypatch, trained):
    torch.manual_seed(0)
    monkeypatch.setattr(scoring, "CHUNK", 2)
    states = torch.randn(5, 4, dtype=torch.float64, requires_grad=trained != "weight")
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=trained != "states")
    targets = torch.randint(6, (5,))
    assert torch.autograd.gradcheck(
        lambda h, w: ChunkedLogprobs.apply(h, w, targets, 0.7)[0], (states, weight)
    )


def test_no_logits_are_kept_for_the_backward_pass():
    states = torch.randn(50, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        ChunkedLogprobs.apply(states, weight, torch.zeros(50, dtype=torch.long), 1.0)
    assert max(kept) == weight.numel()
    assert sum(kept) == weight.numel() + states.numel() + 2 * 50


def test_entropy_of_a_uniform_distribution():
    _, entropy = ChunkedLogprobs.apply(torch.zeros(1, 3), torch.randn(8, 3), torch.tensor([0]), 1.0)
    assert entropy.item() == pytest.approx(math.log(8))


# --- memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_bytes_are_about_what_a_layer_keeps(model, processor, dtype):
    prompts = make_prompts(processor, 2)
    ids, mask = random_completions(prompts, group_size=4)
    model = model.to(dtype)
    layer, kept = model.model.language_model.layers[1], {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive = []
    hooks = saved_tensors_hooks(keep, lambda x: x)
    layer.register_forward_pre_hook(lambda *_: hooks.__enter__())
    layer.register_forward_hook(lambda *_: hooks.__exit__())
    scored(model, prompts, ids, mask, checkpoint_layers=0)
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    tokens = prompts.input_ids.numel() + mask.sum().item()
    config, cells = model.config.text_config, mask.numel()
    estimate = activation_bytes(config, dtype, tokens, cells, trained=True)
    assert 0.8 < estimate / sum(kept.values()) < 1.2  # test_memory.py checks GPU kernels exactly


def test_layers_are_checkpointed_as_far_as_memory_asks(model, monkeypatch):
    language_model = model.model.language_model
    config = language_model.config
    per_layer = activation_bytes(config, torch.float64, 1000, 800, trained=True)
    head = logprobs_bytes(config, 800, trained=True)
    total = 10 * per_layer
    for kept in (0, 1, 2, 5):
        free = HEADROOM * total + head + (kept + 0.5) * per_layer
        monkeypatch.setattr(scoring, "free_memory", lambda device, free=free: (free, total))
        assert layers_to_checkpoint(language_model, 1000, 800) == max(0, 2 - kept)
    monkeypatch.setattr(scoring, "free_memory", lambda device: (0, 0))
    assert layers_to_checkpoint(language_model, 1000, 800) == 2
