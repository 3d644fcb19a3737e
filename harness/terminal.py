"""Output that never decides over the work: what the terminal does not take is dropped.

The reader of a pipe may be gone (`| head`, Ctrl-C under `| tee`), a terminal closed, the disk
behind `> log` full, a character unknown to the encoding. None of that may end a run. Of the files
that a command writes, each fails alone.
"""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def never_fail() -> None:
    """Give this process a stdout and a stderr that drop what cannot be written.

    Characters that the encoding lacks are escaped. Each line is written at once, so that `tail -f`
    shows it. Streams that are not the process's own (a notebook's, a test's) are left alone.
    """
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            setattr(sys, name, replacement(getattr(sys, name), descriptor))


def replacement(stream: io.TextIOWrapper | None, descriptor: int) -> io.TextIOWrapper:
    """Return a stream on a descriptor that writes what `stream` would, and never raises."""
    if stream is None:  # closed by the shell (`>&-`): the next file opened would take its number
        reserve(descriptor)
    else:
        with suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Droppable(descriptor, "wb", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


def reserve(descriptor: int) -> None:
    """Send a descriptor that is closed to nowhere; one that is in use is left alone."""
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


class Droppable(io.FileIO):
    """A file that takes everything, and loses what cannot be written."""

    def write(self, data) -> int:
        """Write, or drop, the data; return its length."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


# --- files that a command writes ----------------------------------------------------------


def check_folder(flag: str, folder: Path) -> None:
    """Raise `ValueError` unless files can be written to the folder that a flag names."""
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise ValueError(f"{flag} {folder}: must be a folder that can be written to")


def write_file(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file, or say in one line why it cannot be; return whether it is written."""
    try:
        write(path)
    except Exception as error:  # of the disk, or of a matplotlib style that the user has set
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        first_line = reason.strip().partition("\n")[0]
        print(" ".join(f"{path}: cannot be written: {first_line}".split()), file=sys.stderr)
        return False
    return True
