"""Peak memory of scoring with gradients at the 7B model's widths, against a naive pass, on a CPU.

    python benchmarks/memory.py          # a few minutes on 2 cores

The model has one decoder layer and the vocabulary of the 7B model (hidden size 3584, 152,064
tokens, tied, fp32, random weights); one prompt of 193 tokens has G completions, 150 tokens on
average and 250 at most. Each measurement runs in a fresh process and reports its peak above
weights and gradients. The vocabulary matrix is frozen: its gradient, 2 GiB in either pass, would
only hide the difference.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from peers import Task, token_logprobs
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.loading import use_own_attention
from engine.prompts import Prompts
from engine.scoring import completion_logprobs
from engine.sizes import GIB

TEXT_TOKENS, LONGEST, MEAN = 129, 250, 150


def wide_model() -> Qwen2_5_VLForConditionalGeneration:
    """Return one layer of the 7B model, with a vision tower of one small block."""
    text = {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 1,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
        "tie_word_embeddings": True,
    }
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
    vision |= {"out_hidden_size": 3584, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def peak_above_weights(kind: str, group_size: int) -> float:
    """Return the GiB that a forward and backward pass takes on top of weights and gradients."""
    model = wide_model()
    model.lm_head.weight.requires_grad_(False)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.grad = torch.ones_like(parameter)  # counted in the base
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the memory now in use
    base = resident("VmRSS")
    image = model.config.image_token_id
    ids = torch.randint(10, 500, (1, TEXT_TOKENS + 64))
    ids[:, 8:72] = image
    patches, grid = torch.randn(1, 256, 1176), torch.tensor([[1, 16, 16]])
    completion_ids = torch.randint(10, 500, (group_size, LONGEST))
    lengths = torch.linspace(2 * MEAN - LONGEST, LONGEST, group_size).long()
    if kind == "naive":
        mask = torch.arange(LONGEST) < lengths[:, None]
        prompt_ids = ids.expand(group_size, -1)
        batch = {
            "input_ids": torch.cat([prompt_ids, completion_ids], 1),
            "attention_mask": torch.cat([torch.ones_like(prompt_ids), mask.long()], 1),
            "mm_token_type_ids": torch.cat(
                [(prompt_ids == image).long(), torch.zeros_like(completion_ids)], 1
            ),
            "pixel_values": patches.expand(group_size, -1, -1).flatten(0, 1),
            "image_grid_thw": grid.expand(group_size, -1),
        }
        logprobs = token_logprobs(model, batch, completion_ids, Task().temperature) * mask
    else:
        use_own_attention(model)
        prompts = Prompts(ids, patches, (ids == image).long(), grid)
        logprobs, _ = completion_logprobs(
            model, prompts, completion_ids, lengths.tolist(), temperature=1.0, checkpoint_layers=0
        )
    logprobs.sum().backward()
    return resident("VmHWM") - base


def resident(name: str) -> float:
    """Return this process's memory in GiB, current (VmRSS) or peak (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / GIB


def measure(kind: str, group_size: int) -> float:
    """Return `peak_above_weights`, measured in a fresh process."""
    command = [sys.executable, __file__, "--kind", kind, "--group-size", str(group_size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def main(arguments: list[str] | None = None) -> None:
    """Print a table over group sizes."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=("own", "naive"), help=argparse.SUPPRESS)
    parser.add_argument("--group-size", type=int, default=8, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.kind:
        print(peak_above_weights(args.kind, args.group_size))
        return
    print("| completions | naive, GiB | packed, GiB | ratio |\n|---|---|---|---|")
    for group_size in (2, 4):
        naive, own = (measure(kind, group_size) for kind in ("naive", "own"))
        print(f"| {group_size} | {naive:.2f} | {own:.2f} | {naive / own:.1f} |", flush=True)


if __name__ == "__main__":
    main()
