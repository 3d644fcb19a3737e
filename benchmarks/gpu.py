"""Check and time every fast path at the true shape of Qwen2.5-VL, with random weights.

    python benchmarks/gpu.py                     # 7B, all weights: a GPU with 139 GiB
    python benchmarks/gpu.py --run 7b-adapters   # 7B, LoRA adapters: 80 GB
    python benchmarks/gpu.py --run 3b            # 3B, all weights: 80 GB
    python benchmarks/gpu.py --device cpu        # the same code at toy size: no real timings
    python benchmarks/gpu.py --floors            # only the floors, for cards with known rates

A step has 4 plots of 224 x 224 pixels with 8 completions each, 150 tokens on average and 250 at
most. The floor of a phase is the least time in which the card can read the weights and the filled
key-value slots, or multiply the matrices, at the rates that check 0 measures.
"""

import argparse
import copy
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import optimi
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from config import Config
from engine import fastpath
from engine.attention import (
    DECODING,
    FLASH,
    check_suffix_attention,
    lower_right,
    one_token_attention,
    suffix_attention,
)
from engine.fastpath import (
    check_matmul,
    matmul_fp32,
    prepare_gpu,
    relative_difference,
    verify_triton,
)
from engine.loading import Loaded, add_adapter, trainable, use_own_attention
from engine.passes import PassSize
from engine.prompts import Prompts, embed_prompts, encode_images
from engine.sampling import CAPTURED, COMPILED, Completions, Sampler, make_generator
from engine.scoring import completion_logprobs
from engine.sizes import GIB, shape_config, trained_count
from grpo import Rollout, add_reference_logprobs, update
from harness.checkpoint import save_shard
from harness.memory import TEXT_TOKENS
from harness.metrics import Stopwatch

TOKEN = "ms a token"  # one decode step, all rows
ROLLOUT = "images, prompts, decoding"
REFERENCE = "reference"
UPDATE = "policy, log-probs, gradients, clip"
OPTIMIZER = "7. AdamW"


@dataclass(frozen=True)
class Shape:
    """The shape of a model and of a step."""

    config: Qwen2_5_VLConfig
    text_tokens: int  # per prompt, besides 64 image tokens
    longest: int  # tokens of the longest completion
    mean: int  # tokens per completion
    limit: int  # --max-new-tokens
    prompts: int = 4
    group_size: int = 8
    lora_rank: int = 0

    @property
    def prompt_length(self) -> int:
        """Return P, the tokens per prompt."""
        return self.text_tokens + 64

    @property
    def lengths(self) -> list[int]:
        """Return ragged completion lengths with this mean and maximum."""
        low = 2 * self.mean - self.longest
        spread = torch.linspace(low, self.longest, self.rows).long().tolist()
        return [spread[(11 * row) % self.rows] for row in range(self.rows)]

    @property
    def rows(self) -> int:
        """Return B, the completions per step."""
        return self.prompts * self.group_size


RUNS = {  # model and adapter rank; 0: all weights
    "7b": ("Qwen/Qwen2.5-VL-7B-Instruct", 0),
    "7b-adapters": ("Qwen/Qwen2.5-VL-7B-Instruct", 32),
    "3b": ("Qwen/Qwen2.5-VL-3B-Instruct", 0),
}


def true_shape(run: str) -> Shape:
    """Return the shape of one of RUNS at the default step."""
    model, rank = RUNS[run]
    return Shape(shape_config(model), TEXT_TOKENS, 250, 150, 512, lora_rank=rank)


def toy_shape() -> Shape:
    """Return a shape that a CPU computes in seconds."""
    text = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    ids = {"image_token_id": 511, "video_token_id": 510, "vision_start_token_id": 509}
    ids |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = Qwen2_5_VLConfig(text_config=text | ids, vision_config=vision, **ids)
    return Shape(config, 20, 10, 6, 16)


@dataclass(frozen=True)
class Card:
    """The peak rates of a GPU."""

    bytes_per_s: float  # read or written
    flops_per_s: float  # bf16 products


CARDS = {  # measured once on one card each: a copy, and a product of 8192 x 8192 matrices
    "H100 80GB": Card(3.0e12, 798e12),
    "H200": Card(4.3e12, 790e12),
}


def floors_ms(shape: Shape, card: Card) -> dict[str, float]:
    """Return the least time of each phase of a step, and of one decode step, in ms."""
    text, vision = shape.config.text_config, shape.config.vision_config
    hidden, size = text.hidden_size, text.hidden_size // text.num_attention_heads
    keys = text.num_key_value_heads * size
    layer = 2 * hidden * (hidden + keys) + 3 * hidden * text.intermediate_size
    layers, head = text.num_hidden_layers * layer, text.vocab_size * hidden
    tower = vision.depth * vision.hidden_size
    tower *= 4 * vision.hidden_size + 3 * vision.intermediate_size
    tokens, patches = sum(shape.lengths), 256 * shape.prompts
    packed, prompt = shape.prompts * shape.prompt_length + tokens, shape.prompt_length
    pairs = shape.prompts * prompt**2 / 2 + sum(n * (prompt + n / 2) for n in shape.lengths)
    attention = 2 * text.num_hidden_layers * hidden * pairs  # multiply-adds, like the rest
    forward = 2 * (layers * packed + attention + head * tokens + tower * patches)
    # backward: gradients of activations and, if trained, of weights; logits are recomputed
    passes = 2 if shape.lora_rank else 3
    update = 2 * (passes * layers * packed + 3 * attention + (passes + 1) * head * tokens)
    update += 0 if shape.lora_rank else 2 * 2 * tower * patches  # its forward pass: ROLLOUT
    filled = shape.rows * (shape.prompt_length + shape.longest / 2)
    token = 2 * (layers + head) + 2 * 2 * text.num_hidden_layers * keys * filled
    prompts = 2 * (layers * shape.prompts * shape.prompt_length + tower * patches)
    decoding, trained = 1e3 * token / card.bytes_per_s, trained_parameters(shape)
    return {
        TOKEN: decoding,
        ROLLOUT: 1e3 * prompts / card.flops_per_s + (shape.longest - 1) * decoding,
        REFERENCE: 1e3 * forward / card.flops_per_s,
        # plus one read of the gradients, for their norm
        UPDATE: 1e3 * (update / card.flops_per_s + 2 * trained / card.bytes_per_s),
        OPTIMIZER: 1e3 * 18 * trained / card.bytes_per_s,  # reads five tensors, writes four
    }


def print_floors() -> None:
    """Print the floors of all RUNS on all CARDS, in ms."""
    for run in RUNS:
        columns = {name: floors_ms(true_shape(run), card) for name, card in CARDS.items()}
        heading(f"{run}: floor, ms", *columns)
        phases = [ROLLOUT, REFERENCE, UPDATE, OPTIMIZER]
        for phase in [TOKEN, *phases]:
            row(phase, *(floors[phase] for floors in columns.values()))
        row("step", *(sum(floors[phase] for phase in phases) for floors in columns.values()))


def trained_parameters(shape: Shape) -> int:
    """Return the number of parameters that a step updates."""
    return trained_count(shape.config, lora_rank=shape.lora_rank)


class Bench:
    """A random model of a given shape, its prompts, and timing on its device."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, torch.device(device)
        torch.manual_seed(0)
        with self.device:
            self.model = Qwen2_5_VLForConditionalGeneration._from_config(
                shape.config, dtype=torch.bfloat16
            ).eval()
        self.model.generation_config.eos_token_id = []  # no token ends a completion
        use_own_attention(self.model)
        adapter = None
        if shape.lora_rank:
            adapter = add_adapter(self.model, "random", shape.lora_rank, seed=0)
            self.model.to(self.device)
        self.loaded = Loaded(self.model, None, None, adapter)
        self.prompts, self.lengths = self.make_prompts(), shape.lengths
        self.card = Card(float("nan"), float("nan"))  # set by check 0

    def make_prompts(self) -> Prompts:
        """Return prompts of random tokens, each around one image of 16 x 16 patches."""
        shape, image = self.shape, self.shape.config.image_token_id
        ids = torch.randint(10, 500, (shape.prompts, shape.prompt_length))
        ids[:, 8:72] = image
        patches = torch.randn(shape.prompts, 256, 1176, dtype=torch.bfloat16)
        grid = torch.tensor([[1, 16, 16]] * shape.prompts)
        return Prompts(ids, patches, (ids == image).long(), grid).to(self.device)

    def milliseconds(self, work: Callable[[], object], repeats: int = 5) -> float:
        """Return the median time of `work` in ms, after two warm-up calls."""
        times = []
        for _ in range(repeats + 2):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[2:])

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def floor(self, name: str) -> float | str:
        """Return the floor of a phase in ms; "-" on a CPU, where it means nothing."""
        return floors_ms(self.shape, self.card)[name] if self.device.type == "cuda" else "-"

    def peak_gib(self) -> float:
        """Return the peak of allocated memory since the last call; nan on a CPU."""
        if self.device.type != "cuda":
            return float("nan")
        peak = torch.cuda.max_memory_allocated() / GIB
        torch.cuda.reset_peak_memory_stats()
        return peak


def row(*cells) -> None:
    """Print one row of a table."""
    texts = [f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells]
    print("| " + " | ".join(texts) + " |", flush=True)


def heading(*cells: str) -> None:
    """Print a table's header."""
    print()
    row(*cells)
    row(*["---"] * len(cells))


# --- the checks -------------------------------------------------------------------------


def check_card(bench: Bench) -> None:
    """0. The card's peak rates, for the floors."""
    side = 8192 if bench.device.type == "cuda" else 256
    a, b = torch.randn(2, side, side, device=bench.device).bfloat16()
    source = torch.zeros(64 * side * side, device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copying = bench.milliseconds(lambda: target.copy_(source)) / 1e3
    multiplying = bench.milliseconds(lambda: a @ b) / 1e3
    bench.card = Card(2 * len(source) / copying, 2 * side**3 / multiplying)
    heading("0. the card", "copied, TB/s", "bf16 product, TFLOP/s")
    row("", bench.card.bytes_per_s / 1e12, bench.card.flops_per_s / 1e12)


def check_attention(bench: Bench) -> None:
    """1. Attention in the packed pass, flash kernel against mask: difference and time."""
    shape, text = bench.shape, bench.shape.config.text_config
    size = text.hidden_size // text.num_attention_heads
    slots = shape.prompt_length + shape.longest
    options = {"device": bench.device, "dtype": torch.bfloat16, "requires_grad": True}
    query = torch.randn(shape.rows, text.num_attention_heads, shape.longest, size, **options)
    key, value = (
        torch.randn(shape.rows, text.num_key_value_heads, slots, size, **options) for _ in range(2)
    )
    visible = lower_right(shape.longest, slots, device=bench.device)
    heading("1. attention of completions", "relative difference", "forward + backward, ms")
    for form in ("flash", "mask"):
        fastpath.VERDICTS[FLASH] = form == "flash"
        difference = check_suffix_attention(text, query)

        def work() -> None:
            out = suffix_attention(query, key, value, visible, size**-0.5)
            torch.autograd.grad(out.sum(), (query, key, value))

        row(form, difference, bench.milliseconds(work))
    del fastpath.VERDICTS[FLASH]


def check_decode_attention(bench: Bench) -> None:
    """2. Attention in a decode step: SDPA with a mask against matmul and softmax."""
    shape, text = bench.shape, bench.shape.config.text_config
    size = text.hidden_size // text.num_attention_heads
    slots = -(-(shape.prompt_length + shape.limit) // 8) * 8
    options = {"device": bench.device, "dtype": torch.bfloat16}
    query = torch.randn(shape.rows, text.num_attention_heads, 1, size, **options)
    key, value = (
        torch.randn(shape.rows, text.num_key_value_heads, slots, size, **options) for _ in range(2)
    )
    mask = torch.zeros(1, 1, 1, slots, **options)
    mask[..., shape.prompt_length + shape.mean :] = -torch.inf

    def by_hand() -> Tensor:
        as_tokens = query.reshape(len(query), key.shape[1], -1, size)
        scores = as_tokens @ key.transpose(-1, -2) * size**-0.5 + mask
        return (scores.float().softmax(-1).to(value.dtype) @ value).reshape(len(query), 1, -1, size)

    def sdpa() -> Tensor:
        return one_token_attention(query, key, value, mask, size**-0.5)

    heading("2. attention of one token", "relative difference", "ms a layer")
    fastpath.VERDICTS[DECODING] = True
    exact = by_hand()
    for name, form in (("SDPA", sdpa), ("matmul, softmax", by_hand)):
        row(name, relative_difference(form(), exact), bench.milliseconds(form, 20))


def check_decoding(bench: Bench) -> None:
    """3. A decode step: plain, captured, compiled. 4. Sampling with a captured step."""
    shape = bench.shape
    heading("3. decode step, all rows", "first call, s", TOKEN, "floor, ms")
    forms = {"plain": (False, False), "captured": (False, True), "compiled, captured": (True, True)}
    for name, (compiled, captured) in forms.items():
        fastpath.VERDICTS.pop(CAPTURED, None)
        fastpath.VERDICTS.pop(COMPILED, None)
        if not compiled:
            fastpath.VERDICTS[COMPILED] = False
        if not captured:
            fastpath.VERDICTS[CAPTURED] = False
        sampler = Sampler(bench.model, max_new_tokens=shape.limit, pad_id=0)
        start = time.perf_counter()
        sampler.generate(bench.prompts, group_size=shape.group_size, temperature=1.0)
        bench.synchronize()
        first_call = time.perf_counter() - start

        def steps(sampler: Sampler = sampler) -> None:
            sampler.sampled.fill_(1)
            sampler.next_slot.fill_(shape.prompt_length)
            with torch.no_grad():
                for _ in range(shape.limit // 2):
                    sampler.make_noise(1.0, None)
                    sampler.advance()

        row(name, first_call, bench.milliseconds(steps, 3) / (shape.limit // 2),
            bench.floor(TOKEN))  # fmt: skip
        if not captured:
            continue
        ids = [sample(bench, sampler, seed).ids for seed in (1, 1, 2)]
        distinct = len({tuple(line) for line in ids[0].tolist()})
        print(
            f"4. {name}: the same seed repeats: {torch.equal(ids[0], ids[1])}, another differs: "
            f"{not torch.equal(ids[0], ids[2])}, distinct rows: {distinct} of {shape.rows}"
        )
    print(f"verified: {', '.join(name for name, right in fastpath.VERDICTS.items() if right)}")


def sample(
    bench: Bench, sampler: Sampler, seed: int, prompts: Prompts | None = None
) -> Completions:
    """Return one rollout's completions; `prompts` are the bench's with their images encoded."""
    generator = make_generator(str(bench.device), seed)
    return sampler.generate(
        prompts or bench.prompts,
        group_size=bench.shape.group_size,
        temperature=1.0,
        generator=generator,
    )


def check_products(bench: Bench) -> None:
    """5. fp32 logits from bf16 hidden states and weights."""
    weight = bench.model.lm_head.weight
    states = torch.randn(bench.shape.rows, weight.shape[1], device=bench.device).bfloat16()
    heading("5. logits of one token in all rows", "relative difference", "ms")
    if bench.device.type == "cuda":
        row("fp32 output", check_matmul(bench.device, torch.bfloat16), 0.0)
    slow = states.float() @ weight.float().T
    row("matmul_fp32", relative_difference(matmul_fp32(states, weight.T), slow),
        bench.milliseconds(lambda: matmul_fp32(states, weight.T), 20))  # fmt: skip
    row("fp32 copies", 0.0, bench.milliseconds(lambda: states.float() @ weight.float().T, 20))


def check_vision(bench: Bench) -> None:
    """The start of a pass: encode all images, embed all prompts, compute positions."""
    heading("images and embeddings", "ms")
    with torch.no_grad():
        row("no gradient", bench.milliseconds(lambda: embed_prompts(bench.model, bench.prompts)))


def check_norms(bench: Bench) -> None:
    """6. The packed pass with transformers' RMSNorm against torch's fused one."""
    stock = Qwen2_5_VLRMSNorm.forward

    def fused(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)

    layers = len(bench.model.model.language_model.layers)
    heading(
        "6. packed pass", "layers checkpointed", "without gradient, ms", "with, ms", "peak, GiB"
    )
    for name, forward in (("stock RMSNorm", stock), ("fused RMSNorm", fused)):
        Qwen2_5_VLRMSNorm.forward = forward
        for checkpointed in (layers, layers // 2):
            bench.peak_gib()

            def with_gradient(n: int = checkpointed) -> None:
                scores(bench, bench.lengths, checkpoint_layers=n).sum().backward()
                bench.model.zero_grad()

            with torch.no_grad():
                without = bench.milliseconds(lambda: scores(bench, bench.lengths), 3)
            row(name, checkpointed, without, bench.milliseconds(with_gradient, 3), bench.peak_gib())
    Qwen2_5_VLRMSNorm.forward = stock


def scores(bench: Bench, lengths: list[int], **options) -> Tensor:
    """Return log-probs of random completions of these lengths."""
    ids = torch.randint(10, 500, (len(lengths), max(lengths)), device=bench.device)
    return completion_logprobs(
        bench.model, bench.prompts, ids, lengths, temperature=1.0, **options
    )[0]


def check_longest(bench: Bench) -> None:
    """8. Time and memory of the packed pass when every completion reaches the limit."""
    bench.peak_gib()
    tokens = bench.prompts.input_ids.numel() + bench.shape.rows * bench.shape.limit
    start = time.perf_counter()
    scores(bench, [bench.shape.limit] * bench.shape.rows).sum().backward()
    bench.synchronize()
    heading("8. packed tokens, all completions at the limit", "s", "peak, GiB")
    row(tokens, time.perf_counter() - start, bench.peak_gib())


# --- a whole step -----------------------------------------------------------------------


def whole_step(bench: Bench) -> None:
    """A step like main.py's: the phases beside their floors, and peak memory. Includes 7.

    The key-value cache has room for the longest completion; main.py's for --max-new-tokens.
    """
    shape, policy = bench.shape, bench.model
    loaded = bench.loaded
    if loaded.adapter is None:
        loaded = replace(loaded, reference=copy.deepcopy(policy).requires_grad_(False))
    optimizer = TimedOptimizer(policy, bench)
    sampler = Sampler(policy, max_new_tokens=shape.longest, pad_id=0)
    all_phases, pass_size = [], PassSize(micro_batch=4)
    for number in range(5):
        if number == 2:
            bench.peak_gib()  # the first two steps also compile, capture and check
        watch = Stopwatch(bench.synchronize)
        prompts = encode_images(policy, bench.prompts)
        completions = sample(bench, sampler, number, prompts)
        watch.lap(ROLLOUT)
        rollout = make_rollout(bench, prompts, completions)
        with loaded.as_reference() as reference:
            rollout = add_reference_logprobs(
                reference, rollout, pass_size=pass_size, temperature=1.0
            )
        watch.lap(REFERENCE)
        _, stats = update(
            policy, optimizer, rollout, loss="grpo", inner_epochs=1, pass_size=pass_size,
            temperature=1.0, beta=0.05, clip_eps=0.2, clip_eps_high=0.2,
            max_grad_norm=1.0, max_new_tokens=shape.limit,
        )  # fmt: skip
        watch.lap("both")
        del prompts, rollout  # frees the vision tower's activations
        seconds = dict(watch.seconds)
        seconds[UPDATE] = seconds.pop("both") - optimizer.seconds
        all_phases.append({**seconds, OPTIMIZER: optimizer.seconds})
    heading("whole step", "ms, median of the last 3", "floor, ms", "tokens/s of this GPU")
    tokens = sum(bench.lengths)
    median = {
        name: 1e3 * statistics.median(phases[name] for phases in all_phases[2:])
        for name in all_phases[0]
    }
    for name, milliseconds in median.items():
        row(name, milliseconds, bench.floor(name), 1e3 * tokens / milliseconds)
    whole = sum(median.values())
    floor = sum(bench.floor(name) for name in median) if bench.floor(TOKEN) != "-" else "-"
    row("sum", whole, floor, 1e3 * tokens / whole)
    print(f"\npeak {bench.peak_gib():.1f} GiB")
    print(f"sampler and scorer differ by {stats['sampler_gap_mean']:.4f} per token on average")
    whole_run(bench, {name: milliseconds / 1e3 for name, milliseconds in median.items()})


def whole_run(bench: Bench, step_s: dict[str, float]) -> None:
    """9. The time of a run with the default options, added up from its parts."""
    config, shape = Config(), bench.shape
    weights = 2 * sum(parameter.numel() for parameter in bench.model.parameters())
    trained = 2 * sum(parameter.numel() for parameter in trainable(bench.model))
    saved = (trained if shape.lora_rank else weights) / GIB
    seconds_a_gib = saving_seconds(64 if bench.device.type == "cpu" else 2048)
    saves = math.ceil(config.steps / config.save_every)
    evaluations = 1 + math.ceil(config.steps / config.eval_every)
    rollouts = math.ceil(config.eval_examples / shape.rows)
    parts = {
        **{name: config.steps * seconds for name, seconds in step_s.items()},
        "checkpoints": saves * (saved + 3 * trained / GIB) * seconds_a_gib,
        "evaluations": evaluations * rollouts * step_s[ROLLOUT],
    }
    heading(f"9. a run of {config.steps} steps", "minutes")
    for name, seconds in {**parts, "sum": sum(parts.values())}.items():
        row(name, seconds / 60)
    print(f"{saves} checkpoints at {seconds_a_gib:.2f} s per GiB on this disk, "
          f"{evaluations} evaluations of {config.eval_examples} examples")  # fmt: skip


def saving_seconds(mib: int) -> float:
    """Return the seconds it takes to write and flush one GiB of optimizer state."""
    state = [torch.randn(16 * 2**19).bfloat16() for _ in range(mib // 16)]  # 16 MiB each
    optimizer = optimi.AdamW([torch.nn.Parameter(tensor) for tensor in state[:1]], lr=1e-6)
    optimizer.state[optimizer.param_groups[0]["params"][0]] = dict(enumerate(state))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        start = time.perf_counter()
        save_shard(optimizer, Path(folder))
        return (time.perf_counter() - start) * 1024 / mib


class TimedOptimizer(optimi.AdamW):
    """The optimizer of main.py, with the seconds of its last step, without clipping."""

    def __init__(self, policy, bench: Bench) -> None:
        options = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0}
        parameters = trainable(policy)
        super().__init__(parameters, lr=1e-6, triton=verify_triton(parameters[0]), **options)
        self.bench, self.seconds = bench, 0.0

    def step(self) -> None:
        """Take a step and time it."""
        watch = Stopwatch(self.bench.synchronize)
        super().step()
        watch.lap("step")
        self.seconds = watch.seconds["step"]


def make_rollout(bench: Bench, prompts: Prompts, completions: Completions) -> Rollout:
    """Return a rollout of the sampled tokens, cut to ragged lengths, with random advantages."""
    shape = bench.shape
    lengths = torch.tensor(bench.lengths, device=bench.device)
    mask = torch.arange(shape.longest, device=bench.device) < lengths[:, None]
    return Rollout(
        prompts=prompts,
        completion_ids=completions.ids.masked_fill(~mask, 0),
        completion_mask=mask,
        lengths=bench.lengths,
        sampled_logprobs=completions.logprobs * mask,
        truncated=completions.truncated,
        texts=[""] * shape.rows,
        rewards=[SimpleNamespace(total=0.0)] * shape.rows,
        advantages=torch.randn(shape.prompts, shape.group_size, device=bench.device),
    )


CHECKS = {
    "card": check_card,
    "attention": check_attention,
    "decode-attention": check_decode_attention,
    "decoding": check_decoding,
    "products": check_products,
    "vision": check_vision,
    "norms": check_norms,
    "longest": check_longest,
    "step": whole_step,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the requested checks, and print a table for each."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--run", choices=RUNS, default="7b", help="what to train")
    parser.add_argument("--floors", action="store_true", help="print the floors and stop")
    args = parser.parse_args(arguments)
    if args.floors:
        return print_floors()
    prepare_gpu()
    if unknown := set(args.checks) - CHECKS.keys():
        parser.error(f"{', '.join(unknown)}: must be one of {', '.join(CHECKS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA GPU was found; cpu runs the same code at toy size")
    bench = Bench(true_shape(args.run) if args.device == "cuda" else toy_shape(), args.device)
    name = (
        torch.cuda.get_device_name() if args.device == "cuda" else "CPU, toy size: no real timings"
    )
    count = sum(parameter.numel() for parameter in bench.model.parameters())
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{count / 1e9:.2f} billion parameters, P = {bench.prompts.input_ids.shape[1]}, "
          f"completion tokens {sum(bench.lengths)}, longest {max(bench.lengths)}")  # fmt: skip
    for check in ["card", *(args.checks or list(CHECKS)[1:])]:  # floors need its rates
        CHECKS[check](bench)
        bench.model.zero_grad()
        fastpath.VERDICTS.clear()


if __name__ == "__main__":
    main()
