"""Exit codes and lines of a command line, in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

HEADER = """
import sys, os, errno, time
from factorportrait.command import run_command
from factorportrait.errors import UserError
def work():
{body}
sys.exit(run_command("fp-test", work))
"""


def command(body: str) -> list[str]:
    return [sys.executable, "-c", HEADER.format(body="\n".join(f"    {line}" for line in body.splitlines()))]


@pytest.mark.parametrize(
    "body, code, line",
    [
        ("print('done')", 0, ""),
        ("return 3", 3, ""),
        (
            "raise UserError('x.png', expected='a picture', found='text\\nof two lines', action='give another')", 2,
            "fp-test: error: x.png; expected a picture; found text of two lines; give another",
        ),
        ("open('/no/such/file')", 2, "fp-test: error: /no/such/file: No such file or directory"),
        ("raise OSError(errno.ENOSPC, 'No space left on device')", 2, "fp-test: error: No space left on device"),
        ("raise KeyboardInterrupt", 130, "fp-test: interrupted"),
    ],
)  # fmt: skip
def test_exit_code_and_line(body, code, line):
    done = subprocess.run(command(body), capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.strip() == line


def test_a_mistake_in_the_program_keeps_its_traceback():
    done = subprocess.run(command("return 1 / 0"), capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr


def test_a_reader_that_went_away():
    process = subprocess.Popen(
        command("for i in range(100000): print(i)"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 141


@pytest.mark.parametrize(
    "number, code, line", [(signal.SIGTERM, 143, "fp-test: terminated"), (signal.SIGINT, 130, "fp-test: interrupted")]
)
def test_signals_remove_what_is_half_written(tmp_path, number, code, line):
    body = f"""from factorportrait.files import whole_folder
with whole_folder({str(tmp_path / "bundle")!r}) as folder:
    (folder / "graph").write_text("half")
    print("begun", flush=True)
    time.sleep(60)"""
    process = subprocess.Popen(command(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    assert len(list(tmp_path.iterdir())) == 1
    time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors.strip()) == (code, line)
    assert list(tmp_path.iterdir()) == []
