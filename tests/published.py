"""Facts about Qwen/Qwen2.5-VL-7B-Instruct as published on the hub, and tiny/ in the same layout.

transformers 5 saved tiny/, and programs that read the published layout may not read that one.
Tests that compare with tiny/ alone cannot see this.
"""

import hashlib
import json
import shutil
from pathlib import Path

from conftest import TINY

REVISION = "cc594898137f460bfe9f0759e9844b3ce807cfb5"  # of 6 April 2025
FILES = {  # all but the weights and their index: git blob hashes
    "chat_template.json": "732bd68bc5427d1fb6c06a59b3bf2456b2155d24",
    "config.json": "58ee12a9fb3d8708a1e41e49cb9aa5ac5017b6a6",
    "generation_config.json": "1088c9865dbf2e8152485664bb07495e89a14efb",
    "merges.txt": "20024bfe7c83998e9aeaf98a0cd6a2ce6306c2f0",
    "preprocessor_config.json": "7f3b746825e5eef53ed8ed57a91df9e86ee62c0a",
    "tokenizer.json": "443909a61d429dff23010e5bddd28ff530edda00",
    "tokenizer_config.json": "91684ea3dc135a7d815e2c932054ce88c1aab41f",
    "vocab.json": "4783fe10ac3adce15ac8f358ef5462739852c569",
}
TENSORS, BYTES = 729, 16_584_333_312  # in model.safetensors.index.json
NAMES_SHA256 = "2b0ec84ab006b3dda8ecab8873412eab84244d3e6e5a257b5181a3454f139fc0"  # sorted lines
PROMPT_TOKENS = {"reasoning": 193, "think": 191}  # with a 224-pixel image: 64 of them are visual
PROMPT_SHA256 = "7237f909181c7a9c"  # first digits, of the two texts whose tokens were counted
GENERATION = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.000001}
PREPROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
TEXT = ["hidden_act", "hidden_size", "initializer_range", "intermediate_size", "rms_norm_eps"]
TEXT += ["max_position_embeddings", "max_window_layers", "num_attention_heads", "vocab_size"]
TEXT += ["num_hidden_layers", "num_key_value_heads", "use_cache", "use_sliding_window"]
TEXT += ["attention_dropout", "bos_token_id", "eos_token_id"]
IDS = ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"]


def tensor_names() -> list[str]:
    """Return the names of the 7B model's weights, as in its files."""
    projections = [f"self_attn.{name}_proj" for name in "qkv"]
    layer = [f"{name}.{kind}" for name in projections for kind in ("weight", "bias")]
    layer += ["self_attn.o_proj.weight", "input_layernorm.weight"]
    layer += ["post_attention_layernorm.weight"]
    layer += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    linear = ["attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    block = [f"{name}.{kind}" for name in linear for kind in ("weight", "bias")]
    block += ["norm1.weight", "norm2.weight"]
    names = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    names += ["visual.patch_embed.proj.weight", "visual.merger.ln_q.weight"]
    names += [f"visual.merger.mlp.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")]
    names += [f"model.layers.{number}.{name}" for number in range(28) for name in layer]
    names += [f"visual.blocks.{number}.{name}" for number in range(32) for name in block]
    return sorted(names)


def published_layout(folder: Path) -> Path:
    """Create a folder with tiny's weights and vocabulary in the published layout; return it."""
    tiny = Path(TINY)
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(tiny / name, folder / name)
    model = read("tokenizer.json")["model"]
    template = (tiny / "chat_template.jinja").read_text()
    objects = {
        "config.json": published_config(read("config.json")),
        "generation_config.json": read("generation_config.json") | GENERATION,
        "preprocessor_config.json": PREPROCESSOR,
        "chat_template.json": {"chat_template": template},
        "tokenizer_config.json": published_tokenizer(read("tokenizer.json"), template),
        "vocab.json": model["vocab"],
    }
    for name, value in objects.items():
        (folder / name).write_text(json.dumps(value, indent=2))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    return folder


def read(name: str) -> dict:
    return json.loads((Path(TINY) / name).read_text())


def published_config(ours: dict) -> dict:
    """Return tiny's config.json in the 4.x form: flat, with the RoPE options apart."""
    text, rope = ours["text_config"], ours["text_config"]["rope_parameters"]
    vision = {key: ours["vision_config"][key] for key in ours["vision_config"] if "rope" not in key}
    vision["in_chans"] = vision.pop("in_channels")
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        **{key: text[key] for key in TEXT},
        **{key: ours[key] for key in IDS},
        "model_type": "qwen2_5_vl",
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "vision_config": vision,
    }


def published_tokenizer(ours: dict, template: str) -> dict:
    """Return a 4.x tokenizer_config.json with the added tokens of tiny's tokenizer.json."""
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token.pop("id")): token for token in ours["added_tokens"]},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|image_pad|>"],
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "add_bos_token": False,
    }


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
