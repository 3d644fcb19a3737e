"""A model's files: found on disk or fetched from the hub, and checked without loading a weight.

A hub id that is wholly in the cache is used as it is, without asking the network. All that follows
works on a folder, so that a model is loaded, checked and copied in one way wherever it came from.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
PREPROCESSORS = ("processor_config.json", "preprocessor_config.json")
TOKENIZERS = ("tokenizer.json", "vocab.json")
KEPT_AS_THEY_ARE = (  # beside weights that are saved, so that what reads the base reads them too
    *(CONFIG, *PREPROCESSORS, "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja", *TOKENIZERS, "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja"]  # of a repository on the hub
LFS_POINTER = b"version https://git-lfs"
FLOATS = ("F64", "F32", "F16", "BF16")  # in the header of a safetensors file
UNQUANTIZED = {2048: "3B", 3584: "7B", 5120: "32B", 8192: "72B"}  # by hidden size, as published
QUANTIZATIONS = ("quantization_config", "compression_config")  # keys in config.json
LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself allows


class ModelError(Exception):
    """A model that cannot be used here. The message is one line for the user."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, and the next where the first ends in a colon.

    >>> first_line(RuntimeError("Error(s) in loading:\\n\\tsize mismatch for a.weight\\n\\t..."))
    'Error(s) in loading: size mismatch for a.weight'
    """
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


# --- where a model is -------------------------------------------------------------------


def folder_of(model: str, *, config_only: bool = False) -> Path:
    """Return the folder that holds a model, or at least its config.json; fetch it if need be.

    `model` is a folder or a hub id. What is fetched is said before. Raises `ModelError`.
    """
    check_exists(model)
    if folder := folder_on_disk(model, config_only=config_only):
        return folder
    print(f"{model}: not on disk; asking the hub for it", flush=True)
    try:
        fetched = snapshot_download(model, allow_patterns=[CONFIG] if config_only else WANTED)
    except Exception as error:  # whatever a lost connection or a missing repository makes it raise
        raise ModelError(
            f"model {model}: not in the hub's cache (HF_HOME says where that is), and not to be "
            f"had from the hub: {first_line(error)}"
        ) from error
    if not (config_only or is_whole(Path(fetched))):
        raise ModelError(
            f"model {model}: only a part of it is on disk, and the hub is out of reach"
        )
    return Path(fetched)


def folder_on_disk(model: str, *, config_only: bool = False) -> Path | None:
    """Return the folder of a model that is on disk as a whole, or at least its config.json."""
    if os.path.isdir(model):
        return Path(model)
    try:
        cached = Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
    return cached if (cached / CONFIG).is_file() and (config_only or is_whole(cached)) else None


def check_exists(model: str) -> None:
    """Raise `ModelError` for what is no folder, and cannot be a hub id."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)
    if not os.path.isdir(model) and (not is_hub_id or os.path.isdir(model.split("/")[0])):
        raise ModelError(f"model {model}: no such folder, and not a hub id like Qwen/NAME")


def base_of(model: str) -> str:
    """Return the folder or hub id that an adapter's folder belongs to; of any other, itself.

    Raises `ModelError`.
    """
    path = Path(model) / "adapter_config.json"
    if not path.is_file():
        return model
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(f"{path}: does not name the model that the adapter belongs to")
    try:
        check_exists(base)
    except ModelError as error:
        raise ModelError(
            f"{path}: the adapter belongs to {base}, and there is no such folder; if that model "
            f"has moved, write its place to base_model_name_or_path in this file"
        ) from error
    return base


def is_whole(folder: Path) -> bool:
    """Return whether a folder has config, tokenizer, preprocessor and all files of weights."""

    def has_one(names: tuple[str, ...]) -> bool:
        return any((folder / name).is_file() for name in names)

    if not (has_one((CONFIG,)) and has_one(PREPROCESSORS) and has_one(TOKENIZERS)):
        return False
    try:
        return all(path.is_file() for path in weight_files(folder))
    except ModelError:
        return False


# --- what a folder holds ----------------------------------------------------------------


def read_json(path: Path) -> dict:
    """Return the object in a file. Raises `ModelError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds no object")
    return value


def kept_files(folder: Path) -> dict[str, bytes]:
    """Return the files that are saved unchanged beside new weights, by name."""
    paths = (folder / name for name in KEPT_AS_THEY_ARE)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def check_pointers(folder: Path) -> None:
    """Raise `ModelError` for a file that git-lfs has left a pointer in place of."""
    names = (*KEPT_AS_THEY_ARE, "generation_config.json", INDEX)
    for path in [*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))]:
        if path.is_file() and path.stat().st_size < 1024:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise ModelError(
                        f"{path}: is a pointer of git-lfs, not the file: git lfs pull fetches it"
                    )


def check_quantized(model: str, config: dict) -> None:
    """Raise `ModelError` for a config.json of quantized weights, naming the model without."""
    found = next((config[key] for key in QUANTIZATIONS if config.get(key)), None)
    if found is None:
        return
    method = found.get("quant_method", "quantized") if isinstance(found, dict) else "quantized"
    width = config.get("hidden_size") or (config.get("text_config") or {}).get("hidden_size")
    original = f"Qwen/Qwen2.5-VL-{UNQUANTIZED.get(width, '7B')}-Instruct"
    raise ModelError(
        f"model {model}: its weights are quantized ({method}), and cannot be trained or merged; "
        f"use the unquantized ones, as of {original}"
    )


def check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> str:
    """Return what the headers of a folder's weights were found to say.

    `expected` are the shapes of the model that config.json describes, by the names of its
    parameters. Raises `ModelError` for a file that is missing, cut off or no safetensors file, and
    for weights that are missing, of another shape or not the model's: transformers would fill in
    random numbers for the first, and leave the last out.
    """
    found: dict[str, tuple[int, ...]] = {}
    files = weight_files(folder)
    for path in files:
        for name, shape in read_header(path):
            found[parameter_of(name)] = shape
    for name, shape in found.items():
        if name in expected and shape != expected[name]:
            raise ModelError(
                f"{folder}: {name} is of shape {shape}, where config.json asks for {expected[name]}"
            )
    where = f"{folder}: its weights and config.json do not belong together"
    if missing := sorted(expected.keys() - found.keys()):
        raise ModelError(f"{where}: {len(missing)} weights are missing, as {missing[0]}")
    surplus = sorted(name for name in found if name not in expected and not is_idle(name))
    if surplus:
        raise ModelError(f"{where}: {len(surplus)} have no place in it, as {surplus[0]}")
    return f"{len(found)} weights in {len(files)} files, with names and shapes as in config.json"


def parameter_of(name: str) -> str:
    """Return the name in the model of a weight's name in a file: published files have older ones.

    >>> parameter_of("model.layers.0.mlp.up_proj.weight"), parameter_of("visual.merger.ln_q.weight")
    ('model.language_model.layers.0.mlp.up_proj.weight', 'model.visual.merger.ln_q.weight')
    """
    if name.startswith("visual."):
        return f"model.{name}"
    if re.match(r"model\.(?!language_model\.|visual\.)", name):
        return name.replace("model.", "model.language_model.", 1)
    return name


def is_idle(name: str) -> bool:
    """Return whether a weight that a file may hold is none of the model's layers.

    It is computed, as frequencies are, shared, or a head that some other trainer has added.
    """
    return not name.startswith("model.") or name.endswith(".inv_freq")


def weight_files(folder: Path) -> list[Path]:
    """Return the paths of a folder's weights, which may be missing. Raises `ModelError`.

    Where there are both, transformers takes the one file, and not those of the index.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder}: there are no weights in it: no {WEIGHTS} and no {INDEX}")
    names = read_json(folder / INDEX).get("weight_map")
    if not (names and isinstance(names, dict) and all(isinstance(n, str) for n in names.values())):
        raise ModelError(f"{folder / INDEX}: names no files of weights")
    return [folder / name for name in sorted(set(names.values()))]


def read_header(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield names and shapes of the tensors in a safetensors file. Raises `ModelError`.

    The file begins with the length of the header in 8 bytes, then the header, an object of names:
    https://github.com/huggingface/safetensors
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError("its header is too large")
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        header.pop("__metadata__", None)
        tensors = [
            (name, *(about[key] for key in ("dtype", "shape", "data_offsets")))
            for name, about in header.items()
        ]
        ends = [8 + length + offsets[1] for *_, offsets in tensors]
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{path}: is not a whole safetensors file: {first_line(error)}") from error
    if ends and size != max(ends):
        raise ModelError(f"{path}: has {size:,} bytes, and {max(ends):,} by its header: cut off?")
    for name, dtype, shape, _ in tensors:
        if dtype not in FLOATS:
            raise ModelError(f"{path}: {name} is of type {dtype}, and must be one of {FLOATS}")
        yield name, tuple(shape)
