"""plot_rewards.py on run folders as they are, whole and damaged."""

import json

import numpy as np
import pytest
from PIL import Image

import plot_rewards
from plot_rewards import (
    REWARDS,
    RunError,
    averages,
    curve,
    moving_average,
    read_metrics,
    seeds_of,
)


@pytest.fixture
def run(tmp_path):
    def make(name: str, *, steps: int = 30, tail: str = ""):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            json.dumps({"step": i, "prompts": 4 * (i + 1), **dict.fromkeys(REWARDS, i / 50)})
            for i in range(steps)
        ]
        (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + tail)
        return folder

    return make


@pytest.mark.parametrize("window", [2, 7, 100])
def test_moving_average_equals_a_plain_loop(window):
    values = np.random.default_rng(0).normal(size=50)
    values[[3, 20]] = np.nan
    expected = [np.nanmean(values[max(0, i - window + 1) : i + 1]) for i in range(50)]
    np.testing.assert_allclose(moving_average(values, window), expected)


def test_moving_average_of_nothing_known_is_unknown():
    assert np.isnan(moving_average(np.array([np.nan, np.nan, 1.0]), 2)).tolist() == [1, 1, 0]


def test_one_run_gives_three_figures(run, capsys):
    folder = run("base")
    plot_rewards.main([str(folder)])
    for key in REWARDS:
        assert Image.open(folder / f"{key}.png").size == (960, 540)
    *paths, _, change = capsys.readouterr().out.splitlines()
    assert [path.rsplit("/")[-1] for path in paths] == [f"{key}.png" for key in REWARDS]
    assert "area_correctness_reward 0.19 -> 0.39" in change  # of 0.00, 0.02, ... 0.58


def test_several_runs_give_one_figure(run, tmp_path):
    plot_rewards.main([str(run("base")), str(run("rotated")), "--out", str(tmp_path)])
    assert (tmp_path / "area_correctness_reward_variations.png").exists()


def test_seeds_are_averaged_step_by_step_as_far_as_all_of_them_go(tmp_path):
    runs = [tmp_path / f"wide-seed{seed}" for seed in (0, 1)]
    for run, rewards in zip(runs, ([0, 1, 2, 3], [2, 3, 4]), strict=True):
        run.mkdir()
        steps = [{"step": i, "prompts": i + 1, "r": reward} for i, reward in enumerate(rewards)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert list(seeds_of([*runs, tmp_path / "wide"])) == ["wide, 3 seeds"]
    x, y = averages(runs, "r", window=2, axis="prompts")
    assert x.tolist() == [1, 2, 3]
    assert y.tolist() == [[0, 0.5, 1.5], [2, 2.5, 3.5]]


def test_the_band_goes_from_the_lowest_seed_to_the_highest(run):
    _, axes = plot_rewards.new_axes("", "", "", (0, 1))
    runs = [run("a-seed0"), run("a-seed1", steps=20), run("b")]
    key = "area_correctness_reward"
    (runs[1] / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "prompts": 4 * i + 4, key: 1}) + "\n" for i in range(20))
    )
    plot_rewards.draw_seeds(axes, runs, key, window=1, axis="steps")
    means, (band,) = [line.get_ydata() for line in axes.lines], axes.collections
    np.testing.assert_allclose(means[0], (np.arange(20) / 50 + 1) / 2)  # of i / 50 and 1
    assert len(means[1]) == 30
    box = band.get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (0, 1)


def test_axis_counts_prompts_or_steps(run):
    steps = read_metrics(run("base", steps=3))
    assert curve(steps, "area_format_reward", "prompts")[0].tolist() == [4, 8, 12]
    assert curve(steps, "area_format_reward", "steps")[0].tolist() == [1, 2, 3]


def test_a_line_being_written_is_left_out(run):
    assert len(read_metrics(run("half", tail='{"step": 30, "prom'))) == 30


@pytest.mark.parametrize(
    ("tail", "steps", "message"),
    [
        ("", 0, "no step has been logged yet"),
        ('{"step": 0', 0, "no step has been logged yet"),
        ("not json\n", 2, "line 3 is not a step of a run"),
        ("[1]\n", 0, "line 1 is not a step of a run"),
        ('{"step": 1}\n', 0, "line 1 is not a step of a run"),
        ('{"step": Infinity, "prompts": 1}\n', 0, "line 1 is not a step of a run"),
    ],
)
def test_damaged_runs_are_named(run, tail, steps, message):
    with pytest.raises(RunError, match=message):
        read_metrics(run("damaged", steps=steps, tail=tail))


def test_values_that_are_missing_leave_a_gap(run):
    folder = run("gap", steps=2, tail='{"step": 2, "prompts": 12, "kl": null}\n')
    _, values = curve(read_metrics(folder), "kl", "steps")
    assert np.isnan(values).all()
    plot_rewards.main([str(folder)])


@pytest.mark.parametrize("flags", [["missing"], ["missing", "--window", "0"], []])
def test_bad_input_is_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        plot_rewards.main(flags)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
