"""machine.py: memory limits of containers, from files in the kernel's layout, and other runs."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import machine
from engine.machine import cgroup_limits, free_host_memory, threads_beside_others

MIB = 2**20


def write(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


def limits(tmp_path: Path, own: str, files: dict[str, object]) -> list[tuple[int, int]]:
    (tmp_path / "cgroup").write_text(own)
    write(tmp_path / "fs", files)
    return cgroup_limits(tmp_path / "cgroup", tmp_path / "fs")


def test_version_1_as_docker_mounts_it(tmp_path):
    """Inside the container, the group's path does not exist; its files are at the top."""
    files = {
        "memory/memory.limit_in_bytes": 600 * MIB,
        "memory/memory.usage_in_bytes": 250 * MIB,
        "memory/memory.stat": f"cache 1\ntotal_inactive_file {30 * MIB}\n"
        f"total_active_file {20 * MIB}",
    }
    own = "11:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n"
    assert limits(tmp_path, own, files) == [(600 * MIB, 200 * MIB)]


def test_version_2_with_a_limit_above(tmp_path):
    """SLURM limits the job, not the step in it."""
    files = {
        "job/memory.max": 900 * MIB,
        "job/memory.current": 300 * MIB,
        "job/memory.stat": f"anon 1\ninactive_file {100 * MIB}",
        "job/step/memory.max": "max",
        "job/step/memory.current": 10 * MIB,
        "other/memory.max": MIB,
        "other/memory.current": 0,
    }
    assert limits(tmp_path, "0::/job/step\n", files) == [(900 * MIB, 200 * MIB)]


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert limits(tmp_path, "", {}) == []
    assert cgroup_limits(tmp_path / "nothing", tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], (500, 1000)),
        ([(800, 600)], (200, 800)),
        ([(800, 100)], (500, 800)),  # the machine has less free memory
        ([(800, 600), (700, 650)], (50, 700)),
        ([(2**63 - 4096, 600)], (500, 1000)),  # no limit, as version 1 writes it
        ([(100, 120)], (0, 100)),
    ],
)
def test_the_least_of_machine_and_groups_counts(monkeypatch, groups, expected):
    memory = SimpleNamespace(available=500, total=1000)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(machine, "cgroup_limits", lambda: groups)
    assert free_host_memory() == expected


def process(pid: int, parent: int, command: str) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, info={"cmdline": command.split(), "ppid": parent})


OTHERS = [
    process(11, 1, "python main.py --preset tiny"),
    process(12, 11, "python main.py --preset tiny"),  # a worker of process 11
    process(13, 1, "/venv/bin/python3.11 -u /home/x/evaluate.py tiny"),
]
NONE = [
    process(21, 1, "vim main.py"),
    process(22, 1, "bash -c python main.py"),
    process(23, 1, "python -m pytest tests/test_main.py"),
    process(24, os.getpid(), "python main.py"),  # a worker of this run
    process(os.getpid(), 1, "python main.py"),
    process(25, 1, ""),
    SimpleNamespace(pid=26, info={"cmdline": None, "ppid": 1}),  # a process of another user
]


def test_other_runs_on_the_same_cores_are_told_with_what_to_set(monkeypatch):
    for processes, threads, told in (
        (NONE, 8, None),
        (NONE + OTHERS, 1, None),
        (
            NONE + OTHERS,
            8,
            "Other runs on this machine: 2. With 8 threads each.* OMP_NUM_THREADS=2",
        ),
        (NONE + OTHERS, 2, "OMP_NUM_THREADS=1 "),
    ):
        monkeypatch.setattr(machine.psutil, "process_iter", lambda _, found=processes: found)
        warning = threads_beside_others(threads)
        assert (warning is None) if told is None else re.search(told, warning)
