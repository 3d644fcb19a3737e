"""Supervised warm-up: teach a model to answer in the task's format before GRPO starts.

    python cold_start.py --from-scratch --out tiny         # makes the bundled tiny model
    python cold_start.py --from-scratch --size small --workers 12 --batch-size 64 --steps 3000 \\
        --lr 3e-4 --out small                              # 164 million parameters, on a GPU
    python cold_start.py --model MODEL --out DIR           # starts from any Qwen2.5-VL

It trains on synthetic answers: shape, dimensions, formula, area. Some are flawed on purpose, in
format (missing decimals, missing tags, chatter) or in substance (a wrong formula), so that GRPO
still has both to teach, as it has with an instruct model.

Answers alone teach a new vision tower next to nothing. With `--see-steps` it first learns to see,
from what every visual token can say about the shape: see `DenseHead`.
"""

import argparse
import math
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optimi
import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from config import check_number
from engine.fastpath import prepare_gpu, verify_triton
from engine.loading import (
    Loaded,
    check_compatible,
    load,
    non_finite_parameters,
    save_policy,
    use_own_attention,
)
from engine.model_files import ModelError
from engine.parallel import check_single_process
from engine.prompts import Prompts, check_no_resize, encode_images, encode_prompts
from engine.scoring import completion_logprobs
from engine.sizes import resolve_placement, shape_config, trained_count
from harness.loader import make_loader
from harness.terminal import ignore_output_errors
from rewards import PROMPT, REASONING_TAGS, SYSTEM_MESSAGE, make_prompt
from shapes import (
    AXES_BOX,
    GRID,
    IMAGE_MULTIPLE,
    KINDS,
    Example,
    Shape,
    ShapeSpec,
    check_image_size,
    make_example,
)

DIMENSIONS = {
    "rectangle": "rectangle, width {width:.0f}, height {height:.0f}",
    "circle": "circle, diameter {width:.0f}",
    "square": "square, side {width:.0f}",
    "triangle": "triangle, base {width:.0f}, height {height:.0f}",
}
FORMULAS = {
    "rectangle": "width * height",
    "circle": "pi * (diameter / 2)^2",
    "square": "side * side",
    "triangle": "base * height / 2",
}
MISTAKES = {  # perimeters, and a triangle's area without the half
    "rectangle": ("2 * (width + height)", lambda shape: 2 * (shape.width + shape.height)),
    "circle": ("pi * diameter", lambda shape: math.pi * shape.width),
    "square": ("4 * side", lambda shape: 4 * shape.width),
    "triangle": ("base * height", lambda shape: shape.width * shape.height),
}
TIDY = "<{tag}>{reasoning}</{tag}><answer>{area:.2f}</answer>"
SLOPPY = (
    "<{tag}>{reasoning}</{tag}><answer>{area:.0f}</answer>",
    "<{tag}>{reasoning}</{tag}><answer>{area:.1f}</answer>",
    "<{tag}>{reasoning}</{tag}><answer>{area:.2f} square units</answer>",
    "{reasoning}<answer>{area:.2f}</answer>",
    "{reasoning}<answer>{area:.0f}</answer>",
    "<{tag}>{reasoning}</{tag}><answer>{area:.2f}</answer> square units",
    "<{tag}>{reasoning}<answer>{area:.1f}</answer>",
)
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SIZES = {  # language model and vision tower of a new model: 2.8 and 164 million parameters
    "tiny": (
        {
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "rope_parameters": ROPE | {"mrope_section": [4, 6, 6]},  # sum: head size / 2
        },
        {
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "fullatt_block_indexes": [1, 3],
        },
    ),
    "small": (
        {
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "rope_parameters": ROPE | {"mrope_section": [8, 12, 12]},
        },
        {
            "depth": 8,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_heads": 8,
            "fullatt_block_indexes": [3, 7],
        },
    ),
}
SIGHT_EVERY, SIGHT_EXAMPLES = 500, 256  # steps between two looks at so many held-out plots
SECOND_TAG_EVERY = 8  # one batch in 8 uses the second reasoning tag
CHAT_TEMPLATE = (  # the format of Qwen2.5-VL's own template, without tools and videos
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>")
SPECIAL_TOKENS += ("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


# --- the synthetic answers --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Flaws:
    """How synthetic answers differ from perfect ones."""

    sloppy: float = 0.0  # share of answers with a flawed format
    mistakes: float = 0.0  # share of answers with a wrong formula
    area_noise: float = 0.0  # standard deviation of the noise on the log of the area


def synthetic_answer(
    shape: Shape, *, reasoning_tag: str, flaws: Flaws, rng: np.random.Generator
) -> str:
    """Return an answer for a shape: rounded dimensions, a formula, and the area.

    The area is the formula's on the exact dimensions, times noise. With flaws, the formula or the
    format may be wrong.

    >>> shape = Shape("square", 20.0, 20.0, (25, 25), (), (0, 0, 0))
    >>> rng = np.random.default_rng(0)
    >>> synthetic_answer(shape, reasoning_tag="think", flaws=Flaws(), rng=rng)
    '<think>square, side 20: side * side</think><answer>400.00</answer>'
    """
    style = SLOPPY[rng.integers(len(SLOPPY))] if rng.uniform() < flaws.sloppy else TIDY
    formula, area = FORMULAS[shape.kind], shape.area
    if rng.uniform() < flaws.mistakes:
        formula, mistaken_area = MISTAKES[shape.kind]
        area = mistaken_area(shape)
    area *= math.exp(flaws.area_noise * rng.standard_normal())
    dimensions = DIMENSIONS[shape.kind].format(width=shape.width, height=shape.height)
    return style.format(tag=reasoning_tag, reasoning=f"{dimensions}: {formula}", area=area)


def encode_answers(tokenizer, answers: list[str]) -> tuple[Tensor, list[int]]:
    """Return token ids (rows, C), right-padded, and the length of each row with its stop token."""
    rows = [torch.tensor([*tokenizer.encode(answer), tokenizer.eos_token_id]) for answer in answers]
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    return ids, [len(row) for row in rows]


# --- the tiny model ---------------------------------------------------------------------


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level Qwen2 tokenizer of a few hundred tokens, in which each digit is one.

    Each fixed sentence of the prompt is one token too, which keeps the tiny model's context short.
    """
    rng = np.random.default_rng(0)
    spec = ShapeSpec(min_size=5.0, max_size=35.0)
    shapes = [make_example(spec, seed=0, split="cold_start", index=i).shape for i in range(500)]
    answers = [
        synthetic_answer(shape, reasoning_tag=tag, flaws=Flaws(0.5, 0.5, 0.1), rng=rng)
        for shape in shapes
        for tag in REASONING_TAGS
    ]
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        [*answers, *map(make_prompt, REASONING_TAGS), "system\nuser\nassistant\n"] * 3,
        vocab_size=512,
        new_special_tokens=list(SPECIAL_TOKENS),
    )
    instructions = SYSTEM_MESSAGE + " " + PROMPT.splitlines()[0]
    sentences = re.split(r"(?<=[.?]) ", instructions)
    tokenizer.add_tokens([AddedToken(sentence, normalized=False) for sentence in sentences])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


def new_model(seed: int, size: str = "tiny") -> Loaded:
    """Return a randomly initialized Qwen2.5-VL of one of the SIZES, and its processor."""
    tokenizer = tiny_tokenizer()
    token_id = tokenizer.convert_tokens_to_ids
    text, vision = SIZES[size]
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
            "tie_word_embeddings": True,
        },
        vision_config={**vision, "out_hidden_size": text["hidden_size"]},
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    use_own_attention(model)
    model.generation_config = GenerationConfig(
        eos_token_id=[token_id("<|im_end|>"), token_id("<|endoftext|>")],
        pad_token_id=token_id("<|endoftext|>"),
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )
    return Loaded(model, None, processor)


# --- learning to see --------------------------------------------------------------------


class DenseHead(torch.nn.Module):
    """Reads off each visual token what it can know of the shape: the lessons of a vision tower.

    The class, width and height, and how far the four sides of the shape's bounding box are from the
    token's own center, as an anchor-free detector does (FCOS, Tian et al. 2019, arXiv:1904.01355):
    64 lessons a plot instead of one answer. It is thrown away afterwards.
    """

    OUTPUTS = (len(KINDS), 2, 4)  # logits of the classes; size; sides
    SCALES = (1.0, 10.0, 20.0)  # grid units: so large are the values, about

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.linear = torch.nn.Linear(width, sum(self.OUTPUTS))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (Q, tokens, 4), sizes (Q, tokens, 2), sides (Q, tokens, 4), grid units."""
        outputs = self.linear(self.norm(features)).split(self.OUTPUTS, -1)
        return tuple(scale * output for scale, output in zip(self.SCALES, outputs, strict=True))


def token_centers(image_size: int) -> Tensor:
    """Return the centers of an image's visual tokens in grid units, (tokens, 2), row by row.

    A token is a square of 28 pixels; the first row is at the top of the plot.

    >>> token_centers(56).round().int().tolist()
    [[9, 38], [38, 38], [9, 9], [38, 9]]
    """
    left, bottom, width, height = AXES_BOX
    across = (torch.arange(0, image_size, IMAGE_MULTIPLE) + IMAGE_MULTIPLE / 2) / image_size
    x, y = GRID * (across - left) / width, GRID * (1 - across - bottom) / height
    return torch.stack([x.repeat(len(y)), y.repeat_interleave(len(x))], 1)


def bounding_box(shape: Shape) -> list[float]:
    """Return left, bottom, right and top of a shape, in grid units."""
    if shape.kind == "circle":
        (x, y), radius = shape.center, shape.width / 2
        return [x - radius, y - radius, x + radius, y + radius]
    xs, ys = zip(*shape.vertices, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def dense_targets(examples: list[Example], image_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return classes (Q,), sizes (Q, 2), and every token's distances to the sides, (Q, tokens, 4).

    Left, bottom, right, top: positive inside the bounding box.
    """
    shapes = [example.shape for example in examples]
    classes = torch.tensor([KINDS.index(shape.kind) for shape in shapes])
    sizes = torch.tensor([[shape.width, shape.height] for shape in shapes])
    boxes = torch.tensor([bounding_box(shape) for shape in shapes])[:, None]
    centers = token_centers(image_size)
    return classes, sizes, torch.cat([centers - boxes[..., :2], boxes[..., 2:] - centers], -1)


def dense_loss(head: DenseHead, features: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
    """Return the loss of what the head reads off image features (Q, tokens, hidden).

    Cross-entropy of the class, and Huber losses, in grid units, of sizes and distances.
    """
    logits, size, sides = head(features)
    classes, sizes, distances = (target.to(features.device) for target in targets)
    tokens = features.shape[1]
    return (
        F.cross_entropy(logits.flatten(0, 1), classes.repeat_interleave(tokens))
        + 0.5 * F.smooth_l1_loss(size, sizes[:, None].expand_as(size))
        + 0.25 * F.smooth_l1_loss(sides, distances)
    )


def see(loaded: Loaded, spec: ShapeSpec, args: argparse.Namespace) -> None:
    """Train the vision tower in place by the lessons of a `DenseHead`; print what it sees."""
    visual = loaded.policy.model.visual
    torch.manual_seed(args.seed)
    head = DenseHead(visual.config.out_hidden_size).to(loaded.policy.device)
    parameters = [*visual.parameters(), *head.parameters()]
    options = {"betas": (0.9, 0.99), "weight_decay": 0.01}
    optimizer = optimi.AdamW(parameters, lr=args.see_lr, triton=False, **options)
    progress = tqdm(range(args.see_steps), unit="step", desc="see", disable=None)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = args.see_lr * warmup_cosine(step, args.see_steps)
        first = step * args.batch_size
        examples, features = look(loaded, spec, args, "cold_start", first, args.batch_size)
        loss = dense_loss(head, features, dense_targets(examples, args.image_size))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")  # host sync
        if (step + 1) % SIGHT_EVERY == 0 or step + 1 == args.see_steps:
            named, off = sight(loaded, head, spec, args)
            tqdm.write(
                f"after {step + 1} steps of seeing: class {100 * named:.1f} %, width and height "
                f"off by {off:.2f} units, of {SIGHT_EXAMPLES} held-out plots"
            )


def look(
    loaded: Loaded, spec: ShapeSpec, args: argparse.Namespace, split: str, first: int, count: int
) -> tuple[list[Example], Tensor]:
    """Return `count` examples of a split, and the features of their images."""
    options = {"seed": args.seed, "split": split, "image_size": args.image_size}
    examples = [make_example(spec, index=i, **options) for i in range(first, first + count)]
    images = [example.image for example in examples]
    prompts = encode_prompts(
        loaded.processor, images, system=SYSTEM_MESSAGE, prompt=make_prompt()
    ).to(loaded.policy.device)
    return examples, encode_images(loaded.policy, prompts).image_features


@torch.no_grad()
def sight(
    loaded: Loaded, head: DenseHead, spec: ShapeSpec, args: argparse.Namespace
) -> tuple[float, float]:
    """Return the share of classes that are right, and the mean error of a dimension.

    Of the first held-out plots; each token has a vote.
    """
    named, errors = [], []
    for first in range(0, SIGHT_EXAMPLES, args.batch_size):
        count = min(args.batch_size, SIGHT_EXAMPLES - first)
        examples, features = look(loaded, spec, args, "eval", first, count)
        classes, sizes, _ = dense_targets(examples, args.image_size)
        logits, size, _ = (output.cpu() for output in head(features))
        named.append(logits.mean(1).argmax(-1) == classes)
        errors.append((size.mean(1) - sizes).abs())
    return torch.cat(named).float().mean().item(), torch.cat(errors).mean().item()


# --- training ---------------------------------------------------------------------------


class ColdStartBatches:
    """One batch per step, made on demand: prompts, answer ids (rows, C) and their lengths.

    The plots are from the "cold_start" split, which shares none with training or evaluation.
    """

    def __init__(self, spec: ShapeSpec, processor, args: argparse.Namespace) -> None:
        self.spec, self.processor, self.args = spec, processor, args
        self.flaws = Flaws(args.sloppy, args.mistakes, args.area_noise)

    def __getitem__(self, step: int) -> tuple[Prompts, Tensor, list[int]]:
        args, first = self.args, step * self.args.batch_size
        options = {"seed": args.seed, "split": "cold_start", "image_size": args.image_size}
        examples = [
            make_example(self.spec, index=index, **options)
            for index in range(first, first + args.batch_size)
        ]
        tag = REASONING_TAGS[step % SECOND_TAG_EVERY == SECOND_TAG_EVERY - 1]
        rng = np.random.default_rng([args.seed, step])
        answers = [
            synthetic_answer(example.shape, reasoning_tag=tag, flaws=self.flaws, rng=rng)
            for example in examples
        ]
        images = [example.image for example in examples]
        prompts = encode_prompts(
            self.processor, images, system=SYSTEM_MESSAGE, prompt=make_prompt(tag)
        )
        return prompts, *encode_answers(self.processor.tokenizer, answers)


def supervise(loaded: Loaded, spec: ShapeSpec, args: argparse.Namespace) -> None:
    """Train the policy in place on synthetic answers, with cross-entropy over all answer tokens."""
    model = loaded.policy
    triton = verify_triton(next(model.parameters()))
    options = {"lr": args.lr, "betas": (0.9, 0.99), "weight_decay": 0.01, "triton": triton}
    optimizer = optimi.AdamW(model.parameters(), **options)
    make_batch = ColdStartBatches(spec, loaded.processor, args).__getitem__
    batches = make_loader(make_batch, range(args.steps), workers=args.workers)
    progress = tqdm(batches, unit="step", desc="cold start", disable=None)
    for step, (prompts, ids, lengths) in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup_cosine(step, args.steps)
        logprobs, _ = completion_logprobs(
            model, prompts.to(model.device), ids.to(model.device), lengths, temperature=1.0
        )
        loss = -logprobs.sum() / sum(lengths)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")  # host sync


def warmup_cosine(step: int, steps: int) -> float:
    """Return the learning-rate factor: linear warm-up over the first 5 %, cosine decay to 0."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)


def save(loaded: Loaded, folder: Path) -> None:
    """Save model and processor in Hugging Face format, with the weights rounded to bf16."""
    for parameter in loaded.policy.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    loaded.policy.config.dtype = "bfloat16"
    save_policy(loaded, folder)


def make_parser() -> argparse.ArgumentParser:
    """Return the command-line parser."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description="Supervised warm-up on synthetic answers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--from-scratch", action="store_true", help="make a new model")
    start.add_argument("--model", metavar="MODEL", help="folder or hub id to start from")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="of a new model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="answers per step")
    parser.add_argument("--lr", type=float, metavar="X", help="1e-3 from scratch, else 1e-5")
    parser.add_argument(
        "--see-steps",
        type=int,
        default=0,
        metavar="N",
        help="steps in which the vision tower learns to see, before the answers",
    )
    parser.add_argument("--see-lr", type=float, default=2e-3, metavar="X", help="rate of these")
    share = {"type": float, "metavar": "X"}
    parser.add_argument("--sloppy", **share, default=0.45, help="share of flawed formats")
    parser.add_argument("--mistakes", **share, default=0.35, help="share of wrong formulas")
    parser.add_argument("--area-noise", **share, default=0.1, help="std of noise on log areas")
    parser.add_argument("--min-size", type=float, default=5.0, metavar="X", help="grid units")
    parser.add_argument("--max-size", type=float, default=35.0, metavar="X", help="grid units")
    parser.add_argument("--max-rotation", type=float, default=45.0, metavar="X", help="degrees")
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="pixels")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that draw the answers' plots in advance",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and examples")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run"
    )
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Warm up a model and save it to a new folder."""
    ignore_output_errors()
    prepare_gpu()
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        check_single_process()
        spec = ShapeSpec(args.min_size, args.max_size, args.max_rotation)
        check_arguments(args)
        args.lr = args.lr or (1e-3 if args.from_scratch else 1e-5)
        loaded = starting_model(args)
        args.out.mkdir(parents=True)  # if this fails, then before the training, not after it
    except (ValueError, OSError, ModelError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        see(loaded, spec, args)
        supervise(loaded, spec, args)
        if names := non_finite_parameters(loaded.policy):
            sys.exit(f"{args.out}: not saved: {names[0]} is not finite; a lower --lr usually helps")
        save(loaded, args.out)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        with suppress(OSError):  # remove the folder if nothing was saved to it
            args.out.rmdir()
    print(f"{args.out}: saved; load it with from_pretrained")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise `ValueError`, with a one-line message, if an option's value is not accepted."""
    check_image_size(args.image_size)
    for flag, least in {"--steps": 1, "--batch-size": 1, "--seed": 0}.items():
        check_number(flag, getattr(args, flag[2:].replace("-", "_")), least=least)
    check_number("--see-steps", args.see_steps, least=0)
    if args.see_steps and not args.from_scratch:
        raise ValueError(f"--see-steps {args.see_steps}: only with --from-scratch; others can see")
    check_number("--see-lr", args.see_lr, above=0, most=1)
    check_number("--workers", args.workers, least=0, most=256)
    check_number("--area-noise", args.area_noise, least=0, most=10)
    check_number("--sloppy", args.sloppy, least=0, most=1)
    check_number("--mistakes", args.mistakes, least=0, most=1)
    if args.lr is not None:
        check_number("--lr", args.lr, above=0, most=1)
    if args.out.exists():
        raise ValueError(f"--out {args.out}: already exists; must be a new folder")


def starting_model(args: argparse.Namespace) -> Loaded:
    """Return the model to train, on its device: a new one, or that of `--model`."""
    found_gpu = torch.cuda.is_available()
    if args.from_scratch:
        if args.device == "cuda" and not found_gpu:
            raise ValueError("--device cuda: no CUDA GPU was found")
        loaded = new_model(args.seed, args.size)
        check_no_resize(loaded.processor.image_processor, args.image_size)
        loaded.policy.to("cuda" if found_gpu and args.device != "cpu" else "cpu")
        return loaded
    check_compatible(args.model, image_size=args.image_size)
    device, dtype = resolve_placement(
        args.model,
        device=args.device,
        trained=trained_count(shape_config(args.model)),
        command_that_runs="python cold_start.py --from-scratch --out DIR",
    )
    return load(args.model, device=device, dtype=dtype)


if __name__ == "__main__":
    main()
