"""Reasons to stop a run or to warn: signals, bad numbers, a collapsing policy."""

import math
import os
import signal
import statistics
import threading
import time
from contextlib import suppress

import torch
from torch.distributed.launcher.api import LaunchConfig

from engine.parallel import gather, is_main, process_count

# largest mean |log-prob sampled - scored| at the first step that rounding explains, nats per token
MAX_SAMPLER_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1}
MAX_SKIPPED = 5  # skipped steps in a row that end the run
SECONDS_TO_SAVE = 600  # time allowed for one step and its checkpoint, at 7B
WINDOW = 10  # steps: the latest ones are compared with the first ones
LOOK = "look at samples.jsonl"


class Unhealthy(Exception):
    """A run should not continue. The message is one line for the user."""


class StopSignal:
    """Turns Ctrl-C, SIGTERM and a closed terminal into a request to stop after the current step.

    `number` is the signal received, or None. A second signal ends the process at once. Use it as a
    context manager around the training loop.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> "StopSignal":
        self.before = {number: signal.signal(number, self.receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _) -> None:
        """Record the signal, and restore the default action of the next one.

        With several processes, ignore the next one: the launcher forwards signals that the
        processes have already received, and itself kills those that take too long.
        """
        self.number = number
        alone = process_count() == 1
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL if alone else signal.SIG_IGN)
        if is_main():
            once_more = b" A second signal stops at once." if alone else b""
            with suppress(OSError):  # not print(): a handler may interrupt another print()
                os.write(2, b"\nStopping: finishing and saving this step first.%b\n" % once_more)

    def agreed_number(self) -> int:
        """Return the signal that any process received, the same on all processes; 0 if none."""
        return max(gather([self.number or 0]))


def launcher_limit() -> str | None:
    """Return a warning if the launcher would kill its processes before they can save a step.

    After Ctrl-C or SIGTERM, torchrun and accelerate wait 30 s unless an environment variable sets
    another limit.
    """
    if process_count() == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    can_be_set = "shutdown_timeout" in LaunchConfig.__dataclass_fields__  # since torch 2.14
    limit = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30") if can_be_set else "30"
    if limit.isdecimal() and int(limit) >= SECONDS_TO_SAVE:
        return None
    longer = (
        f"set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={SECONDS_TO_SAVE} in the launcher's environment, or "
    )
    return (
        f"After Ctrl-C or SIGTERM the launcher kills this run within {limit} s, saved or not. To "
        f"allow more time, {longer if can_be_set else ''}send the signal to this process only "
        f"(kill -INT {os.getpid()})"
    )


def exit_with_parent(_: int) -> None:
    """Make a loader's worker process end together with its parent, neither earlier nor later.

    Ctrl-C reaches the worker too, and the step cannot finish unless the worker survives it. And
    torch's workers may outlive a killed parent, waiting for someone to read their batch.
    """
    for number in StopSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=exit_when_orphaned, args=(os.getppid(),), daemon=True).start()


def exit_when_orphaned(parent: int) -> None:
    """End this process once its parent process is no longer `parent`."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Health:
    """Checks the metrics of every step, in order."""

    def __init__(self, dtype: torch.dtype, history: list[dict]) -> None:
        self.dtype, self.history = dtype, list(history)
        self.warned: set[str] = set()

    def check(self, metrics: dict) -> list[str]:
        """Return warnings of a skipped step, and of each kind of collapse once.

        Raises `Unhealthy`.
        """
        self.history.append(metrics)
        check_sampler_gap(metrics, self.dtype)
        warnings = check_skipped(self.history)
        found = find_collapse(self.history)
        warnings += [text for kind, text in found.items() if kind not in self.warned]
        self.warned |= found.keys()
        return warnings

    def check_end(self) -> None:
        """Raise `Unhealthy` if the last step was skipped: the policy may be useless by then."""
        if self.history and self.history[-1]["skipped"]:
            raise Unhealthy(
                f"the last step was skipped ({self.history[-1]['not_finite']} not finite), so "
                f"final/ has not been saved. More steps (--resume, --steps) may help, unless the "
                f"rate decays; otherwise start a new run with a lower --lr or a higher --beta"
            )


def check_sampler_gap(metrics: dict, dtype: torch.dtype) -> None:
    """Raise `Unhealthy` if sampling and scoring use different distributions at the first step."""
    allowed, gap = MAX_SAMPLER_GAP[dtype], metrics["sampler_gap_mean"]
    if metrics["step"] > 0:
        return
    if not math.isfinite(gap):
        raise Unhealthy(
            f"the log-probs of the first samples are not finite, though the weights are: some "
            f"weights are so large that {dtype} overflows"
        )
    if gap > allowed:
        raise Unhealthy(
            f"the log-probs of sampling and of the scoring pass differ by {gap:.4f} per token "
            f"(rounding explains up to {allowed}). The policy would be trained on samples that are "
            f"not its own: temperature, positions, masks or the key-value cache differ between "
            f"sampling.Sampler and scoring.completion_logprobs"
        )


def check_skipped(history: list[dict]) -> list[str]:
    """Return a warning if the latest step was skipped. Raises `Unhealthy` for too many in a row."""
    latest = history[-1]
    if not latest["skipped"]:
        return []
    if len(history) >= MAX_SKIPPED and all(step["skipped"] for step in history[-MAX_SKIPPED:]):
        raise Unhealthy(
            f"{latest['not_finite']} not finite in {MAX_SKIPPED} steps in a row, all of them "
            f"skipped; a lower --lr or a higher --beta usually helps"
        )
    return [f"step {latest['step']}: skipped, not finite: {latest['not_finite']}"]


def find_collapse(history: list[dict]) -> dict[str, str]:
    """Return a warning for each kind of collapse from the first steps to the latest ones."""
    if len(history) < 2 * WINDOW:
        return {}
    (entropy_then, entropy), (length_then, length), (_, truncated), (_, no_spread) = (
        (mean(history[:WINDOW], key), mean(history[-WINDOW:], key))
        for key in ("entropy", "completion_length_mean", "truncated_share", "no_spread_share")
    )
    changed = f"entropy per token went from {entropy_then:.3f} to {entropy:.3f}"
    checks = {
        "certain": (
            entropy < 0.1 * entropy_then,
            f"{changed}: all samples are nearly the same; {LOOK}; try a higher --beta",
        ),
        "noise": (
            entropy > 3 * entropy_then,
            f"{changed}: the policy is turning to noise; {LOOK}; try a lower --lr or a higher "
            f"--beta",
        ),
        "short": (
            length < 0.25 * length_then,
            f"completions shrank from {length_then:.0f} to {length:.0f} tokens; {LOOK}",
        ),
        "long": (
            truncated > 0.5,
            f"{100 * truncated:.0f} % of the completions are cut off; {LOOK}; try a higher "
            f"--max-new-tokens",
        ),
        "equal": (
            no_spread == 1,
            f"the rewards are equal within every group: nothing is learned; {LOOK}; try a higher "
            f"--temperature",
        ),
    }
    step = history[-1]["step"]
    return {kind: f"step {step}: {text}" for kind, (wrong, text) in checks.items() if wrong}


def mean(steps: list[dict], key: str) -> float:
    """Return the mean of a metric without its None and NaN values; NaN if no value is left."""
    values = [step[key] for step in steps if step[key] is not None and step[key] == step[key]]
    return statistics.fmean(values) if values else float("nan")
