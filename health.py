"""What ends a run before its time, or deserves a warning: signals, numbers, a collapsing policy."""

import os
import signal
import stat
import statistics
import threading
import time

import torch

from parallel import everyone, is_main, process_count

# mean |log-prob sampled - scored| at the first step that still is rounding, in nats per token
MAX_SAMPLER_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1}
MAX_SKIPPED = 5  # steps in a row whose numbers are not finite
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
        if number == signal.SIGHUP:
            leave_terminal()
        if is_main():  # not print: a handler may run in the middle of another print
            once_more = b" Once more stops at once." if alone else b""
            os.write(2, b"\nStopping: the step is finished and saved first." + once_more + b"\n")

    def agreed_number(self) -> int:
        """Return the signal that any of the processes has received, the same on all; 0 if none."""
        return max(everyone([self.number or 0]))


def leave_terminal() -> None:
    """Send what would be written to the terminal, which is gone, to nowhere; files stay."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        if stat.S_ISCHR(os.fstat(output).st_mode):
            os.dup2(nowhere, output)


def follow_the_parent(_: int) -> None:
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
        found = collapse_of(self.history)
        warnings += [text for kind, text in found.items() if kind not in self.warned]
        self.warned |= found.keys()
        return warnings


def check_sampler_gap(metrics: dict, dtype: torch.dtype) -> None:
    """Raise `Unhealthy` if, at the first step, sampling and scoring were not one distribution."""
    allowed = MAX_SAMPLER_GAP[dtype]
    if metrics["step"] == 0 and not metrics["sampler_gap_mean"] <= allowed:
        raise Unhealthy(
            f"the log-probs recorded while sampling and those of the scoring pass differ by "
            f"{metrics['sampler_gap_mean']:.4f} per token (up to {allowed} is rounding). The "
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
            f"skipped. A new run from the last checkpoint (--model), with a lower --lr or a higher "
            f"--beta, usually helps"
        )
    return [f"step {latest['step']}: skipped, not finite: {latest['not_finite']}"]


def collapse_of(history: list[dict]) -> dict[str, str]:
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
