"""health.py: reasons to stop or warn, and the effect of signals."""

import os
import signal
import time
from multiprocessing import get_context

import pytest
import torch

from harness import health as health_module
from harness.health import MAX_SKIPPED, WINDOW, Health, StopSignal, Unhealthy, exit_when_orphaned

SOUND = {
    "skipped": 0,
    "not_finite": "",
    "sampler_gap_mean": 1e-5,
    "entropy": 0.5,
    "completion_length_mean": 30.0,
    "truncated_share": 0.0,
    "no_spread_share": 0.2,
}


def steps(*changes: dict) -> list[dict]:
    return [{"step": number, **SOUND, **change} for number, change in enumerate(changes)]


def warnings_of(*changes: dict) -> list[str]:
    health = Health(torch.float32, [])
    return [warning for step in steps(*changes) for warning in health.check(step)]


# --- numbers ------------------------------------------------------------------------------


def test_a_sound_run_has_no_warnings():
    assert warnings_of(*[{}] * 50) == []


@pytest.mark.parametrize(
    ("step", "gap", "dtype", "stops"),
    [
        (0, 1e-5, torch.float32, False),
        (0, 2e-3, torch.float32, True),
        (0, 2e-3, torch.bfloat16, False),
        (0, 0.2, torch.bfloat16, True),
        (1, 0.2, torch.float32, False),
    ],
)
def test_a_sampler_that_differs_from_the_scorer_stops_the_run(step, gap, dtype, stops):
    health, metrics = Health(dtype, []), {**SOUND, "step": step, "sampler_gap_mean": gap}
    if not stops:
        assert health.check(metrics) == []
        return
    with pytest.raises(Unhealthy, match="samples that are not its own"):
        health.check(metrics)


def test_log_probs_that_are_not_finite_are_told_as_such():
    """The message must not blame masks or positions: loading has already checked the weights."""
    health, gap = Health(torch.bfloat16, []), {"sampler_gap_mean": float("nan")}
    with pytest.raises(Unhealthy, match="not finite, though the weights are") as told:
        health.check({**SOUND, "step": 0} | gap)
    assert "cache" not in str(told.value)


BAD = {"skipped": 1, "not_finite": "loss, gradient"}


def test_a_skipped_step_is_told_with_what_was_not_finite():
    assert warnings_of({}, BAD, {}) == ["step 1: skipped, not finite: loss, gradient"]


def test_too_many_in_a_row_stop_the_run():
    assert len(warnings_of({}, *[BAD] * (MAX_SKIPPED - 1), {}, *[BAD] * (MAX_SKIPPED - 1))) == 8
    with pytest.raises(Unhealthy, match="loss, gradient not finite in 5 steps in a row"):
        warnings_of({}, *[BAD] * MAX_SKIPPED)


def test_a_run_that_ends_in_a_skipped_step_has_no_end():
    health = Health(torch.float32, [])
    for metrics in steps({}, BAD, {}):
        health.check(metrics)
    health.check_end()
    health.check({**SOUND, **BAD, "step": 3})
    with pytest.raises(
        Unhealthy,
        match=r"last step was skipped \(loss, gradient not finite\)",
    ):
        health.check_end()


def test_a_resumed_run_remembers_the_steps_before():
    health = Health(torch.float32, steps({}, *[BAD] * (MAX_SKIPPED - 1)))
    with pytest.raises(Unhealthy):
        health.check({**SOUND, **BAD, "step": 5})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"entropy": 0.04}, "all samples are nearly the same"),
        ({"entropy": 1.6}, "turning to noise"),
        ({"completion_length_mean": 5.0}, "shrank from 30 to 5 tokens"),
        ({"truncated_share": 0.6}, "60 % of the completions are cut off"),
        ({"no_spread_share": 1.0}, "nothing is learned"),
    ],
)
def test_a_collapse_is_told_once_with_where_to_look(change, told):
    warnings = warnings_of(*[{}] * WINDOW, *[change] * 30)
    assert len(warnings) == 1
    assert told in warnings[0]
    assert "samples.jsonl" in warnings[0]


@pytest.mark.parametrize(
    "change",
    [
        {"entropy": 0.06},
        {"entropy": 1.4},
        {"completion_length_mean": 8.0},
        {"truncated_share": 0.4},
        {"no_spread_share": 0.9},
        {"entropy": None},  # how metrics.jsonl stores NaN and infinity
        {"entropy": float("nan")},
    ],
)
def test_less_than_a_collapse_is_not(change):
    assert warnings_of(*[{}] * WINDOW, *[change] * 30) == []


# --- signals ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_noted_and_the_second_has_its_usual_effect(number, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.number is None
        signal.raise_signal(number)
        assert stop.number == number
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(number) is before
    assert "finishing and saving this step first" in capfd.readouterr().err


def test_a_signal_is_noted_where_nobody_can_be_told(monkeypatch):
    """Under `2>&1 | tee`, Ctrl-C also ends tee: the handler's own line hits a broken pipe."""

    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT


@pytest.mark.parametrize(
    ("environment", "processes", "told"),
    [
        ({}, 2, None),  # no launcher
        ({"TORCHELASTIC_RUN_ID": "1"}, 1, None),
        ({"TORCHELASTIC_RUN_ID": "1"}, 2, "within 30 s"),
        ({"TORCHELASTIC_RUN_ID": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60"}, 2, "within 60 s"),
        ({"TORCHELASTIC_RUN_ID": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}, 2, None),
    ],
)
def test_a_launcher_that_would_kill_before_a_step_is_saved(
    monkeypatch, environment, processes, told
):
    for name in ("TORCHELASTIC_RUN_ID", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(health_module, "process_count", lambda: processes)
    for since in ({"shutdown_timeout": None}, {}):  # torch 2.14; older: no such setting
        monkeypatch.setattr(health_module.LaunchConfig, "__dataclass_fields__", since)
        warning = health_module.launcher_limit()
        if since and told is None:
            assert warning is None
        elif told:
            assert (told if since else "within 30 s") in warning
            assert ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in warning) == bool(since)
            assert f"kill -INT {os.getpid()}" in warning


def orphan(pid) -> None:
    """Start a child that should end with this process, then die at once."""
    parent, child = os.getpid(), os.fork()
    if child == 0:
        exit_when_orphaned(parent)
    pid.value = child
    os._exit(0)


def test_a_worker_ends_when_its_parent_has_died():
    context = get_context("fork")
    pid = context.Value("i", 0)
    process = context.Process(target=orphan, args=(pid,))
    process.start()
    process.join()
    for _ in range(100):
        if not is_running(pid.value):
            return
        time.sleep(0.1)
    os.kill(pid.value, signal.SIGKILL)
    raise AssertionError("it outlived its parent")


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False
