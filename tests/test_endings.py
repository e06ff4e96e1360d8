"""How a command ends: by a signal, with a reader that has gone, with letters that the terminal lacks."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from morsr.cli import main
from morsr.commands import compare
from morsr.files import atomic_path

ARGUMENTS = ["compare", "a.csv", "b.csv"]


def command(monkeypatch: pytest.MonkeyPatch, run: Callable[[argparse.Namespace], int]) -> int:
    monkeypatch.setattr(compare, "run", run)
    return main(ARGUMENTS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_no_half_written_file(
    name: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    number = getattr(signal, name)
    outer = signal.signal(number, signal.SIG_DFL)  # a suite under nohup ignores SIGHUP

    def run(options: argparse.Namespace) -> int:
        with atomic_path("table.csv") as part:
            part.write_text("half")
            assert signal.getsignal(number) != signal.SIG_DFL, "the test itself would end"
            signal.raise_signal(number)
        return 0

    try:
        assert command(monkeypatch, run) == code
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outer)
    assert list(Path().iterdir()) == []
    assert capsys.readouterr().err == "morsr: stopped\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_signal_that_is_ignored_stays_so(monkeypatch: pytest.MonkeyPatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        assert command(monkeypatch, lambda options: signal.raise_signal(signal.SIGHUP) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def printing(text: str) -> list[str]:
    """The command line of a process in which the command prints a text and does nothing else."""
    lines = (
        "import sys",
        "from morsr.cli import main",
        "from morsr.commands import compare",
        f"compare.run = lambda options: print({text!a})",
        f"sys.exit(main({ARGUMENTS}))",
    )
    return [sys.executable, "-c", "\n".join(lines)]


def test_a_reader_that_has_gone_ends_it_quietly():
    with subprocess.Popen(printing("a table"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 141


def test_letters_that_the_terminal_lacks_are_escaped():
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(printing("\u2191 \udce9"), capture_output=True, timeout=120, env=plain)
    assert done.stdout == b"\\u2191 \\udce9\n"
    assert done.returncode == 0


def test_a_help_that_nobody_reads_ends_quietly():
    with subprocess.Popen(
        [sys.executable, "-m", "morsr", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) in (0, 141)  # argparse may swallow it


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "", "b.csv"], "argument 2: expected a value, got an empty one"),
        (["compare", "a.csv", "b.csv", "--json", ""], "--json: expected a value"),
        (["score", "--pred", "a", "--out="], "--out: expected a value"),
        (["import", "osediff", "", "x.safetensors", "--prompt", ""], "argument 3: expected a value"),
        (["import", "osediff", "x.pkl", "x.safetensors", "--prompt", ""], "x.pkl"),
    ],
)
def test_an_empty_argument_is_not_the_current_folder(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
