"""Attention for sampling and scoring.

Dimension letters are in the legend of grpo.py. transformers' own layers call `attention`, which is
registered as IMPLEMENTATION. Its arguments tell which pass it serves:

    scoring   prompts and ragged completions packed into one sequence: `packing` is set
    decoding  one token per row against cached keys and values: a mask is set
    vision    the patches of all images: `windows` is set
    prefill   Q prompts of equal length, causal; any stock call takes this path too
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.fastpath import at_least_fp32, is_verified, relative_difference, verify

IMPLEMENTATION = "shared_prompt"  # name of `attention` in a model's config
FLASH = "flash attention over shared prompts"
DECODING = "fused single-token attention"


@dataclass(frozen=True)
class Packing:
    """Layout of one sequence of N tokens: Q prompts, then B ragged completions.

    N = Q * P + T, where T counts the tokens of all completions, row after row, without padding.
    """

    prompts: int  # Q
    prompt_length: int  # P
    group_size: int  # G
    longest: int  # C
    cells: Tensor  # (T,), index of each completion token in the flattened (B, C) grid
    visible: Tensor  # (C, P + C) bool, attention mask of a completion over its prompt and itself

    def in_prompts(self, x: Tensor) -> Tensor:
        """Return the prompts of x (N, heads, D) as (Q, heads, P, D)."""
        prompts = x[: self.prompts * self.prompt_length]
        return prompts.unflatten(0, (self.prompts, -1)).transpose(1, 2)

    def in_rows(self, x: Tensor) -> Tensor:
        """Return the completions of x (N, heads, D) as (B, heads, C, D), zero-padded."""
        rows = self.prompts * self.group_size
        grid = x.new_zeros(rows * self.longest, *x.shape[1:])
        grid.index_copy_(0, self.cells, x[self.prompts * self.prompt_length :])
        return grid.unflatten(0, (rows, -1)).transpose(1, 2)

    def in_rows_after_prompts(self, x: Tensor) -> Tensor:
        """Return each row's prompt and completion of x (N, heads, D), (B, heads, P + C, D)."""
        prefix = self.in_prompts(x)[:, None].expand(-1, self.group_size, -1, -1, -1)
        return torch.cat([prefix.flatten(0, 1), self.in_rows(x)], 2)

    def pack(self, prompts: Tensor, rows: Tensor) -> Tensor:
        """Return (N, heads, D) from the results of `in_prompts` and `in_rows`; drops padding."""
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
    """Return the attention output (rows, tokens, Hq, D) of query (rows, Hq, tokens, D).

    key and value are (rows, Hkv, slots, D); each KV head serves Hq / Hkv query heads. The
    signature is transformers'; None replaces the attention weights, which no caller uses.
    `windows` is the number of images and the number of windows: a block uses one or the other.
    """
    if packing is not None:
        return packed_attention(query[0], key[0], value[0], packing, scaling)[None], None
    if windows is not None:
        pieces = windows[0 if module.sees_whole_image else 1]
        return window_attention(query[0], key[0], value[0], pieces, scaling)[None], None
    if attention_mask is not None and attention_mask.is_floating_point() and query.shape[2] == 1:
        return one_token_attention(query, key, value, attention_mask, scaling), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **options
    )


AttentionInterface.register(IMPLEMENTATION, attention)
# without a mask function of that name, stock calls would ignore padding
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, pieces: int, scaling: float
) -> Tensor:
    """Return bidirectional attention within `pieces` equal windows, (patches, heads, D).

    query, key and value are (heads, patches, D). transformers would loop over the windows.
    """
    in_pieces = (x.unflatten(1, (pieces, -1)).transpose(0, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(*in_pieces, scale=scaling)
    return out.transpose(1, 2).flatten(0, 1)


def one_token_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """Return the attention output of one token per row, (B, 1, Hq, D).

    mask (1, 1, 1, S) is added to the scores, so it is no mask of booleans. One token needs no
    causal mask, so the query heads that share a KV head are passed as that many tokens: keys and
    values are not repeated.
    """
    rows, heads, _, size = query.shape
    query = query.reshape(rows, key.shape[1], -1, size)  # (B, Hkv, Hq / Hkv, D)
    if query.is_cuda and is_verified(DECODING):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:  # the CPU's kernel is made for many queries: plain matmuls are 2 x faster for a few
        scores = (query * scaling) @ key.transpose(-1, -2) + mask
        out = scores.softmax(-1) @ value
    return out.reshape(rows, 1, heads, size)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float
) -> Tensor:
    """Return causal attention over a packed sequence, (N, Hq, D).

    query (Hq, N, D), key and value (Hkv, N, D). A prompt attends to itself, a completion to its
    group's prompt and to itself. Only this function pads completions to (B, C); linear layers
    process no padding.
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

    query (B, Hq, C, D), key and value (B, Hkv, P + C, D), visible (C, P + C) bool. The GPU's flash
    kernel implements this causal mask itself and does not read `visible`.
    """
    mask, grouped = visible, True
    if query.is_cuda and is_verified(FLASH):
        mask = causal_lower_right(*visible.shape)
    elif query.is_cuda:  # no kernel takes a mask and shared heads: torch would store all scores
        key, value, grouped = repeat_heads(key, query), repeat_heads(value, query), False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped
    )


def repeat_heads(x: Tensor, query: Tensor) -> Tensor:
    """Return keys or values (B, Hkv, slots, D) repeated for all query heads, (B, Hq, slots, D)."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def lower_right(tokens: int, slots: int, *, device) -> Tensor:
    """Return the causal mask of the last `tokens` of `slots` positions, (tokens, slots) bool.

    >>> lower_right(2, 4, device="cpu").int()
    tensor([[1, 1, 1, 0],
            [1, 1, 1, 1]], dtype=torch.int32)
    """
    everything = torch.ones(tokens, slots, dtype=torch.bool, device=device)
    return everything.tril(slots - tokens)


# --- kernel checks ------------------------------------------------------------------------


def verify_attention(config, like: Tensor) -> None:
    """Check a GPU's attention kernels once, with a text config's heads and the dtype of `like`.

    Call it before the first layer runs; `fastpath.verify` says why.
    """
    if like.is_cuda:
        if like.dtype != torch.float32:  # which the flash kernel does not support
            verify(FLASH, lambda: check_suffix_attention(config, like))
        verify(DECODING, lambda: check_one_token_attention(config, like))


def check_suffix_attention(config, like: Tensor) -> float:
    """Return the largest relative error of flash attention, over output and gradients."""
    inputs = random_heads(config, tokens=24, slots=64, like=like)
    gradient, scaling = torch.randn_like(inputs[0]), inputs[0].shape[-1] ** -0.5
    visible = lower_right(24, 64, device=like.device)
    results = []
    for form in (suffix_attention, reference_attention):
        with torch.enable_grad():
            leaves = [x.clone().requires_grad_() for x in inputs]
            out = form(*leaves, visible, scaling)
            results.append([out, *torch.autograd.grad(out, leaves, gradient.to(out.dtype))])
    return max(relative_difference(fast, slow) for fast, slow in zip(*results, strict=True))


def check_one_token_attention(config, like: Tensor) -> float:
    """Return the relative error of the fused kernel, with 24 of 64 slots masked."""
    inputs = random_heads(config, tokens=1, slots=64, like=like)
    scaling = inputs[0].shape[-1] ** -0.5
    visible = lower_right(1, 64, device=like.device) & (torch.arange(64, device=like.device) < 40)
    mask = torch.zeros(1, 1, 1, 64, device=like.device, dtype=like.dtype)
    fast = one_token_attention(*inputs, mask.masked_fill(~visible, -torch.inf), scaling)
    return relative_difference(fast.transpose(1, 2), reference_attention(*inputs, visible, scaling))


def random_heads(config, *, tokens: int, slots: int, like: Tensor) -> list[Tensor]:
    """Return random query (2, Hq, tokens, D), key and value (2, Hkv, slots, D)."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    shapes = ((2, heads, tokens, size), (2, shared, slots, size), (2, shared, slots, size))
    return [torch.randn(shape, device=like.device, dtype=like.dtype) for shape in shapes]


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scaling: float
) -> Tensor:
    """Return softmax(q k^T scaling) v, (B, Hq, C, D), in at least fp32, without a fused kernel.

    query (B, Hq, C, D), key and value (B, Hkv, slots, D), visible (C, slots) bool.
    """
    accurate = at_least_fp32(query.dtype)
    key, value = (repeat_heads(x, query).to(accurate) for x in (key, value))
    scores = query.to(accurate) @ key.transpose(-1, -2) * scaling
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
