"""Write a checkpoint with a known model's shape and random weights, to try all but learning.

    python benchmarks/random_checkpoint.py DIR                                  # 7B: 16 GiB
    python benchmarks/random_checkpoint.py DIR --like Qwen/Qwen2.5-VL-3B-Instruct

The weights are bf16, and are initialized on a GPU if there is one. Tokenizer and processor are the
tiny model's: its tokens are the first of the vocabulary, and its prompts are shorter than Qwen's
(P = 104).
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoProcessor, GenerationConfig, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.sizes import HUB_TEXT_CONFIGS, model_config, shape_config  # noqa: E402

TINY = str(ROOT / "tiny")
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def random_checkpoint(folder: Path, like: str) -> None:
    """Write the checkpoint. Raises `OSError` if it cannot be written."""
    config, tiny = shape_config(like), model_config(TINY)
    for name in TOKENS:
        setattr(config, name, getattr(tiny, name))
    config.text_config.eos_token_id = tiny.text_config.eos_token_id
    config.text_config.pad_token_id = tiny.text_config.pad_token_id
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig.from_pretrained(TINY)
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(TINY).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    """Write the checkpoint that the command line describes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--like", default="Qwen/Qwen2.5-VL-7B-Instruct", metavar="MODEL",
                        help=f"a model folder, or {', '.join(HUB_TEXT_CONFIGS)}")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.folder.exists():
        parser.error(f"{args.folder}: already exists; must be a new folder")
    random_checkpoint(args.folder, args.like)
    print(f"{args.folder}: a random model with the shape of {args.like}")


if __name__ == "__main__":
    main()
