"""Sampling: the completions of a whole step, decoded together by transformers' own layers.

Letters are those of the legend in grpo.py; S = P + the most new tokens is the number of key-value
slots of a row. Each prompt is read once and its keys and values handed to its G rows. Then every
row gets one token per decoding step: one pass over the weights draws A tokens, of the A rows that
go on.

On a GPU the decoding step is compiled and recorded as a CUDA graph, where that works: with fixed
rows, A = B. On a CPU the same code runs as it stands, and rows that have ended cost nothing more.
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

from engine.attention import trust_attention
from engine.fastpath import at_least_fp32, is_trusted, matmul_fp32, relative_difference, trusted
from engine.parallel import process_count, process_index
from engine.prompts import Prompts, embed_prompts

COMPILED = "torch.compile of the decoder layers"
CAPTURED = "a CUDA graph of the decoding step"
FINISHED_CHECK_EVERY = 8  # tokens: on a GPU, where the host must wait to see that all have ended
LAYER_INPUTS = signature(Qwen2_5_VLDecoderLayer.forward).parameters
CACHE = "cache" if "cache" in LAYER_INPUTS else "past_key_values"  # transformers 5.24 renamed it


@dataclass(frozen=True)
class Completions:
    """What was sampled. Tokens after a row's first stop token are padding and not in the mask."""

    ids: Tensor  # (B, C)
    mask: Tensor  # (B, C) bool; the stop token belongs to the completion
    lengths: list[int]  # B, of the mask's rows
    logprobs: Tensor  # (B, C) fp32, under the distribution the token was drawn from
    truncated: Tensor  # (B,) bool: reached the limit without a stop token


class Cache:
    """Keys and values of one layer in all rows, filled through `update` by the layer itself."""

    def __init__(self, shape: tuple[int, int, int, int], next_slot: Tensor, like: Tensor) -> None:
        self.keys = like.new_zeros(shape)  # (rows, Hkv, S, D)
        self.values = like.new_zeros(shape)
        self.next_slot = next_slot  # (1,), the same tensor for all layers

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Keep what a layer has computed, and return what its queries may look at.

        One token of each of the first A rows, (A, Hkv, 1, D), goes to the next slot; all slots of
        these rows are returned.
        Prompts, (Q, Hkv, P, D), go to the first slots of all rows of their groups.
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
    """Draws completions from one model, whatever its weights are at the time.

    Its buffers are made at the first call and reused as long as the number of rows and the length
    of the prompts stay the same: a recorded step knows them by their addresses. For the same reason
    the model's weights may be changed in place only.
    """

    def __init__(self, model, *, max_new_tokens: int, pad_id: int) -> None:
        self.model, self.language_model = model, model.model.language_model
        self.max_new_tokens, self.pad_id = max_new_tokens, pad_id
        self.run_layer: Callable[..., Tensor] = call_layer
        self.advance: Callable[[], Tensor] = self.decode_step
        self.shape: tuple[int, int] | None = None  # rows and prompt length the buffers are for

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

        Tokens are drawn from softmax(logits / temperature) and nothing else: no top-k, no top-p, no
        penalties, whatever the checkpoint's generation_config says. All randomness is the
        generator's.
        """
        self.model.eval()
        shape = (len(prompts) * group_size, prompts.input_ids.shape[1])
        if shape != self.shape:
            self.make_buffers(*shape)
            self.prefill(prompts, group_size)  # fast forms are tried behind these prompts
            self.advance = self.fastest_decode_step()
        self.temperature.fill_(temperature or 1.0)
        hidden = self.prefill(prompts, group_size)
        self.make_noise(temperature, generator)
        self.sample_token(hidden)
        check_every = FINISHED_CHECK_EVERY if self.model.device.type == "cuda" else 1
        for drawn in range(1, self.max_new_tokens):
            if drawn % check_every == 0:
                if self.finished.all():  # host sync
                    break
                if self.advance == self.decode_step and self.run_layer is call_layer:
                    self.drop_finished_rows()
            self.make_noise(temperature, generator)
            self.advance()
        return self.completions()

    def make_buffers(self, rows: int, prompt_length: int) -> None:
        """Make everything a decoding step reads and writes, for so many rows."""
        config, self.shape = self.language_model.config, (rows, prompt_length)
        slots = -(-(prompt_length + self.max_new_tokens) // 8) * 8  # a mask's rows must be aligned
        weight = self.model.lm_head.weight
        head_size = config.hidden_size // config.num_attention_heads
        cache_shape = (rows, config.num_key_value_heads, slots, head_size)
        with torch.device(weight.device):
            self.stops = torch.tensor(stop_ids(self.model), dtype=torch.long)
            self.sampled = torch.zeros(1, dtype=torch.long)  # tokens per row so far
            self.next_slot = torch.zeros(1, dtype=torch.long)
            self.mask = torch.zeros(1, 1, 1, slots, dtype=weight.dtype)  # 0 seen, -inf hidden
            self.rope = torch.zeros(  # cosines and sines of the completion's positions
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
        """Start afresh: read each prompt once, return the rows' last states (B, hidden)."""
        embeds, positions, first = embed_prompts(self.model, prompts)
        rope = self.language_model.rotary_emb(embeds, positions)
        hidden = embeds
        for layer, cache in zip(self.language_model.layers, self.caches, strict=True):
            hidden = call_layer(layer, hidden, rope, None, cache)
        self.rows = self.every_row  # those that go on, (A,): they have the first slots of a cache
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
        """Draw the next token's noise, log E with E = -log U ~ Exp(1); none if greedy.

        It is made outside of the step, so that a recorded step holds no randomness of its own, and
        for the rows of all processes: a row's tokens do not depend on how many there are.
        U = 0 makes it infinite: that word is not drawn this time.
        """
        if temperature > 0:
            self.all_noise.uniform_(generator=generator)
            self.noise.log_().neg_().log_()
        else:
            self.noise.zero_()

    def decode_step(self) -> Tensor:
        """Feed each row its latest token, draw the next; return the logits (A, V) it is drawn from.

        Device work on fixed buffers only: nothing here depends on a value the host would know.
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
        """Draw one token per row from states (A, hidden), note it; return its logits (A, V).

        The Gumbel-max trick: argmax(logits - log E) with E ~ Exp(1) is a sample of softmax(logits),
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
        """Go on without the rows that have ended; the last rows take their places in the caches.

        Not for a recorded or compiled step, which is made for so many rows.
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
        """Return copies of what has been drawn, as wide as the longest row."""
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

    # --- the same step, faster --------------------------------------------------------

    def fastest_decode_step(self) -> Callable[[], Tensor]:
        """Return `step`; on a GPU compiled and recorded, where that gives the same logits."""
        if self.model.device.type != "cuda" or self.max_new_tokens == 1:  # nothing to step to
            return self.decode_step
        trust_attention(self.language_model.config, self.model.lm_head.weight)
        if is_trusted(COMPILED):  # compiled for other shapes: of more than 8 it would refuse
            torch.compiler.reset()
        if trusted(COMPILED, self.check_compiled):
            self.run_layer = compile_layer()
        if trusted(CAPTURED, self.check_captured):
            self.try_decode_step(
                self.decode_step
            )  # compiles, if need be: a recording must not see that
            return CapturedGraph(self.decode_step)
        return self.decode_step

    def check_compiled(self) -> float:
        """Return how far compiled layers are off, each on its own: the worst of `compare_layer`.

        The logits would not do: in bf16 the roundings of 28 layers take two right forms 1 to 4 %
        apart.
        """
        differences: list[float] = []
        self.run_layer = partial(compare_layer, compile_layer(), differences)
        try:
            self.try_decode_step(self.decode_step)
        finally:
            self.run_layer = call_layer
        return torch.tensor(differences).max().item()  # nan, if one is

    def check_captured(self) -> float:
        """Return how far the logits are off when the step is recorded and replayed."""
        slow = self.try_decode_step(self.decode_step)
        return relative_difference(self.try_decode_step(CapturedGraph(self.decode_step)), slow)

    def try_decode_step(self, advance: Callable[[], Tensor]) -> Tensor:
        """Return the logits of a step taken right after the prompts with `advance`; undo it."""
        self.sampled.fill_(1)  # as if a first token, the padding, had been drawn
        logits = advance().clone()
        self.next_slot -= 1
        self.finished.zero_()
        return logits


class CapturedGraph:
    """A function's device work as a CUDA graph: the same kernels on the same addresses, at once."""

    def __init__(self, step: Callable[[], Tensor]) -> None:
        self.graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            # records, does not run; what other threads do meanwhile (the loader's) is no matter
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.result = step()
        except BaseException:
            abort_capture(stream, pool)
            raise

    def __call__(self) -> Tensor:
        """Replay, and return the result: always the same tensor, with new values."""
        self.graph.replay()
        return self.result


def abort_capture(stream, pool: tuple[int, int]) -> None:
    """Undo what torch leaves of a failed recording: its own stream is current, its pool in use."""
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError, AttributeError):  # some versions have done so themselves
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)


def compile_layer() -> Callable[..., Tensor]:
    """Return `call_layer` compiled: one graph for all layers, since each gets its own cache."""
    return torch.compile(call_layer, fullgraph=True, dynamic=False)


def call_layer(layer, hidden: Tensor, rope: tuple, mask: Tensor | None, cache: Cache) -> Tensor:
    """Return the output of one of transformers' decoder layers; `rope` are cosines and sines."""
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
    """Return `call_layer` of a layer; note how much farther off a compiled one is than it may be.

    Both are held against the layer in fp32. Where bf16 rounds to huge values, as trained models
    have, any right form is far off: the compiled one may be half again as far as the plain one.
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
    """Return what a layer adds to its rows' states, and the keys and values that it has kept."""
    slots = (cache.keys, cache.values)
    for each in slots:
        each.index_fill_(2, cache.next_slot, 0)  # or what was there before would do
    added = run(layer, hidden, rope, mask, cache).float() - hidden.float()
    return added, *(each.index_select(2, cache.next_slot) for each in slots)


def make_generator(device: str, *numbers: int) -> torch.Generator:
    """Return random numbers that are a function of some numbers, such as seed and step, alone."""
    (state,) = np.random.SeedSequence(numbers).generate_state(1)
    return torch.Generator(device).manual_seed(int(state))


def completion_texts(processor, completions: Completions, stops: list[int]) -> list[str]:
    """Return the text of each row, exactly as sampled, without its stop token."""
    ids = completions.ids.tolist()  # host sync
    return [
        processor.tokenizer.decode([token for token in row[:length] if token not in stops])
        for row, length in zip(ids, completions.lengths, strict=True)
    ]


def stop_ids(model) -> list[int]:
    """Return all token ids that end a completion: Qwen's chat models have two."""
    ids = model.generation_config.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)
