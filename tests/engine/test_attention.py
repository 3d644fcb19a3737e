"""attention.py against attention written out, and the checks of its kernels."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import random_completions, stock, stock_inputs

from engine import attention, fastpath
from engine.attention import (
    check_one_token_attention,
    check_suffix_attention,
    lower_right,
    one_token_attention,
    suffix_attention,
)
from engine.fastpath import TOLERANCE

HEADS = SimpleNamespace(num_attention_heads=6, num_key_value_heads=2, hidden_size=48)
LIKE = torch.zeros(1, dtype=torch.float64)


def written_out(query, key, value, visible, scaling):
    """softmax(q k^T scaling) v, with keys and values repeated for all query heads."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ value


def random_heads(tokens: int, slots: int):
    """3 rows in fp64: 6 query heads share 2 KV heads of size 8."""
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
    """The mask function registered with the attention function handles it."""
    ids, mask = random_completions(prompts, group_size=1)
    inputs = stock_inputs(prompts, ids, mask)
    inputs["attention_mask"][:, :3] = 0
    own, expected = model(**inputs).logits, stock(model)(**inputs).logits
    inputs["input_ids"][:, 0] = 9
    other = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(own[real], expected[real], rtol=0, atol=1e-12)
    assert torch.equal(own[real], other[real])


def test_stock_generate_ignores_padding_too(model, processor):
    """Its decoding steps have a mask of booleans, which must not be added to the scores."""
    tokenizer = processor.tokenizer
    texts = ["<reasoning>square, side 20: ", "<think>a circle", "width"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    assert not inputs["attention_mask"].all()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    own = model.generate(**inputs, **options)
    assert own.tolist() == stock(model).generate(**inputs, **options).tolist()


# --- kernel checks ------------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """A host tensor that claims to be on a GPU: the choice of kernel depends on that alone."""

    is_cuda = True


@pytest.fixture
def gpu(monkeypatch):
    """The checks' random heads claim to be on a GPU, and the kernels count as verified."""
    heads = attention.random_heads

    def on_gpu(*arguments, **options):
        return [x.as_subclass(OnGpu) for x in heads(*arguments, **options)]

    monkeypatch.setattr(attention, "random_heads", on_gpu)
    verdicts = {attention.FLASH: True, attention.DECODING: True}
    monkeypatch.setattr(fastpath, "VERDICTS", verdicts)
    monkeypatch.setattr(attention, "causal_lower_right", partial(lower_right, device="cpu"))


def test_the_checks_accept_the_right_masks(gpu):
    assert check_suffix_attention(HEADS, LIKE) < 1e-12
    assert check_one_token_attention(HEADS, LIKE) < 1e-12


def test_the_check_of_the_flash_form_notices_a_wrong_mask(gpu, monkeypatch):
    upper_left = lambda c, slots: torch.ones(c, slots, dtype=torch.bool).tril()  # noqa: E731
    monkeypatch.setattr(attention, "causal_lower_right", upper_left)
    assert check_suffix_attention(HEADS, LIKE) > 10 * TOLERANCE


def test_the_check_of_the_fused_token_notices_a_mask_that_is_not_read(gpu, monkeypatch):
    def without_mask(query, key, value, attn_mask, scale):
        return sdpa(query, key, value, scale=scale)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", without_mask)
    assert check_one_token_attention(HEADS, LIKE) > 10 * TOLERANCE


def test_the_check_of_the_flash_form_notices_a_wrong_gradient(gpu, monkeypatch):
    class HalfTheGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

    def attend(query, key, value, **options):
        return sdpa(query, key, HalfTheGradient.apply(value), **options)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    assert check_suffix_attention(HEADS, LIKE) == pytest.approx(0.5)


def test_what_the_checks_compare_with_is_no_kernel(gpu, monkeypatch):
    """The reference calls no kernel, so a wrong kernel is not compared with itself."""

    def of_twice_the_query(query, key, value, **options):
        return sdpa(2 * query, key, value, **options)

    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", of_twice_the_query)
    assert check_suffix_attention(HEADS, LIKE) > 10 * TOLERANCE
    assert check_one_token_attention(HEADS, LIKE) > 10 * TOLERANCE


def test_on_a_gpu_a_fast_form_is_used_only_if_it_is_trusted(monkeypatch):
    query, key, value = random_heads(3, 7)
    visible = lower_right(3, 7, device="cpu")
    seen = []

    def attend(query, key, value, *, attn_mask, **options):
        seen.append((type(attn_mask).__name__, key.shape[1], options["enable_gqa"]))

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    for verdict in (True, False):
        monkeypatch.setattr(fastpath, "VERDICTS", {attention.FLASH: verdict})
        suffix_attention(query.as_subclass(OnGpu), key, value, visible, 0.3)
    suffix_attention(query, key, value, visible, 0.3)
    # no GPU kernel takes a mask together with shared heads, so the heads are repeated
    assert seen == [("CausalBias", 2, True), ("Tensor", 6, False), ("Tensor", 2, True)]


def test_without_the_fast_forms_a_gpu_computes_the_same(monkeypatch):
    monkeypatch.setattr(fastpath, "VERDICTS", {})
    query, key, value = random_heads(3, 7)
    visible = lower_right(3, 7, device="cpu")
    own = suffix_attention(query.as_subclass(OnGpu), key, value, visible, 0.3)
    torch.testing.assert_close(
        own.as_subclass(torch.Tensor), written_out(query, key, value, visible, 0.3)
    )


def test_the_kernels_are_checked_once_and_on_a_gpu_only(monkeypatch):
    monkeypatch.setattr(fastpath, "VERDICTS", {})
    attention.verify_attention(HEADS, LIKE)
    assert fastpath.VERDICTS == {}
    checked = []
    for name in ("check_suffix_attention", "check_one_token_attention"):
        monkeypatch.setattr(attention, name, lambda *_, name=name: checked.append(name) or 0.0)
    for _ in range(2):
        attention.verify_attention(HEADS, LIKE.as_subclass(OnGpu))
    assert checked == ["check_suffix_attention", "check_one_token_attention"]
    assert fastpath.VERDICTS == {attention.FLASH: True, attention.DECODING: True}
