"""attention.py: its forms against attention written out, and the check of its fast form."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import random_completions, stock, stock_inputs

import attention
import fastpath
from attention import check_suffix_attention, lower_right, one_token_attention, suffix_attention
from fastpath import TOLERANCE


def written_out(query, key, value, visible, scaling):
    """softmax(q k / scale) v with keys and values repeated for the query heads that share them."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


def random_heads(tokens: int, slots: int):
    """6 query heads that share 2 key heads of size 8, 3 rows, fp64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 6, tokens, 8), (3, 2, slots, 8), (3, 2, slots, 8))
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def test_one_token_sees_the_open_slots_only():
    query, key, value = random_heads(1, 7)
    visible = torch.arange(7) < 5
    mask = torch.zeros(1, 1, 1, 7, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    own = one_token_attention(query, key, value, mask, 0.3)
    expected = written_out(query, key, value, visible, 0.3).transpose(1, 2)
    torch.testing.assert_close(own, expected)


def test_the_last_tokens_see_what_is_before_them():
    query, key, value = random_heads(3, 7)
    visible = lower_right(3, 7, device="cpu")
    own = suffix_attention(query, key, value, visible, 0.3)
    torch.testing.assert_close(own, written_out(query, key, value, visible, 0.3))


def test_a_stock_call_that_pads_on_the_left_ignores_its_padding(model, prompts):
    """The mask function that is registered beside the attention function."""
    ids, mask = random_completions(prompts, group_size=1)
    inputs = stock_inputs(prompts, ids, mask)
    inputs["attention_mask"][:, :3] = 0
    own, expected = model(**inputs).logits, stock(model)(**inputs).logits
    inputs["input_ids"][:, 0] = 9
    other = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(own[real], expected[real], rtol=0, atol=1e-12)
    assert torch.equal(own[real], other[real])


# --- the fast form's check ----------------------------------------------------------------


def test_the_check_of_the_flash_form_accepts_the_right_mask():
    query, key, _ = random_heads(3, 7)
    assert check_suffix_attention(query, key) < 1e-12


def test_the_check_of_the_flash_form_notices_a_wrong_mask(monkeypatch):
    query, key, _ = random_heads(3, 7)
    upper_left = lambda c, slots: torch.ones(c, slots, dtype=torch.bool).tril()  # noqa: E731
    monkeypatch.setattr(attention, "causal_lower_right", upper_left)
    assert check_suffix_attention(query, key) > 10 * TOLERANCE


def test_the_check_of_the_flash_form_notices_a_wrong_gradient(monkeypatch):
    query, key, _ = random_heads(3, 7)

    class HalfTheGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    calls = []

    def attend(query, key, value, **options):
        calls.append(1)
        value = HalfTheGradient.apply(value) if len(calls) == 1 else value
        return sdpa(query, key, value, **options)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(attention, "causal_lower_right", partial(lower_right, device="cpu"))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    assert check_suffix_attention(query, key) == pytest.approx(0.5)


def test_on_a_gpu_the_fast_form_is_used_only_if_it_is_trusted(monkeypatch):
    """A GPU is pretended: what counts is which mask attention is called with."""
    query, key, value = random_heads(3, 7)
    visible = lower_right(3, 7, device="cpu")
    seen = []

    class OnGpu(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *_, attn_mask, **__: seen.append(attn_mask)
    )
    for verdict in (True, False):
        monkeypatch.setattr(attention, "trusted", lambda name, check, verdict=verdict: verdict)
        suffix_attention(query.as_subclass(OnGpu), key, value, visible, 0.3)
    suffix_attention(query, key, value, visible, 0.3)
    kinds = [type(mask).__name__ for mask in seen]
    assert kinds == ["CausalBias", "Tensor", "Tensor"]
    assert fastpath.VERDICTS == {}
