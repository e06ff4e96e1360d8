"""How a command ends: by a signal, with a reader that has gone, with letters that the terminal lacks."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from morsr.cli import main
from morsr.commands import schema
from morsr.files import atomic_path


def command(monkeypatch: pytest.MonkeyPatch, body: Callable[[], object]) -> int:
    """Run `morsr schema` with another body."""

    def run() -> int:
        """Do something."""
        body()
        return 0

    monkeypatch.setattr(schema, "run", run)
    return main(["schema"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_no_half_written_file(name, code, monkeypatch, capsys):
    number = getattr(signal, name)
    outer = signal.signal(number, signal.SIG_DFL)  # a suite under nohup ignores SIGHUP

    def body() -> None:
        with atomic_path("table.csv") as part:
            part.write_text("half")
            assert signal.getsignal(number) != signal.SIG_DFL, "the test itself would end"
            signal.raise_signal(number)

    try:
        assert command(monkeypatch, body) == code
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outer)
    assert list(Path().iterdir()) == []
    assert capsys.readouterr().err == "morsr: stopped\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as by nohup
    try:
        assert command(monkeypatch, lambda: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_name_forges_no_line_of_success(capsys):
    names = "in\nmorsr: all is well.png", "out\nmorsr: stopped\x1b[2J.png"
    Image.new("RGB", (16, 16)).save(names[0])
    assert main(["upscale", *names, "--scale", "1"]) == 0
    assert main(["upscale", *names, "--scale", "1"]) == 0
    assert main(["severity", names[0]]) == 0
    said = capsys.readouterr()
    assert not any(line.startswith("morsr") or "\x1b" in line for line in (said.out + said.err).splitlines())


def printing(text: str) -> list[str]:
    """The command line of a process in which a command prints a text and does nothing else."""
    body = (
        "import sys",
        "from morsr.cli import main",
        "from morsr.commands import schema",
        "def run() -> int:",
        f"    print({text!a})",
        "schema.run = run",
        "sys.exit(main(['schema']))",
    )
    return [sys.executable, "-c", "\n".join(body)]


def test_a_reader_that_has_gone_ends_it_quietly():
    with subprocess.Popen(printing("a table"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=120) == 141


def test_letters_that_the_terminal_lacks_are_escaped():
    plain = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(printing("\u2191 \udce9"), capture_output=True, timeout=120, env=plain)
    assert done.stdout == b"\\u2191 \\udce9\n"
    assert done.returncode == 0
