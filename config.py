"""Every option of a run, declared once; the command line is built from them."""

import argparse
import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from engine.model_files import ModelError, check_exists
from engine.parallel import process_count
from engine.sizes import DTYPES, choose_device, resolve_placement
from grpo import LOSSES
from harness.memory import Workload, parameters_of, trained_of
from harness.runlog import RunError, read_description
from rewards import CORRECTNESS, REASONING_TAGS
from shapes import ShapeSpec, check_image_size

REPORTS = ("none", "tensorboard", "wandb", "trackio")
LARGEST = 1_000_000_000  # upper limit of integers that have none of their own


def option(default, help: str, *, least=None, above=None, most=None, choices=None, free=False):
    """Return a dataclass field that also holds its help text and the values that it accepts.

    A `free` option does not change what a run computes, so a resumed run may change it. (The model
    may have moved; its checksums must match.)
    """
    limits = {"least": least, "above": above, "most": most, "choices": choices}
    return field(default=default, metadata={"help": help, "free": free, **limits})


@dataclass(frozen=True)
class Config:
    """The options of one run. The command line is built from these fields."""

    # model
    model: str = option(
        "Qwen/Qwen2.5-VL-7B-Instruct", "folder or hub id of a Qwen2.5-VL model", free=True
    )
    device: str = option(
        "auto",
        "auto: a GPU if there is one, else the CPU for a small model",
        choices=("auto", "cpu", "cuda"),
    )
    dtype: str = option("auto", "auto: bfloat16 on cuda, float32 on cpu", choices=("auto", *DTYPES))
    checkpoint_layers: str = option(
        "auto",
        "number of layers to recompute in the backward pass; auto: as few as memory allows",
        free=True,
    )
    freeze_vision: bool = option(False, "train only the language model, not the vision tower")
    lora_rank: int = option(
        0, "train LoRA adapters of this rank (needs peft); 0: the weights", least=0, most=1024
    )
    merge: bool = option(False, "with --lora-rank: save the merged model to final/", free=True)
    # task
    min_size: float = option(20.0, "smallest dimension in grid units", above=0)
    max_size: float = option(35.0, "largest dimension in grid units", above=0)
    rotate: bool = option(False, "rotate the shapes")
    max_rotation: float = option(
        45.0, "largest rotation to either side in degrees", least=0, most=180
    )
    image_size: int = option(224, "side of the image in pixels, a multiple of 28")
    reasoning_tag: str = option(
        "reasoning", "tag that the prompt asks for and the reward checks", choices=REASONING_TAGS
    )
    correctness: str = option(
        "linear", "shape of the area reward: see penalty in rewards.py", choices=CORRECTNESS
    )
    reward_weights: str = option(
        "1,1,1", "weights of the area, decimals and XML rewards in their sum"
    )
    # rollout
    steps: int = option(750, "training steps, each a rollout and its updates", least=1, free=True)
    prompts_per_step: int = option(4, "plots per step, over all processes", least=1)
    group_size: int = option(8, "completions per plot, compared with each other", least=2)
    max_new_tokens: int = option(
        512, "token limit of a completion; longer ones are cut off", least=1
    )
    temperature: float = option(
        1.0, "sampling temperature, also used for scoring", least=0.01, most=100
    )
    # algorithm
    loss: str = option(
        "grpo", "how the loss averages tokens: see token_weights in grpo.py", choices=LOSSES
    )
    beta: float = option(
        0.05, "weight of the KL penalty; 0: no reference is loaded", least=0, most=1000
    )
    clip_eps: float = option(0.2, "lower clip of the ratio: 1 - eps", above=0, most=1)
    clip_eps_high: float = option(0.2, "upper clip of the ratio: 1 + eps", above=0, most=1000)
    inner_epochs: int = option(1, "updates per rollout", least=1)
    sync_reference_every: int = option(
        0, "steps between updates of the reference; 0: never", least=0
    )
    reference_mix: float = option(0.6, "the policy's share in a reference update", above=0, most=1)
    # optimizer
    lr: float = option(2e-6, "learning rate between warm-up and decay", above=0, most=1)
    warmup_steps: int = option(20, "steps of linear warm-up", least=0)
    decay_steps: int = option(
        0, "last steps, in which the learning rate falls linearly; 0: it stays", least=0
    )
    adam_beta1: float = option(0.9, "decay of AdamW's first moment", least=0, most=0.9999)
    adam_beta2: float = option(0.99, "decay of AdamW's second moment", least=0, most=0.9999)
    weight_decay: float = option(
        0.0, "of AdamW; with bf16 weights, lr * decay below 0.002 rounds to 0", least=0, most=1
    )
    max_grad_norm: float = option(1.0, "clip the gradient to this norm", above=0, most=LARGEST)
    micro_batch: int = option(
        4, "prompts per backward pass; affects memory, not the gradient", least=1, free=True
    )
    # run
    seed: int = option(0, "random seed of examples and sampling", least=0)
    workers: int = option(
        1, "processes that prepare plots ahead of time; 0: none", least=0, most=256, free=True
    )
    name: str = option("", "run folder in --runs; empty: named after the preset or model")
    runs: str = option("runs", "folder that holds the run folders")
    save_every: int = option(
        100, "steps between checkpoints; 0: only when the run stops or ends", least=0, free=True
    )
    keep: int = option(1, "number of newest checkpoints to keep", least=1, free=True)
    save_optimizer: bool = option(
        True,
        "needed to resume; without it, checkpoints are a quarter of the size (fp32: a third)",
        free=True,
    )
    report_to: str = option(
        "none", "tracker that also gets the metrics (needs its package)", choices=REPORTS, free=True
    )
    log_every: int = option(10, "steps between lines on the terminal", least=1, free=True)
    sample_every: int = option(10, "steps between entries in samples.jsonl", least=1)
    eval_every: int = option(50, "steps between held-out evaluations; 0: none", least=0)
    eval_examples: int = option(64, "held-out examples per evaluation", least=1)

    @property
    def spec(self) -> ShapeSpec:
        """The shapes to draw."""
        rotation = self.max_rotation if self.rotate else 0.0
        return ShapeSpec(self.min_size, self.max_size, rotation)

    def pick(self, *names: str) -> dict:
        """Return the named options as keyword arguments."""
        return {name: getattr(self, name) for name in names}

    @property
    def checkpoint_parts(self) -> dict:
        """The optional parts of a checkpoint. A reference that never moves is `model`."""
        return {
            "with_optimizer": self.save_optimizer,
            "with_reference": self.sync_reference_every > 0,
        }

    @property
    def disk_options(self) -> dict:
        """The options that determine the disk space of a run."""
        return self.pick("steps", "save_every", "keep", "merge") | self.checkpoint_parts

    @property
    def weights(self) -> tuple[float, ...]:
        """`reward_weights` as numbers. Raises `ValueError` if it is not three numbers."""
        return tuple(float(weight) for weight in self.reward_weights.split(","))

    @property
    def layers_to_checkpoint(self) -> int | None:
        """`checkpoint_layers` as a number; None means as few as memory allows."""
        return None if self.checkpoint_layers == "auto" else int(self.checkpoint_layers)


def workload_of(config: Config) -> Workload:
    """Return the workload that a run's memory depends on, with device and dtype resolved."""
    count = parameters_of(config.model)
    device, dtype = choose_device(count, device=config.device, dtype=config.dtype)
    sizes = ("model", "prompts_per_step", "group_size", "max_new_tokens", "image_size")
    return Workload(
        **config.pick(*sizes, "micro_batch", "layers_to_checkpoint", "lora_rank", "freeze_vision"),
        processes=process_count(),
        device=device,
        dtype=dtype,
        reference=config.beta > 0,
    )


def with_device(config: Config) -> Config:
    """Return the options with "auto" replaced by a device and a dtype. Raises `ModelError`."""
    device, dtype = resolve_placement(
        config.model,
        device=config.device,
        dtype=config.dtype,
        trained=trained_of(config.model, config.lora_rank, config.freeze_vision),
        reference=config.beta > 0 and not config.lora_rank,
        processes=process_count(),
        command_that_runs="python main.py --preset tiny",
    )
    return dataclasses.replace(config, device=device, dtype=dtype)


def saved_form(config: Config) -> dict:
    """Return the options as saved in config.json: a model folder as an absolute path."""
    model = os.path.abspath(config.model) if os.path.isdir(config.model) else config.model
    return dataclasses.asdict(config) | {"model": model}


PRESETS = {
    "default": {},
    "tiny": {
        "model": str(Path(__file__).resolve().parent / "tiny"),
        "steps": 120,
        "prompts_per_step": 8,
        "group_size": 16,
        "max_new_tokens": 56,
        "lr": 8e-5,
        "warmup_steps": 10,
        "decay_steps": 60,
        "micro_batch": 8,
        "workers": 0,
        "save_every": 50,
    },
}


# --- command line -----------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    """Reports an error in one line, even if a flag's value has line breaks."""

    def error(self, message: str) -> NoReturn:
        """Print the message in one line and exit with code 2."""
        super().error(" ".join(message.split()))


def make_parser(description: str = "") -> argparse.ArgumentParser:
    """Return the parser built from `Config`. Its result has no entry for omitted flags."""
    parser = OneLineParser(
        usage=argparse.SUPPRESS,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--preset", choices=PRESETS, help="option values that suit a model (default: default)"
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="resume a run from its newest checkpoint, with its own flags",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check flags and model files, show the memory and disk needed, and stop",
    )
    for option_field in dataclasses.fields(Config):
        options = {"help": f"{option_field.metadata['help']} ({default_text(option_field)})"}
        if option_field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = option_field.type
            options["choices"] = option_field.metadata["choices"]
            if not options["choices"]:
                options["metavar"] = {int: "N", float: "X", str: "TEXT"}[option_field.type]
        parser.add_argument(flag_of(option_field.name), **options)
    return parser


def default_text(option_field: dataclasses.Field) -> str:
    """Return an option's default for its help text, and the tiny preset's if it has one."""
    text = f"default: {'none' if option_field.default == '' else option_field.default}"
    if option_field.name != "model" and option_field.name in PRESETS["tiny"]:
        text += f"; tiny: {PRESETS['tiny'][option_field.name]}"
    return text.replace("%", "%%")


def make_config(arguments: argparse.Namespace) -> Config:
    """Return the run's options: the flags given, else the preset's values, else the defaults.

    With --resume, the run's own options replace preset and defaults. Raises `ValueError`, in one
    line, for a value that is not accepted.
    """
    given = vars(arguments).copy()
    given.pop("dry_run", None)
    run, preset = given.pop("resume", None), given.pop("preset", None)
    if run is None:
        config = Config(**{**PRESETS[preset or "default"], **given})
        check(config, given)
        return config
    if preset is not None:
        raise ValueError(f"--preset {preset}: a resumed run keeps its own flags")
    saved = saved_config(run)
    check_same_run(saved, given)
    config = dataclasses.replace(saved, **given)
    check(config, {})
    return (
        config if "model" in given else dataclasses.replace(config, model=locate_model(run, config))
    )


def locate_model(run: Path, config: Config) -> str:
    """Return the path of a run's model, which may have moved with the run, as in a moved checkout.

    Raises `ValueError` if it cannot be found.
    """
    try:
        check_exists(config.model)
        return config.model
    except ModelError:
        pass  # then try where it would be if it moved with the run
    before = read_description(run).get("folder", run.absolute())
    moved = os.path.normpath(run.absolute() / os.path.relpath(config.model, before))
    if not os.path.isdir(moved):
        raise ValueError(
            f"--resume {run}: its model folder {config.model} does not exist; if it has moved: "
            f"--model FOLDER (its checksums must match)"
        )
    return moved


def saved_config(run: Path) -> Config:
    """Return the options in a run's config.json. Raises `ValueError` if it cannot be resumed."""
    if (run / "state.json").is_file():
        raise ValueError(f"--resume {run}: is only part of a run; must be the run's folder")
    if not (run / "config.json").is_file():
        raise ValueError(f"--resume {run}: not a run folder: it has no config.json")
    if not os.access(run, os.W_OK):
        raise ValueError(f"--resume {run}: must be writable")
    try:
        values = read_description(run)["config"]
        types = {
            option_field.name: option_field.type for option_field in dataclasses.fields(Config)
        }
        for name, value in values.items():
            if name not in types:
                raise ValueError(f"{name} is not an option of this version")
            if type(value) is not types[name] and (types[name], type(value)) != (float, int):
                raise ValueError(f"{name} must be of type {types[name].__name__}, not {value!r}")
        config = Config(**values)
        check(config, {})
    except RunError as error:
        raise ValueError(f"--resume {error}") from error
    except ValueError as error:
        raise ValueError(f"--resume {run / 'config.json'}: {error}") from error
    return config


def check_same_run(saved: Config, given: dict) -> None:
    """Raise `ValueError` for a flag that would change what a resumed run computes."""
    if saved.decay_steps and given.get("steps", saved.steps) != saved.steps:
        raise ValueError(
            f"--steps {given['steps']}: the run has {saved.steps}, and its learning rate depends "
            f"on them (--decay-steps {saved.decay_steps}). Start a new run; one with "
            "--decay-steps 0 can be extended"
        )
    options = dataclasses.fields(Config)
    free = [option_field.name for option_field in options if option_field.metadata["free"]]
    for name, value in given.items():
        was = getattr(saved, name)
        if name not in free and value != was:
            allowed = ", ".join(map(flag_of, free))
            raise ValueError(
                f"{flag_of(name)} {value}: the run has {was}, and would become a different run. "
                f"Flags that may change with --resume: {allowed}"
            )


def check(config: Config, given: dict) -> None:
    """Raise `ValueError` for values out of range, and for `given` flags that conflict."""
    for option_field in dataclasses.fields(Config):
        check_limits(option_field, getattr(config, option_field.name))
    if not re.fullmatch(r"auto|[0-9]{1,6}", config.checkpoint_layers):
        raise ValueError(
            f"--checkpoint-layers {config.checkpoint_layers}: must be a number of layers or auto"
        )
    if "max_rotation" in given and not config.rotate:
        raise ValueError("--max-rotation: has no effect without --rotate")
    if "reference_mix" in given and not config.sync_reference_every:
        raise ValueError("--reference-mix: has no effect without --sync-reference-every")
    if config.sync_reference_every and config.beta == 0:
        raise ValueError("--sync-reference-every: there is no reference with --beta 0")
    check_adapter(config, given)
    if config.report_to != "none" and not is_installed(config.report_to):
        raise ValueError(
            f"--report-to {config.report_to}: needs its package: pip install {config.report_to}"
        )
    check_weights(config)
    check_image_size(config.image_size)
    _ = config.spec  # raises for shapes that do not fit


def check_weights(config: Config) -> None:
    """Raise `ValueError` unless --reward-weights is three weights, of which one counts."""
    try:
        weights = config.weights
    except ValueError:
        weights = ()
    if len(weights) != 3 or not all(0 <= weight <= 1000 for weight in weights) or not any(weights):
        raise ValueError(
            f"--reward-weights {config.reward_weights}: must be three numbers from 0 to 1000, not "
            f"all 0, such as 1,1,1"
        )


def check_adapter(config: Config, given: dict) -> None:
    """Raise `ValueError` for options that conflict with --lora-rank, or that need it."""
    if not config.lora_rank:
        if config.merge:
            raise ValueError("--merge: has no effect without --lora-rank")
        return
    if not is_installed("peft"):
        raise ValueError(f"--lora-rank {config.lora_rank}: needs peft: pip install peft")
    if "freeze_vision" in given and not config.freeze_vision:
        raise ValueError("--no-freeze-vision: --lora-rank trains the language model only")
    if config.sync_reference_every:
        raise ValueError(
            "--sync-reference-every: with --lora-rank the reference is the base model, and fixed"
        )


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; a plain folder, such as wandb/, does not count."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def flag_of(name: str) -> str:
    """Return the flag of an option."""
    return "--" + name.replace("_", "-")


def check_limits(option_field: dataclasses.Field, value) -> None:
    """Raise `ValueError` for a value out of range, naming flag, value and accepted values."""
    flag, choices = flag_of(option_field.name), option_field.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{flag} {value}: must be one of {', '.join(choices)}")
    if isinstance(value, int | float):
        limits = {name: option_field.metadata[name] for name in ("least", "above", "most")}
        check_number(flag, value, **limits)


def check_number(flag: str, value: float, *, least=None, above=None, most=None) -> None:
    """Raise `ValueError` for a number out of range, naming flag, value and accepted range.

    An integer without an upper limit of its own may be at most a billion.
    """
    if most is None and isinstance(value, int):
        most = LARGEST
    in_range = (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and math.isfinite(value)
    )
    if not in_range:
        bounds = [("at least", least), ("above", above), ("at most", most)]
        accepted = " and ".join(f"{word} {bound:,}" for word, bound in bounds if bound is not None)
        finite = "" if isinstance(value, int) else ", and finite"
        raise ValueError(f"{flag} {value}: must be {accepted}{finite}")
