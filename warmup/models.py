"""New models: the shape, the tokenizer and the processor of a Qwen2.5-VL that nobody trained."""

import re

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from engine.loading import Loaded, use_own_attention
from rewards import PROMPT, REASONING_TAGS, SYSTEM_MESSAGE, make_prompt
from shapes import ShapeSpec
from warmup.answers import PERIMETERS, Flaws, random_shape, written_answer

ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SIZES = {  # language model and vision tower of a new model: 4.1 and 164 million parameters
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
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_heads": 6,
            "fullatt_block_indexes": [0, 1, 2, 3],
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


def tiny_tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level Qwen2 tokenizer of a few hundred tokens, in which each digit is one.

    Each fixed sentence of the prompt is one token too, which keeps the tiny model's context short.
    """
    rng, spec = np.random.default_rng(0), ShapeSpec(min_size=5.0, max_size=35.0)
    options = {"flaws": Flaws(0.5, 0.5), "rng": rng, "mistakes": PERIMETERS}
    answers = [
        written_answer(random_shape(spec, rng), reasoning_tag=tag, **options)
        for _ in range(500)
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
