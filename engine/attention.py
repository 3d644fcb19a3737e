"""Attention in the forms that sampling and scoring need.

Letters are those of the legend in grpo.py. transformers' own layers call `attention` under the name
IMPLEMENTATION; it tells by what it is given which pass it serves:

    scoring   prompts and their ragged completions in one sequence: `packing` is given
    decoding  one token of each row against cached keys and values: a mask is given
    vision    the patches of all images: `windows` is given
    prompts   Q prompts of equal length, causal; and whatever a stock call asks for
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.fastpath import at_least_fp32, is_trusted, relative_difference, trusted

IMPLEMENTATION = "shared_prompt"  # the name of `attention` in a model's config
FLASH = "flash attention behind shared prompts"
DECODING = "fused attention of one token"


@dataclass(frozen=True)
class Packing:
    """Where everything stands in one sequence of N tokens: Q prompts, then B ragged completions.

    N = Q * P + T, with T the tokens of all completions, row after row: nothing is padded.
    """

    prompts: int  # Q
    prompt_length: int  # P
    group_size: int  # G
    longest: int  # C
    cells: Tensor  # (T,): where each completion token stands in the (B, C) grid, flattened
    visible: Tensor  # (C, P + C) bool: what a completion token sees of its prompt and its row

    def in_prompts(self, x: Tensor) -> Tensor:
        """Return the prompts' part of x (N, heads, D) as (Q, heads, P, D)."""
        prompts = x[: self.prompts * self.prompt_length]
        return prompts.unflatten(0, (self.prompts, -1)).transpose(1, 2)

    def in_rows(self, x: Tensor) -> Tensor:
        """Return the completions' part of x (N, heads, D), padded with zeros: (B, heads, C, D)."""
        rows = self.prompts * self.group_size
        grid = x.new_zeros(rows * self.longest, *x.shape[1:])
        grid.index_copy_(0, self.cells, x[self.prompts * self.prompt_length :])
        return grid.unflatten(0, (rows, -1)).transpose(1, 2)

    def in_rows_after_prompts(self, x: Tensor) -> Tensor:
        """Return each row's completion behind its group's prompt, (B, heads, P + C, D)."""
        prefix = self.in_prompts(x)[:, None].expand(-1, self.group_size, -1, -1, -1)
        return torch.cat([prefix.flatten(0, 1), self.in_rows(x)], 2)

    def pack(self, prompts: Tensor, rows: Tensor) -> Tensor:
        """Return (N, heads, D) from `in_prompts` and `in_rows`, without the padding."""
        prompts, rows = (x.transpose(1, 2).flatten(0, 1) for x in (prompts, rows))
        return torch.cat([prompts, rows.index_select(0, self.cells)])


def attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packing: Packing | None = None,
    windows: tuple[int, int] | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Return what the heads read, (rows, tokens, Hq, D), of query (rows, Hq, tokens, D).

    key and value are (rows, Hkv, slots, D): each serves Hq / Hkv query heads. The signature is
    transformers'; the second result stands for attention weights, which nobody asks for.
    `windows` counts the equal pieces that patches look around in: images, and windows of images.
    """
    if packing is not None:
        return packed_attention(query[0], key[0], value[0], packing, scaling)[None], None
    if windows is not None:
        pieces = windows[0 if module.sees_whole_image else 1]
        return window_attention(query[0], key[0], value[0], pieces, scaling)[None], None
    if attention_mask is not None and query.shape[2] == 1:
        return one_token_attention(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )


AttentionInterface.register(IMPLEMENTATION, attention)
# without a mask function of the same name, stock calls would ignore padding
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, pieces: int, scaling: float
) -> Tensor:
    """Return attention within equal pieces of all patches, (patches, heads, D); no order in them.

    All are (heads, patches, D). transformers would take one piece after the other.
    """
    in_pieces = (x.unflatten(1, (pieces, -1)).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*in_pieces, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


def one_token_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """Return attention of a single token, (B, 1, Hq, D); mask (1, 1, 1, S) is added to its scores.

    One token has no order to respect: query heads that share a key head pose as that many tokens,
    so that keys and values are read where they lie and not repeated for each of them.
    """
    rows, heads, _, size = query.shape
    query = query.reshape(rows, key.shape[1], -1, size)  # (B, Hkv, Hq / Hkv, D)
    if query.is_cuda and is_trusted(DECODING):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:  # the CPU's kernel is made for many queries: for a few, plain products are 2 x faster
        scores = (query * scaling) @ key.transpose(-1, -2) + mask
        out = scores.softmax(-1) @ value
    return out.reshape(rows, 1, heads, size)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float
) -> Tensor:
    """Return attention over a packed sequence, (N, Hq, D): each prompt causal in itself, each
    completion over its group's prompt and itself. query (Hq, N, D), key and value (Hkv, N, D).

    Completions are padded to (B, C) in here only: the linear layers see no padding.
    """
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    prompts = F.scaled_dot_product_attention(
        *(packing.in_prompts(x) for x in (query, key, value)),
        is_causal=True,
        scale=scaling,
        enable_gqa=True,
    )
    rows = suffix_attention(
        packing.in_rows(query),
        packing.in_rows_after_prompts(key),
        packing.in_rows_after_prompts(value),
        packing.visible,
        scaling,
    )
    return packing.pack(prompts, rows)


def suffix_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float
) -> Tensor:
    """Return causal attention of the last C of P + C positions, (B, Hq, C, D).

    query (B, Hq, C, D), key and value (B, Hkv, P + C, D), visible (C, P + C) bool. On a GPU the
    flash kernel knows this form of causality by itself: no mask is read.
    """
    mask, grouped = visible, True
    if query.is_cuda and is_trusted(FLASH):
        mask = causal_lower_right(*visible.shape)
    elif query.is_cuda:  # no kernel takes a mask and shared heads: torch would write out all scores
        key, value, grouped = repeat_heads(key, query), repeat_heads(value, query), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )


def repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """Return keys or values (B, Hkv, slots, D) once for each query head that shares them."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def lower_right(tokens: int, slots: int, *, device) -> Tensor:
    """Return which of `slots` positions each of the last `tokens` sees, (tokens, slots) bool.

    >>> lower_right(2, 4, device="cpu").int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    everything = torch.ones(tokens, slots, dtype=torch.bool, device=device)
    return everything.tril(slots - tokens)


# --- the fast forms' checks ---------------------------------------------------------------


def trust_attention(config, like: Tensor) -> None:
    """Check, once, the attention kernels of a GPU, with the heads of a text config, in a dtype.

    To be called before the first layer runs: `fastpath.trusted` says why.
    """
    if like.is_cuda:
        if like.dtype != torch.float32:  # which the flash kernel does not know
            trusted(FLASH, lambda: check_suffix_attention(config, like))
        trusted(DECODING, lambda: check_one_token_attention(config, like))


def check_suffix_attention(config, like: Tensor) -> float:
    """Return how far the flash form is off from that by hand: output or gradient, the worst."""
    inputs = random_heads(config, tokens=24, slots=64, like=like)
    gradient, scaling = torch.randn_like(inputs[0]), inputs[0].shape[-1] ** -0.5
    visible = lower_right(24, 64, device=like.device)
    results = []
    for form in (suffix_attention, attention_by_hand):
        with torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = form(*leaves, visible, scaling)
            results.append([out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))])
    return max(relative_difference(fast, slow) for fast, slow in zip(*results, strict=True))


def check_one_token_attention(config, like: Tensor) -> float:
    """Return how far the fused form is off from that by hand, with a third of the slots hidden."""
    inputs = random_heads(config, tokens=1, slots=64, like=like)
    scaling = inputs[0].shape[-1] ** -0.5
    visible = lower_right(1, 64, device=like.device) & (torch.arange(64, device=like.device) < 40)
    mask = torch.zeros(1, 1, 1, 64, device=like.device, dtype=like.dtype)
    fast = one_token_attention(*inputs, mask.masked_fill(~visible, -torch.inf), scaling)
    return relative_difference(fast.transpose(1, 2), attention_by_hand(*inputs, visible, scaling))


def random_heads(config, *, tokens: int, slots: int, like: Tensor) -> list[Tensor]:
    """Return query (2, Hq, tokens, D), key and value (2, Hkv, slots, D): random numbers."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    shapes = ((2, heads, tokens, size), (2, shared, slots, size), (2, shared, slots, size))
    return [torch.randn(shape, device=like.device, dtype=like.dtype) for shape in shapes]


def attention_by_hand(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float
) -> Tensor:
    """Return softmax(q k^T scaling) v, (B, Hq, C, D), in at least fp32: no kernel's own attention.

    query (B, Hq, C, D), key and value (B, Hkv, slots, D), visible (C, slots) bool.
    """
    accurate = at_least_fp32(query.dtype)
    key, value = (repeat_heads(x, query).to(accurate) for x in (key, value))
    scores = query.to(accurate) @ key.transpose(-1, -2) * scaling
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
