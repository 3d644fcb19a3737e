"""terminal.py: output that cannot be written is dropped, and never stops a run.

The tests write to the real thing: a pipe without a reader, a terminal that closes.
"""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_faults import faults

from harness.checkpoint import checkpoints_of
from harness.terminal import replacement

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--preset tiny --device cpu --prompts-per-step 2 --group-size 2 --image-size 84"
FLAGS += " --eval-every 2 --eval-examples 2 --log-every 1 --max-new-tokens 8"
MAIN = [sys.executable, str(ROOT / "main.py"), *FLAGS.split()]


def said(program: str, **environment: str) -> subprocess.CompletedProcess:
    code = (
        f"import sys; from harness.terminal import ignore_output_errors; "
        f"ignore_output_errors(); {program}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)


def test_what_the_encoding_lacks_is_escaped():
    done = said("print('my_ü', '面')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, b"my_\\xfc \\u9762\n")
    done = said("print('my_ü', file=sys.stderr)", PYTHONIOENCODING="cp1252")
    assert (done.returncode, done.stderr) == (0, b"my_\xfc\n")


def test_a_line_is_there_as_soon_as_it_is_printed():
    program = "print('first'); import os; os._exit(0)"  # exits without flushing
    assert said(program).stdout == b"first\n"


@pytest.mark.parametrize("broken", ["full", "no reader", "no terminal", "closed"])
def test_what_cannot_be_written_is_dropped(broken, tmp_path):
    if broken == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    elif broken == "no reader":
        reader, descriptor = os.pipe()
        os.close(reader)
    elif broken == "no terminal":
        terminal, descriptor = pty.openpty()
        os.close(terminal)
    else:
        descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    with open(descriptor, "w", closefd=False) as before:
        stream = replacement(before, descriptor)
    if broken == "closed":
        os.close(descriptor)
    for _ in range(10_000):  # more than any buffer can hold
        print("a line of some length", file=stream)
    stream.flush()
    stream.close()


def test_no_file_takes_the_place_of_a_stream_that_the_shell_has_closed(tmp_path):
    """With `>&-`, the next file opened would become stdout and receive the printed text."""
    path = tmp_path / "log"
    program = f"file = open({str(path)!r}, 'w'); print('lost'); file.write('kept')"
    code = (
        f"import sys; from harness.terminal import ignore_output_errors; "
        f"ignore_output_errors(); {program}"
    )
    command = f'exec {sys.executable} -c "$CODE" >&- 2>&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CODE": code}
    assert subprocess.run(["bash", "-c", command], env=environment).returncode == 0
    assert path.read_text() == "kept"


def test_ctrl_c_under_tee_saves_the_step(tmp_path):
    """The terminal interrupts the whole pipeline: tee dies, and both streams with it."""
    flags = ["--steps", "400", "--save-every", "0", "--runs", str(tmp_path), "--name", "tee"]
    reader, writer = os.pipe()
    process = subprocess.Popen([*MAIN, *flags], stdout=writer, stderr=writer)
    os.close(writer)
    while faults.lines_of(tmp_path / "tee") < 2 and process.poll() is None:
        time.sleep(0.05)
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 128 + signal.SIGINT
    (saved,) = checkpoints_of(tmp_path / "tee")
    assert int(saved.name.removeprefix("step-")) == faults.lines_of(tmp_path / "tee")
