"""Compute a model's shape and size, and where it can run, before it is loaded."""

import torch
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from engine.machine import free_host_memory
from engine.model_files import (
    CONFIG,
    ModelError,
    base_of,
    check_pointers,
    check_quantized,
    first_line,
    folder_of,
    read_json,
)

MODEL_TYPE = "qwen2_5_vl"
HUB_TEXT_CONFIGS = {  # lets `place` refuse a machine that is too small before any download
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
LARGEST_ON_CPU = 1_000_000_000  # parameters; a larger model needs a GPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GIB = 2**30


# --- shapes -----------------------------------------------------------------------------


def model_config(model: str) -> Qwen2_5_VLConfig:
    """Return the config of a folder or hub id. Raises `ModelError` if it is not Qwen2.5-VL."""
    model = base_of(model)
    folder = folder_of(model, config_only=True)
    check_pointers(folder)
    if not (folder / CONFIG).exists():
        raise ModelError(f"model {model}: no {CONFIG} in this folder")
    described = read_json(folder / CONFIG)
    if described.get("model_type") != MODEL_TYPE:
        kind = described.get("model_type", "missing")
        raise ModelError(f"model {model}: model_type is {kind}, must be {MODEL_TYPE}")
    check_quantized(model, described)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"model {model}: config.json cannot be read: {first_line(error)}"
        ) from error


def shape_config(model: str) -> Qwen2_5_VLConfig:
    """Return a config with the model's shape; the HUB_TEXT_CONFIGS need no download.

    Raises `ModelError`.
    """
    model = base_of(model)
    if model not in HUB_TEXT_CONFIGS:
        return model_config(model)
    text = HUB_TEXT_CONFIGS[model]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        text_config={**text, "rms_norm_eps": 1e-6, "rope_parameters": rope},
        vision_config={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": text["hidden_size"],
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def empty_model(config: Qwen2_5_VLConfig) -> Qwen2_5_VLForConditionalGeneration:
    """Return a model on the meta device: its tensors have shapes but no values."""
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def numel(module: torch.nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def parameter_count(config: Qwen2_5_VLConfig) -> int:
    """Return the number of parameters of a config's model, without allocating any."""
    return numel(empty_model(config))


def trained_count(
    config: Qwen2_5_VLConfig, *, lora_rank: int = 0, freeze_vision: bool = False
) -> int:
    """Return how many parameters `load` makes trainable, adapters included."""
    empty = empty_model(config)
    if lora_rank:
        modules = empty.model.language_model.named_modules()
        layers = [module for name, module in modules if name.split(".")[-1] in ADAPTED]
        return sum(lora_rank * (layer.in_features + layer.out_features) for layer in layers)
    return numel(empty) - (numel(empty.model.visual) if freeze_vision else 0)


# --- where it runs ----------------------------------------------------------------------


def resolve_placement(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trained: int = 0,
    reference: bool = False,
    processes: int = 1,
    command_that_runs: str,
) -> tuple[str, str]:
    """Return the device and dtype to load the model with, "auto" resolved.

    Raises `ModelError` if this machine cannot hold the model with `trained` trained parameters and
    the optimizer sharded over `processes`. Downloads config.json at most.
    """
    count = parameter_count(shape_config(model))
    found_gpu = torch.cuda.is_available()
    runs_here = f"This machine can run: {command_that_runs}"
    wanted = device
    device, dtype = choose_device(count, device=device, dtype=dtype)
    kept = DTYPES[dtype]
    copies = 1 + optimizer_copies(kept) / processes  # gradient, sharded optimizer
    needed = kept.itemsize * (count * (1 + reference) + trained * copies)
    purpose = "to train, not counting activations" if trained else "to run"
    size = f"{count / 1e9:.2f} billion" if count > 1e8 else f"{count / 1e6:.1f} million"
    asks = f"{model} ({size} parameters) needs {needed / GIB:.1f} GiB {purpose}"
    if device == "cuda" and not found_gpu:
        flag = "" if wanted == "auto" else "--device cuda: "
        raise ModelError(f"{flag}{asks}, on a CUDA GPU; found: no CUDA GPU. {runs_here}")
    free, _ = free_memory(torch.device(device))
    if needed > free:
        raise ModelError(f"{asks}; found: {free / GIB:.1f} GiB free on {device}. {runs_here}")
    return device, dtype


def choose_device(count: int, *, device: str, dtype: str) -> tuple[str, str]:
    """Return device and dtype for `count` parameters, "auto" resolved; the GPU may be missing."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() or count > LARGEST_ON_CPU else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return device, dtype


def optimizer_copies(dtype: torch.dtype) -> int:
    """Return how many tensors AdamW keeps per weight: two moments, plus Kahan's in bf16."""
    return 3 if dtype == torch.bfloat16 else 2


def free_memory(device: torch.device) -> tuple[int, int]:
    """Return the free and the total memory of a device, in bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused, total  # torch reuses memory that it has reserved
    return free_host_memory()
