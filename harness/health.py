"""What ends a run before its time, or deserves a warning: signals, numbers, a collapsing policy."""

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

# mean |log-prob sampled - scored| at the first step that still is rounding, in nats per token
MAX_SAMPLER_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1}
MAX_SKIPPED = 5  # steps in a row whose numbers are not finite
SECONDS_TO_SAVE = 600  # that a step and its checkpoint may take, at 7B
WINDOW = 10  # steps: the latest so many are compared with the first so many
LOOK = "look at samples.jsonl"


class Unhealthy(Exception):
    """A run that should not go on. The message is one line for the user."""


class StopSignal:
    """Makes Ctrl-C, SIGTERM and a closed terminal a wish: the step is finished first.

    `number` says which came. A second one ends the process at once. A context manager, for the time
    of the training loop.
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
        """Note the signal, and give the next one its usual effect.

        Beside other processes the next one means nothing: their launcher passes on what they have
        received already, and ends by itself those that take too long.
        """
        self.number = number
        alone = process_count() == 1
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL if alone else signal.SIG_IGN)
        if is_main():
            once_more = b" Once more stops at once." if alone else b""
            with suppress(OSError):  # not print: a handler may run in the middle of another print
                os.write(2, b"\nStopping: the step is finished and saved first.%b\n" % once_more)

    def agreed_number(self) -> int:
        """Return the signal that any of the processes has received, the same on all; 0 if none."""
        return max(gather([self.number or 0]))


def launcher_limit() -> str | None:
    """Return a warning if a launcher would kill its processes before a step is saved.

    After Ctrl-C or SIGTERM torchrun and accelerate wait 30 s, unless a variable says otherwise.
    """
    if process_count() == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    can_be_set = "shutdown_timeout" in LaunchConfig.__dataclass_fields__  # since torch 2.14
    limit = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30") if can_be_set else "30"
    if limit.isdecimal() and int(limit) >= SECONDS_TO_SAVE:
        return None
    longer = f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT={SECONDS_TO_SAVE} in the launcher's environment, or "
    return (
        f"After Ctrl-C or SIGTERM the launcher kills this run within {limit} s, saved or not. What "
        f"gives it time: {longer if can_be_set else ''}the signal to this process alone (kill -INT "
        f"{os.getpid()})"
    )


def exit_with_parent(_: int) -> None:
    """Make a loader's worker process end when its parent does, neither before nor after.

    A Ctrl-C reaches it too: it must outlive it, or the step cannot be finished. And torch's workers
    may outlive a parent that was killed, waiting for someone to read what they have made.
    """
    for number in StopSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=exit_after, args=(os.getppid(),), daemon=True).start()


def exit_after(parent: int) -> None:
    """End this process when its parent is no longer the one it had."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class Health:
    """Looks at the metrics of every step, in the order of the run."""

    def __init__(self, dtype: torch.dtype, history: list[dict]) -> None:
        self.dtype, self.history = dtype, list(history)
        self.warned: set[str] = set()

    def check(self, metrics: dict) -> list[str]:
        """Return warnings about this step, each only once in a run. Raises `Unhealthy`."""
        self.history.append(metrics)
        check_sampler_gap(metrics, self.dtype)
        warnings = check_skipped(self.history)
        found = find_collapse(self.history)
        warnings += [text for kind, text in found.items() if kind not in self.warned]
        self.warned |= found.keys()
        return warnings

    def check_end(self) -> None:
        """Raise `Unhealthy` if the last step was skipped: the policy may be of no use by then."""
        if self.history and self.history[-1]["skipped"]:
            raise Unhealthy(
                f"the last step was skipped, {self.history[-1]['not_finite']} not finite, so there "
                f"is no final/. More steps (--resume, --steps) may mend it; else a new run with a "
                f"lower --lr or a higher --beta"
            )


def check_sampler_gap(metrics: dict, dtype: torch.dtype) -> None:
    """Raise `Unhealthy` if, at the first step, sampling and scoring were not one distribution."""
    allowed, gap = MAX_SAMPLER_GAP[dtype], metrics["sampler_gap_mean"]
    if metrics["step"] > 0:
        return
    if not math.isfinite(gap):
        raise Unhealthy(
            f"the log-probs of the first samples are not finite, though the weights are: some are "
            f"so large that {dtype} cannot hold what comes of them"
        )
    if gap > allowed:
        raise Unhealthy(
            f"the log-probs recorded while sampling and those of the scoring pass differ by "
            f"{gap:.4f} per token (up to {allowed} is rounding). The "
            f"policy would be trained on samples it did not draw: temperature, positions, masks or "
            f"the key-value cache differ between sampling.Sampler and scoring.completion_logprobs"
        )


def check_skipped(history: list[dict]) -> list[str]:
    """Return a warning if the latest step was skipped. Raises `Unhealthy` after too many."""
    latest = history[-1]
    if not latest["skipped"]:
        return []
    if len(history) >= MAX_SKIPPED and all(step["skipped"] for step in history[-MAX_SKIPPED:]):
        raise Unhealthy(
            f"{latest['not_finite']} not finite in {MAX_SKIPPED} steps in a row, which were all "
            f"skipped; a lower --lr or a higher --beta usually helps"
        )
    return [f"step {latest['step']}: skipped, not finite: {latest['not_finite']}"]


def find_collapse(history: list[dict]) -> dict[str, str]:
    """Return what is wrong with the latest steps beside the first ones, and where to look."""
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
            f"{changed}: all samples are nearly the same; {LOOK}; a higher --beta holds it up",
        ),
        "noise": (
            entropy > 3 * entropy_then,
            f"{changed}: the policy is turning to noise; {LOOK}; a lower --lr or a higher --beta",
        ),
        "short": (
            length < 0.25 * length_then,
            f"completions shrank from {length_then:.0f} to {length:.0f} tokens; {LOOK}",
        ),
        "long": (
            truncated > 0.5,
            f"{100 * truncated:.0f} % of the completions are cut off; {LOOK}, or --max-new-tokens",
        ),
        "equal": (
            no_spread == 1,
            f"all rewards of every group are equal: nothing is learned; {LOOK}; --temperature",
        ),
    }
    step = history[-1]["step"]
    return {kind: f"step {step}: {text}" for kind, (wrong, text) in checks.items() if wrong}


def mean(steps: list[dict], key: str) -> float:
    """Return the mean of a metric; a value that was not finite is passed over, nan if all are."""
    values = [step[key] for step in steps if step[key] is not None and step[key] == step[key]]
    return statistics.fmean(values) if values else float("nan")
