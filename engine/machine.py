"""What this machine lets a process have: memory below a container's limit, cores beside others."""

import os
from pathlib import Path

import psutil

COMMANDS = ("main.py", "evaluate.py", "cold_start.py")  # that keep all cores busy on a CPU
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
FILES = {  # of version 2 and 1: limit, use, and what of the use is page cache that can go
    "memory.max": ("memory.current", ("inactive_file", "active_file")),
    "memory.limit_in_bytes": (
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def free_host_memory() -> tuple[int, int]:
    """Return the bytes of host memory that this process can still use, and all it may have.

    In a container, or under a batch system, that is less than the machine has.
    """
    machine = psutil.virtual_memory()
    limits = cgroup_limits()
    free = min([machine.available, *(limit - used for limit, used in limits)])
    return max(0, free), min([machine.total, *(limit for limit, _ in limits)])


def cgroup_limits(own: Path = OWN_CGROUPS, root: Path = CGROUPS) -> list[tuple[int, int]]:
    """Return limit and use, in bytes, of every control group with a limit that holds this process.

    A limit may be set on the group itself or on any above it. Both versions of control groups are
    read: https://docs.kernel.org/admin-guide/cgroup-v2.html, .../cgroup-v1/memory.html
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
    """Return the limit and the use of one control group, if it has a limit."""
    for limit_file, (use_file, cache_rows) in FILES.items():
        limit, used = read(folder / limit_file).strip(), read(folder / use_file).strip()
        if limit.isdigit() and used.isdigit():  # without a limit it says "max"
            rows = dict(line.split() for line in read(folder / "memory.stat").splitlines())
            cache = sum(int(rows.get(row, 0)) for row in cache_rows)
            return [(int(limit), max(0, int(used) - cache))]
    return []


def read(path: Path) -> str:
    """Return what a file holds; nothing where there is none, as outside of Linux."""
    try:
        return path.read_text()
    except OSError:
        return ""


def threads_beside_others(threads: int) -> str | None:
    """Return a warning if other runs compute with the same cores; None if there are none.

    A thread that waits for the others of its process spins, on a core that another run needs: two
    runs with 2 threads each on 2 cores took 4 to 5 times as long as one alone, with 1 thread each
    1.3 times.
    """
    others = runs_beside()
    if others == 0 or threads == 1:
        return None
    each = max(1, threads // (others + 1))
    return (
        f"Runs beside this one: {others}. With {threads} threads each they slow each other down "
        f"several times over; start each with OMP_NUM_THREADS={each} (cores / runs)"
    )


def runs_beside() -> int:
    """Return how many other processes, and not their own workers, run one of COMMANDS."""
    found = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        program, *arguments = process.info["cmdline"] or [""]
        is_python = Path(program).name.startswith("python")
        if is_python and any(Path(argument).name in COMMANDS for argument in arguments[:2]):
            found[process.pid] = process.info["ppid"]
    found.pop(os.getpid(), None)
    return sum(parent not in found and parent != os.getpid() for parent in found.values())
