"""Terminal output that never stops a run: text that cannot be written is dropped.

The reader of a pipe may be gone (`| head`, Ctrl-C under `| tee`), the terminal closed, the disk
behind `> log` full, or a character missing from the encoding. None of these may end a run. If a
command cannot write one of its files, it still writes the others.
"""

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def ignore_output_errors() -> None:
    """Replace this process's stdout and stderr by streams that drop text they cannot write.

    They escape characters that the encoding lacks, and flush each line, so that `tail -f` shows
    it. Streams that are not the process's own (a notebook's, a test's) stay as they are.
    """
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            setattr(sys, name, replacement(getattr(sys, name), descriptor))


def replacement(stream: io.TextIOWrapper | None, descriptor: int) -> io.TextIOWrapper:
    """Return a stream on `descriptor` that has the encoding of `stream` and never raises."""
    if stream is None:  # closed by the shell (`>&-`): the next file opened would get its number
        open_on_devnull(descriptor)
    else:
        with suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(BestEffortFile(descriptor, "wb", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


def open_on_devnull(descriptor: int) -> None:
    """Open a closed descriptor on /dev/null; leave an open one alone."""
    try:
        os.fstat(descriptor)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != descriptor:
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


class BestEffortFile(io.FileIO):
    """A file that accepts all data and drops data that it cannot write."""

    def write(self, data) -> int:
        """Write the data, or drop them; return their length."""
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


# --- files that a command writes ----------------------------------------------------------


def check_folder(flag: str, folder: Path) -> None:
    """Raise `ValueError` unless the folder that a flag names is writable."""
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise ValueError(f"{flag} {folder}: must be a folder that can be written to")


def write_file(path: Path, write: Callable[[Path], object]) -> bool:
    """Write a file, or print in one line why that failed; return whether it was written."""
    try:
        write(path)
    except Exception as error:  # from the disk, or from a matplotlib style that the user has set
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        first_line = reason.strip().partition("\n")[0]
        print(" ".join(f"{path}: cannot be written: {first_line}".split()), file=sys.stderr)
        return False
    return True
