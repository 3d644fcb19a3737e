"""Memory and cores that this process can use, in a container or beside other runs."""

import os
from pathlib import Path

import psutil

COMMANDS = ("main.py", "evaluate.py", "cold_start.py")  # commands that use all cores on a CPU
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
FILES = {  # cgroup v2 and v1: limit, usage, and the part of it that is reclaimable page cache
    "memory.max": ("memory.current", ("inactive_file", "active_file")),
    "memory.limit_in_bytes": (
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def free_host_memory() -> tuple[int, int]:
    """Return the free and the total host memory of this process, in bytes.

    In a container or under a batch system, both may be less than the machine has.
    """
    machine = psutil.virtual_memory()
    limits = cgroup_limits()
    free = min([machine.available, *(limit - used for limit, used in limits)])
    return max(0, free), min([machine.total, *(limit for limit, _ in limits)])


def cgroup_limits(own: Path = OWN_CGROUPS, root: Path = CGROUPS) -> list[tuple[int, int]]:
    """Return (limit, usage) in bytes of every control group that limits this process.

    The process's group and each of its ancestors can set a limit. Reads both cgroup versions:
    https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html
    """
    found = []
    for line in read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        lowest = top / path.lstrip("/")
        for folder in (lowest, *lowest.parents):
            if folder.is_relative_to(top):
                found += limit_of(folder)
    return found


def limit_of(folder: Path) -> list[tuple[int, int]]:
    """Return [(limit, usage)] of one control group, [] if it has no limit."""
    for limit_file, (use_file, cache_rows) in FILES.items():
        limit, used = read(folder / limit_file).strip(), read(folder / use_file).strip()
        if limit.isdigit() and used.isdigit():  # "max" means no limit
            rows = dict(line.split() for line in read(folder / "memory.stat").splitlines())
            cache = sum(int(rows.get(row, 0)) for row in cache_rows)
            return [(int(limit), max(0, int(used) - cache))]
    return []


def read(path: Path) -> str:
    """Return a file's text, empty if it does not exist, as outside Linux."""
    try:
        return path.read_text()
    except OSError:
        return ""


def threads_beside_others(threads: int) -> str | None:
    """Return a warning if other runs use the same cores, else None.

    A thread that waits for the others of its process spins, on a core that another run needs: two
    runs with 2 threads each on 2 cores took 4 to 5 times as long as one alone, with 1 thread each
    1.3 times.
    """
    others = runs_beside()
    if others == 0 or threads == 1:
        return None
    each = max(1, threads // (others + 1))
    return (
        f"Other runs on this machine: {others}. With {threads} threads each, the runs slow each "
        f"other down several times over; start each with OMP_NUM_THREADS={each} (cores / runs)"
    )


def runs_beside() -> int:
    """Return how many other processes run one of COMMANDS, not counting their workers."""
    found = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        program, *arguments = process.info["cmdline"] or [""]
        is_python = Path(program).name.startswith("python")
        if is_python and any(Path(argument).name in COMMANDS for argument in arguments[:2]):
            found[process.pid] = process.info["ppid"]
    found.pop(os.getpid(), None)
    return sum(parent not in found and parent != os.getpid() for parent in found.values())
