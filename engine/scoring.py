"""Score completions: the log-prob of every token under a model, in one packed pass.

Dimension letters are in the legend of grpo.py; T counts the tokens of all completions. The Q
prompts and their B ragged completions form one sequence of N = Q * P + T tokens, so each prompt is
processed once, not once per completion, and only attention pads. The same pass serves the policy,
with gradients, and the reference, without.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.attention import IMPLEMENTATION, Packing, lower_right, verify_attention
from engine.fastpath import matmul_fp32
from engine.prompts import Prompts, embed_prompts, send
from engine.sizes import free_memory

CHUNK = 1024  # completion tokens with logits in memory at once
HEADROOM = 0.08  # share of memory left free when choosing the layers to checkpoint


def completion_logprobs(
    model,
    prompts: Prompts,
    completion_ids: Tensor,
    lengths: list[int],
    *,
    temperature: float,
    checkpoint_layers: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return every completion token's log-prob and its distribution's entropy, (B, C) each.

    The distribution is softmax(logits / temperature) in fp32. Rows are group-major, and zero beyond
    their length. Log-probs are differentiable, through the vision tower too, where gradients are
    enabled; entropies never are. The backward pass recomputes `checkpoint_layers` layers; None: as
    few as fit in memory.
    """
    language_model = model.model.language_model
    embeds, positions, first = embed_prompts(model, prompts)
    packing, predictors = pack(completion_ids.shape, lengths, embeds.shape[:2], embeds.device)
    group_size, rows = packing.group_size, len(lengths)
    targets = completion_ids.flatten().index_select(0, packing.cells)  # (T,)
    offsets = torch.arange(packing.longest, device=embeds.device)
    positions_in_rows = first.repeat_interleave(group_size, 0) + offsets  # (B, C)
    positions_of_targets = positions_in_rows.flatten().index_select(0, packing.cells)
    hidden = forward_packed(
        language_model,
        torch.cat([embeds.flatten(0, 1), language_model.embed_tokens(targets)]),
        torch.cat([positions.flatten(1), positions_of_targets.expand(3, -1)], 1),
        packing,
        checkpoint_layers,
    )
    border = packing.prompts * packing.prompt_length
    last_of_prompts = hidden[:border].unflatten(0, embeds.shape[:2])[:, -1]
    states = torch.cat([last_of_prompts.repeat_interleave(group_size, 0), hidden[border:]])
    per_token = ChunkedLogprobs.apply(
        states.index_select(0, predictors), model.lm_head.weight, targets, temperature
    )
    return tuple(
        values.new_zeros(rows * packing.longest).index_copy(0, packing.cells, values).view(rows, -1)
        for values in per_token
    )


def pack(
    grid: tuple[int, int], lengths: list[int], prompt_grid: tuple[int, int], device
) -> tuple[Packing, Tensor]:
    """Return the packed layout, and the index of the state that predicts each token, (T,).

    `grid` is (B, C), `prompt_grid` (Q, P). States are indexed in this order: the last prompt state
    of each of the B rows, then the T states of the completion tokens. The host builds all indices
    from the lengths, so no device work depends on their values.
    """
    (rows, longest), (prompts, prompt_length) = grid, prompt_grid
    column = torch.arange(longest).expand(rows, -1)
    in_completion = column < torch.tensor(lengths)[:, None]  # (B, C)
    cells = in_completion.flatten().nonzero()[:, 0]  # (T,)
    previous = rows + torch.arange(len(cells)) - 1
    predictors = torch.where(cells % longest == 0, cells // longest, previous)
    packing = Packing(
        prompts=prompts,
        prompt_length=prompt_length,
        group_size=rows // prompts,
        longest=longest,
        cells=send(cells, device),
        visible=lower_right(longest, prompt_length + longest, device=device),
    )
    return packing, send(predictors, device)


def forward_packed(
    language_model,
    embeds: Tensor,
    positions: Tensor,
    packing: Packing,
    checkpoint_layers: int | None,
) -> Tensor:
    """Return the last hidden states (N, hidden) from embeds (N, hidden) and positions (3, N).

    The first `checkpoint_layers` layers store only their input; the backward pass recomputes them.
    """
    if language_model.config._attn_implementation != IMPLEMENTATION:
        raise RuntimeError("call engine.loading.use_own_attention(model) before scoring")
    verify_attention(language_model.config, embeds)
    hidden = embeds[None]
    rope = language_model.rotary_emb(hidden, positions[:, None])
    options = {"attention_mask": None, "position_embeddings": rope, "packing": packing}
    if not torch.is_grad_enabled():
        checkpoint_layers = 0
    elif checkpoint_layers is None:
        cells = packing.prompts * packing.group_size * packing.longest
        checkpoint_layers = layers_to_checkpoint(language_model, len(embeds), cells)
    for number, layer in enumerate(language_model.layers):
        if number < checkpoint_layers:
            hidden = checkpoint(
                layer, hidden, use_reentrant=False, preserve_rng_state=False, **options
            )
        else:
            hidden = layer(hidden, **options)
    return language_model.norm(hidden)[0]


# --- memory -----------------------------------------------------------------------------


def layers_to_checkpoint(language_model, tokens: int, cells: int) -> int:
    """Return how many layers a pass over `tokens` packed tokens must checkpoint to fit in memory.

    Memory peaks when the backward pass starts, with all stored activations and the buffers of
    `ChunkedLogprobs`; later, a layer's freed activations make room for its gradients. So the free
    memory, less those buffers and HEADROOM, must hold `activation_bytes` of every other layer.
    """
    config, device = language_model.config, language_model.device
    free, total = free_memory(device)
    trained = language_model.embed_tokens.weight.requires_grad
    each = activation_bytes(config, language_model.dtype, tokens, cells, trained=trained)
    budget = free - HEADROOM * total - logprobs_bytes(config, cells, trained=trained)
    return max(0, config.num_hidden_layers - max(0, int(budget / each)))


def activation_bytes(config, dtype: torch.dtype, tokens: int, cells: int, *, trained: bool) -> int:
    """Return about how many bytes a decoder layer stores for the backward pass.

    Counted on transformers' layers: per packed token, 4 vectors of the MLP's inner width and 9 of
    the hidden width (6.5 if only adapters are trained); per cell (B, C) of the completions padded
    in attention, 4 of the hidden width.
    """
    hidden = (9 if trained else 6.5) * tokens + 4 * cells
    return int(
        dtype.itemsize * (4 * config.intermediate_size * tokens + config.hidden_size * hidden)
    )


def logprobs_bytes(config, tokens: int, *, trained: bool) -> int:
    """Return the peak memory of `ChunkedLogprobs` for `tokens` tokens, in bytes.

    Forward: the logits of a chunk in fp32, and twice as much inside logsumexp. Backward, if the
    output embeddings are trained: their gradient in fp32, a chunk's part of it, and d logits.
    """
    logits = min(tokens, CHUNK) * config.vocab_size
    backward = trained * (2 * 4 * config.vocab_size * config.hidden_size + 4 * logits)
    return max(3 * 4 * logits, backward)


# --- log-probs --------------------------------------------------------------------------


class ChunkedLogprobs(torch.autograd.Function):
    """log softmax(states @ weight.T / temperature)[target], without storing logits.

    The logits of 6,000 tokens with a vocabulary of 152,064 take 3.4 GiB in fp32, and softmax and
    gradient as much again. This function holds one chunk's logits at a time; the backward pass
    recomputes them.
    """

    @staticmethod
    def forward(
        ctx, states: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies, (T,) each in at least fp32; entropies have no gradient.

        states (T, hidden), weight (V, hidden), targets (T,).
        """
        parts = [
            chunk_logprobs(states[chunk], weight, targets[chunk], temperature)
            for chunk in chunks_of(len(states))
        ]
        logprobs, entropy, log_normalizer = (torch.cat(each) for each in zip(*parts, strict=True))
        ctx.save_for_backward(states, weight, targets, log_normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient: Tensor, _) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return d logits @ weight, and d logits.T @ states summed over the chunks in fp32."""
        states, weight, targets, log_normalizer = ctx.saved_tensors
        for_states, for_weight = ctx.needs_input_grad[:2]
        states_gradient = torch.empty_like(states) if for_states else None
        weight_gradient = None
        if for_weight:
            weight_gradient = torch.zeros_like(weight, dtype=log_normalizer.dtype)
        for chunk in chunks_of(len(states)):
            d_logits = chunk_gradient(
                states[chunk],
                weight,
                targets[chunk],
                log_normalizer[chunk],
                gradient[chunk],
                ctx.temperature,
            )
            if for_states:
                states_gradient[chunk] = d_logits @ weight
            if for_weight:
                weight_gradient += matmul_fp32(d_logits.T, states[chunk])
        if for_weight:
            weight_gradient = weight_gradient.to(weight.dtype)
        return states_gradient, weight_gradient, None, None


def chunks_of(tokens: int) -> list[slice]:
    """Return slices of at most CHUNK tokens that cover all tokens."""
    return [slice(start, start + CHUNK) for start in range(0, tokens, CHUNK)]


def chunk_logprobs(
    states: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs, entropies and log-normalizers, (chunk,) each."""
    logits = matmul_fp32(states, weight.T).div_(temperature)  # (chunk, V), freed on return
    log_normalizer = logits.logsumexp(-1)
    logprobs = logits.gather(1, targets[:, None])[:, 0] - log_normalizer
    probabilities = (logits - log_normalizer[:, None]).exp_()
    entropy = log_normalizer - probabilities.mul_(logits).sum(-1)
    return logprobs, entropy, log_normalizer


def chunk_gradient(
    states: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_normalizer: Tensor,
    gradient: Tensor,
    temperature: float,
) -> Tensor:
    """Return the gradient of a chunk's logits, (chunk, V), from that of its log-probs, (chunk,).

    d logprob / d logits = one-hot(target) - softmax(logits), divided by the temperature.
    """
    logits = matmul_fp32(states, weight.T).div_(temperature)
    d_logits = logits.sub_(log_normalizer[:, None]).exp_().neg_()
    d_logits.scatter_add_(1, targets[:, None], torch.ones_like(d_logits[:, :1]))
    return d_logits.mul_(gradient[:, None] / temperature).to(states.dtype)
