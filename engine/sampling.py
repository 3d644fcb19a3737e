"""Sample the completions of a whole step together, with transformers' own layers.

Dimension letters are in the legend of grpo.py; S = P + max_new_tokens, rounded up to a multiple of
8, is the number of KV-cache slots per row. Prefill processes each prompt once and copies its keys
and values to its G rows. Each decode step then samples one token per row: one pass over the weights
for the A rows that are not finished.

On a GPU the decode step is compiled and captured as a CUDA graph, where that works; its rows are
fixed, A = B. On a CPU the same code runs eagerly and drops finished rows.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from inspect import signature

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from engine.attention import verify_attention
from engine.fastpath import at_least_fp32, is_verified, matmul_fp32, relative_difference, verify
from engine.parallel import process_count, process_index
from engine.prompts import Prompts, embed_prompts

COMPILED = "torch.compile of the decoder layers"
CAPTURED = "a CUDA graph of the decode step"
MAX_CHARACTER_TOKENS = 4  # UTF-8 has at most four bytes
FINISHED_CHECK_EVERY = 8  # tokens; on a GPU the host waits for each check of the finished rows
LAYER_INPUTS = signature(Qwen2_5_VLDecoderLayer.forward).parameters
CACHE = "cache" if "cache" in LAYER_INPUTS else "past_key_values"  # renamed in transformers 5.24


@dataclass(frozen=True)
class Completions:
    """Sampled completions. Tokens after a row's first stop token are padding, outside the mask."""

    ids: Tensor  # (B, C)
    mask: Tensor  # (B, C) bool, true up to and including the stop token
    lengths: list[int]  # B, tokens per row: the mask's row sums
    logprobs: Tensor  # (B, C) fp32, under the distribution that the tokens were sampled from
    truncated: Tensor  # (B,) bool: hit the token limit without a stop token


class Cache:
    """KV cache of one layer for all rows; the layer itself fills it through `update`."""

    def __init__(self, shape: tuple[int, int, int, int], next_slot: Tensor, like: Tensor) -> None:
        self.keys = like.new_zeros(shape)  # (rows, Hkv, S, D)
        self.values = like.new_zeros(shape)
        self.next_slot = next_slot  # (1,), shared by all layers

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, and return those that its queries attend to.

        Decoding: one token of each of the first A rows, (A, Hkv, 1, D), goes to the next slot;
        returns all slots of these rows.
        Prefill: prompts, (Q, Hkv, P, D), go to the first slots of all rows of their groups;
        returns the prompts.
        """
        if key.shape[2] == 1:
            keys, values = self.keys[: len(key)], self.values[: len(key)]
            keys.index_copy_(2, self.next_slot, key)
            values.index_copy_(2, self.next_slot, value)
            return keys, values
        for slots, prompts in ((self.keys, key), (self.values, value)):
            rows = slots[:, :, : key.shape[2]].unflatten(0, (len(prompts), -1))
            rows.copy_(prompts[:, None])
        return key, value

    def float(self) -> "Cache":
        """Return a copy in fp32."""
        twin = copy.copy(self)
        twin.keys, twin.values = self.keys.float(), self.values.float()
        return twin


class Sampler:
    """Samples completions from one model, with its current weights.

    The first call allocates buffers; later calls reuse them while the number of rows and the prompt
    length stay the same, because a captured CUDA graph uses their addresses. For the same reason,
    change the model's weights in place only.
    """

    def __init__(self, model, *, max_new_tokens: int, pad_id: int) -> None:
        self.model, self.language_model = model, model.model.language_model
        self.max_new_tokens, self.pad_id = max_new_tokens, pad_id
        self.run_layer: Callable[..., Tensor] = call_layer
        self.advance: Callable[[], Tensor] = self.decode_step
        self.shape: tuple[int, int] | None = None  # rows and prompt length of the buffers

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        *,
        group_size: int,
        temperature: float,
        generator: torch.Generator | None = None,
    ) -> Completions:
        """Return G completions of each prompt; temperature 0 is greedy.

        Tokens are sampled from softmax(logits / temperature) alone: no top-k, no top-p, no
        penalties, whatever the checkpoint's generation_config says. All randomness comes from
        `generator`.
        """
        self.model.eval()
        shape = (len(prompts) * group_size, prompts.input_ids.shape[1])
        if shape != self.shape:
            self.make_buffers(*shape)
            self.prefill(prompts, group_size)  # the fast paths are checked after this prefill
            self.advance = self.fastest_decode_step()
        self.temperature.fill_(temperature or 1.0)
        hidden = self.prefill(prompts, group_size)
        self.make_noise(temperature, generator)
        self.sample_token(hidden)
        check_every = FINISHED_CHECK_EVERY if self.model.device.type == "cuda" else 1
        for count in range(1, self.max_new_tokens):
            if count % check_every == 0:
                if self.finished.all():  # host sync
                    break
                if self.advance == self.decode_step and self.run_layer is call_layer:
                    self.drop_finished_rows()
            self.make_noise(temperature, generator)
            self.advance()
        return self.completions()

    def make_buffers(self, rows: int, prompt_length: int) -> None:
        """Allocate every buffer that a decode step reads or writes."""
        config, self.shape = self.language_model.config, (rows, prompt_length)
        slots = -(-(prompt_length + self.max_new_tokens) // 8) * 8  # mask rows must be aligned
        weight = self.model.lm_head.weight
        head_size = config.hidden_size // config.num_attention_heads
        cache_shape = (rows, config.num_key_value_heads, slots, head_size)
        with torch.device(weight.device):
            self.stops = torch.tensor(stop_ids(self.model), dtype=torch.long)
            self.sampled = torch.zeros(1, dtype=torch.long)  # tokens per row so far
            self.next_slot = torch.zeros(1, dtype=torch.long)
            self.mask = torch.zeros(1, 1, 1, slots, dtype=weight.dtype)  # 0: visible, -inf: hidden
            self.rope = torch.zeros(  # cosines and sines of the completion positions
                2, rows, self.max_new_tokens, head_size, dtype=weight.dtype
            )
            self.every_row = torch.arange(rows)
            self.finished = torch.zeros(rows, dtype=torch.bool)
            self.ids = torch.zeros(rows, self.max_new_tokens, dtype=torch.long)
            accurate = at_least_fp32(weight.dtype)
            self.logprobs = torch.zeros(rows, self.max_new_tokens, dtype=accurate)
            self.all_noise = torch.zeros(process_count() * rows, len(weight), dtype=accurate)
            self.noise = self.all_noise[process_index() * rows :][:rows]
            self.temperature = torch.ones((), dtype=accurate)
        self.caches = [
            Cache(cache_shape, self.next_slot, weight) for _ in self.language_model.layers
        ]

    def prefill(self, prompts: Prompts, group_size: int) -> Tensor:
        """Reset the buffers, process each prompt once, return the rows' last states (B, hidden)."""
        embeds, positions, first = embed_prompts(self.model, prompts)
        rope = self.language_model.rotary_emb(embeds, positions)
        hidden = embeds
        for layer, cache in zip(self.language_model.layers, self.caches, strict=True):
            hidden = call_layer(layer, hidden, rope, None, cache)
        self.rows = self.every_row  # unfinished rows, (A,): the first A rows of each cache
        self.sampled.zero_()
        self.next_slot.fill_(embeds.shape[1])
        self.mask.fill_(-torch.inf)[..., : embeds.shape[1]] = 0
        ahead = first + torch.arange(self.max_new_tokens, device=first.device)  # (Q, tokens)
        ahead = ahead.repeat_interleave(group_size, 0).expand(3, -1, -1)  # time = height = width
        torch.stack(self.language_model.rotary_emb(embeds, ahead), out=self.rope)
        self.finished.zero_()
        self.ids.fill_(self.pad_id)
        self.logprobs.zero_()
        return self.language_model.norm(hidden[:, -1]).repeat_interleave(group_size, 0)

    def make_noise(self, temperature: float, generator: torch.Generator | None) -> None:
        """Fill in the next token's noise, log E with E = -log U ~ Exp(1); zeros if greedy.

        Runs outside the decode step, so that a captured step has no random state. Makes noise for
        the rows of all processes, so that a row's tokens do not depend on the number of processes.
        U = 0 gives infinite noise: that token is not sampled this time.
        """
        if temperature > 0:
            self.all_noise.uniform_(generator=generator)
            self.noise.log_().neg_().log_()
        else:
            self.noise.zero_()

    def decode_step(self) -> Tensor:
        """Feed each row its latest token and sample the next; return its logits (A, V).

        Runs device work on fixed buffers only: nothing depends on a value that the host must read.
        """
        latest = self.ids[self.rows, self.sampled - 1, None]  # (A, 1)
        self.mask.index_fill_(-1, self.next_slot, 0)
        hidden = self.language_model.embed_tokens(latest)
        rope = self.rope[:, self.rows, self.sampled - 1, None].unbind()  # (A, 1, D) each
        for layer, cache in zip(self.language_model.layers, self.caches, strict=True):
            hidden = self.run_layer(layer, hidden, rope, self.mask, cache)
        self.next_slot += 1
        return self.sample_token(self.language_model.norm(hidden)[:, 0])

    def sample_token(self, hidden: Tensor) -> Tensor:
        """Sample and store one token per row from states (A, hidden); return its logits (A, V).

        Gumbel-max trick: argmax(logits - log E) with E ~ Exp(1) is a sample of softmax(logits),
        without a cumulative sum over the vocabulary and without a host sync.
        """
        logits = matmul_fp32(hidden, self.model.lm_head.weight.T).div_(self.temperature)
        token = (logits - self.noise[self.rows]).argmax(-1)  # (A,)
        logprob = logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)
        finished = self.finished[self.rows]
        token = token.masked_fill(finished, self.pad_id)
        self.ids[self.rows, self.sampled] = token
        self.logprobs[self.rows, self.sampled] = logprob.masked_fill(finished, 0)
        self.finished[self.rows] = finished | torch.isin(token, self.stops)
        self.sampled += 1
        return logits

    def drop_finished_rows(self) -> None:
        """Drop the finished rows; the last unfinished rows take their places in the caches.

        Not for a captured or compiled step, whose number of rows is fixed.
        """
        ended = self.finished[self.rows]
        if not ended.any():  # host sync
            return
        remaining = int((~ended).sum())  # host sync
        free = ended[:remaining].nonzero()[:, 0]  # host sync
        moved = remaining + (~ended[remaining:]).nonzero()[:, 0]  # host sync
        self.rows = self.rows.index_copy(0, free, self.rows[moved])[:remaining]
        for cache in self.caches:
            for slots in (cache.keys, cache.values):
                slots[free] = slots[moved]

    def completions(self) -> Completions:
        """Return copies of the sampled tokens and log-probs, trimmed to the longest row."""
        is_stop = torch.isin(self.ids, self.stops)
        before = is_stop.cumsum(1) - is_stop.long()  # stop tokens to the left
        mask = before == 0
        lengths = mask.sum(1).tolist()  # host sync
        longest = max(lengths)
        return Completions(
            ids=self.ids[:, :longest].clone(),
            mask=mask[:, :longest].clone(),
            lengths=lengths,
            logprobs=self.logprobs[:, :longest].clone(),
            truncated=~self.finished,
        )

    # --- compiled and captured decode step --------------------------------------------

    def fastest_decode_step(self) -> Callable[[], Tensor]:
        """Return `decode_step`, on a GPU compiled and captured if these pass their checks."""
        if (
            self.model.device.type != "cuda" or self.max_new_tokens == 1
        ):  # no decode step to speed up
            return self.decode_step
        verify_attention(self.language_model.config, self.model.lm_head.weight)
        if is_verified(COMPILED):  # for other shapes; the compiler refuses more than 8
            torch.compiler.reset()
        if verify(COMPILED, self.check_compiled):
            self.run_layer = compile_layer()
        if verify(CAPTURED, self.check_captured):
            self.try_decode_step(self.decode_step)  # compile before the capture
            return CapturedGraph(self.decode_step)
        return self.decode_step

    def check_compiled(self) -> float:
        """Return the worst error of the compiled layers, each compared alone by `compare_layer`.

        Comparing logits does not work: over 28 layers, bf16 rounding takes two correct
        implementations 1 to 4 % apart.
        """
        differences: list[float] = []
        self.run_layer = partial(compare_layer, compile_layer(), differences)
        try:
            self.try_decode_step(self.decode_step)
        finally:
            self.run_layer = call_layer
        return torch.tensor(differences).max().item()  # nan if any is

    def check_captured(self) -> float:
        """Return the relative error of the logits of a captured and replayed step."""
        slow = self.try_decode_step(self.decode_step)
        return relative_difference(self.try_decode_step(CapturedGraph(self.decode_step)), slow)

    def try_decode_step(self, advance: Callable[[], Tensor]) -> Tensor:
        """Return the logits of the first step after prefill, taken by `advance`, and undo it."""
        self.sampled.fill_(1)  # as if padding had been sampled as the first token
        logits = advance().clone()
        self.next_slot -= 1
        self.finished.zero_()
        return logits


class CapturedGraph:
    """A function captured as a CUDA graph: each call replays its kernels on the same addresses."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            # thread_local: other threads, such as the loader's, may use the GPU during the capture
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.result = step()
        except BaseException:
            abort_capture(stream, pool)
            raise

    def __call__(self) -> Tensor:
        """Replay the graph and return the result: always the same tensor, with new values."""
        self.graph.replay()
        return self.result


def abort_capture(stream, pool: tuple[int, int]) -> None:
    """Clean up after a failed capture: torch leaves its own stream current and its pool in use."""
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError, AttributeError):  # some torch versions do this themselves
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)


def compile_layer() -> Callable[..., Tensor]:
    """Return `call_layer` compiled: one graph for all layers, since each call gets its cache."""
    return torch.compile(call_layer, fullgraph=True, dynamic=False)


def call_layer(layer, hidden: Tensor, rope: tuple, mask: Tensor | None, cache: Cache) -> Tensor:
    """Return the output of a transformers decoder layer; `rope` is cosines and sines."""
    return layer(hidden, attention_mask=mask, position_embeddings=rope, **{CACHE: cache})


def compare_layer(
    compiled: Callable[..., Tensor],
    differences: list[float],
    layer,
    hidden: Tensor,
    rope: tuple,
    mask: Tensor,
    cache: Cache,
) -> Tensor:
    """Return `call_layer`'s output; append the compiled layer's excess errors to `differences`.

    Both layers are compared with the layer in fp32. In bf16 with huge activations, as trained
    models have, any correct implementation is far off: the compiled layer's error may be 1.5 times
    the uncompiled one's.
    """
    exact = changes(
        call_layer,
        copy.deepcopy(layer).float(),
        hidden.float(),
        tuple(x.float() for x in rope),
        mask.float(),
        cache.float(),
    )
    fast, plain = (changes(run, layer, hidden, rope, mask, cache) for run in (compiled, call_layer))
    for of_fast, of_plain, of_exact in zip(fast, plain, exact, strict=True):
        allowed = 1.5 * relative_difference(of_plain, of_exact)
        differences.append(relative_difference(of_fast, of_exact) - allowed)
    return hidden + plain[0].to(hidden.dtype)


def changes(
    run: Callable[..., Tensor], layer, hidden: Tensor, rope: tuple, mask: Tensor, cache: Cache
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a layer adds to the hidden states, and the keys and values that it caches."""
    slots = (cache.keys, cache.values)
    for each in slots:
        each.index_fill_(2, cache.next_slot, 0)  # or stale values would pass the check
    added = run(layer, hidden, rope, mask, cache).float() - hidden.float()
    return added, *(each.index_select(2, cache.next_slot) for each in slots)


def make_generator(device: str, *numbers: int) -> torch.Generator:
    """Return a generator whose state depends only on `numbers`, such as seed and step."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator(device).manual_seed(int(state))


def completion_texts(processor, completions: Completions, stops: list[int]) -> list[str]:
    """Return the text of each row, exactly as sampled, without its stop token."""
    ids = completions.ids.tolist()  # host sync
    return [
        processor.tokenizer.decode([token for token in row[:length] if token not in stops])
        for row, length in zip(ids, completions.lengths, strict=True)
    ]


def token_texts(processor, ids: Tensor, lengths: list[int]) -> list[list[str]]:
    """Return the text of each token of the rows (B, C), with the stop token.

    A character of several tokens is the text of its last one; the others have none.
    """
    rows = zip(ids.tolist(), lengths, strict=True)  # host sync
    return [split_text(processor.tokenizer, row[:length]) for row, length in rows]


def split_text(tokenizer, row: list[int]) -> list[str]:
    """Return the text of each token. They join to the text of the row."""
    texts, begun = [], []
    for token in row:
        begun.append(token)
        text = tokenizer.decode(begun)
        is_part = text.endswith("\N{REPLACEMENT CHARACTER}") and len(begun) < MAX_CHARACTER_TOKENS
        texts.append("" if is_part else text)
        begun = begun if is_part else []
    if begun:  # the row ends within a character
        texts[-1] = tokenizer.decode(begun)
    return texts


def stop_ids(model) -> list[int]:
    """Return all token ids that end a completion: Qwen's chat models have two."""
    ids = model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)
