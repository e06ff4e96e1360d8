"""Every command of the README runs: in short form in `make test`, in full in `make test-all`.

Each fenced bash block is preceded by one of these comments:
    <!-- test: run -->    runs in short form and in full
    <!-- test: slow -->   runs in full only
    <!-- test: skip -->   is only shown (it needs a download or another machine)
A block runs as one script, in the order of the README, in a folder that looks like the checkout: its entries are links,
what the commands write lands beside them. It finds a photograph in photo.jpg and two in photos/.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from morsr.cli import main

README = Path(__file__).resolve().parents[1] / "README.md"
MODES = ("run", "slow", "skip")

# What both forms replace, line by line, first match wins: getting the code and installing it has happened already, and
# the tests do not run themselves.
ALWAYS = [
    (r"git clone .*", "true"),
    (r"cd morsr", "true"),
    (r"(uv )?pip install .*", "true"),
    (r"make setup", "true"),
    (r"source .*", "true"),
    (r"make (test|test-all)", r"make --dry-run \1"),
]
# What the short form replaces besides: two steps of two images, a smaller photograph.
TWO_STEPS = (
    "--trainer.max_steps=2 --trainer.limit_val_batches=1 --data.batch_size=2 --data.num_workers=0"
    " --model.calibration_images=4"
)
SHORT = [
    (r"make train", f'make train ARGS="{TWO_STEPS}"'),
    (r"morsr upscale sample:chelsea(.*)", r"morsr upscale photo.jpg\1"),
]


class Block(NamedTuple):
    line: int
    mode: str
    script: str


def bash_blocks(text: str) -> list[Block]:
    found = []
    for match in re.finditer(
        r"(?:^<!-- test: (\w+) -->\n\s*)?^```(?:bash|sh|shell|console)\n(.*?)^```", text, re.M | re.S
    ):
        found.append(Block(text[: match.start(2)].count("\n") + 1, match[1] or "unmarked", match[2]))
    return found


def rewrite(script: str, table: list[tuple[str, str]]) -> str:
    """Replace whole lines by the table; a trailing comment and continued lines are folded away first."""
    lines = []
    for line in script.replace("\\\n", " ").splitlines():
        bare = re.sub(r"\s+#.*$", "", line).strip()
        for pattern, replacement in table:
            if re.fullmatch(pattern, bare):
                bare = re.sub(rf"^{pattern}$", replacement, bare)
                break
        lines.append(bare)
    return "\n".join(lines)


BLOCKS = bash_blocks(README.read_text()) if README.is_file() else []


def blocks(*modes: str) -> list:
    return [pytest.param(block, id=f"line{block.line}") for block in BLOCKS if block.mode in modes]


def photograph(height: int, width: int) -> Image.Image:
    from skimage import data

    return Image.fromarray(np.ascontiguousarray(data.chelsea()[60 : 60 + height, 100 : 100 + width]))


@pytest.fixture(scope="module")
def checkout(repo_root, tmp_path_factory):
    """A folder of links to the checkout's entries, for all blocks of this file: later commands find earlier outputs."""
    folder = tmp_path_factory.mktemp("readme") / "morsr"
    folder.mkdir()
    for entry in repo_root.iterdir():
        if entry.name not in (".git", ".venv", "runs", "outputs", "photo.jpg", "photos"):
            (folder / entry.name).symlink_to(entry)
    photograph(96, 128).save(folder / "photo.jpg", quality=90)
    (folder / "photos").mkdir()
    for number, size in enumerate([(80, 112), (96, 72)]):
        photograph(*size).save(folder / "photos" / f"{number}.png")
    tools = folder / ".tools"
    tools.mkdir()
    # The commands run with the Python of these tests, whether or not morsr is installed there, and `make` does not
    # set up a second environment.
    for name, command in {
        "morsr": f'{shlex.quote(sys.executable)} -m morsr "$@"',
        "make": f'{shutil.which("make")} PY={shlex.quote(sys.executable)} STAMP=.tools/stamp "$@"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (tools / name).chmod(0o755)
    (tools / "stamp").touch()
    return folder


def run_block(block: Block, table: list[tuple[str, str]], checkout: Path, timeout: float) -> None:
    script = rewrite(block.script, table)
    path = os.pathsep.join([str(checkout / ".tools"), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=checkout, env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, errors="replace", timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, f"README.md line {block.line}:\n{script}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_every_block_says_how_it_is_tested():
    assert BLOCKS, "README.md has no bash block"
    wrong = [f"line {block.line}: {block.mode}" for block in BLOCKS if block.mode not in MODES]
    assert not wrong, f"put <!-- test: run|slow|skip --> before these blocks of README.md: {wrong}"
    assert any(block.mode == "run" for block in BLOCKS)


def commands(line: str, checkout: Path) -> list[list[str]]:
    """The arguments of every `morsr` that a line runs; for `make` it says itself which those are."""
    words = shlex.split(line)
    if words[0] == "morsr":
        return [words[1:]]
    assert words[0] in ("make", "true"), f"a command that this test does not know: {line}"
    if words[0] == "true":
        return []
    dry = [str(checkout / ".tools" / "make"), "--dry-run", *words[1:]]
    said = subprocess.run(dry, cwd=checkout, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "-m " in said, f"make would do nothing: {line}"
    return [shlex.split(one)[3:] for one in said.splitlines() if " -m morsr " in one]


@pytest.mark.parametrize("block", blocks("run"))
def test_readme_command_in_short_form(block, checkout, monkeypatch):
    """In this process, which has loaded everything already."""
    monkeypatch.chdir(checkout)
    for line in filter(None, rewrite(block.script, ALWAYS + SHORT).splitlines()):
        for arguments in commands(line, checkout):
            assert main(arguments) == 0, f"README.md line {block.line}: morsr {shlex.join(arguments)}"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("block", blocks("run", "slow"))
def test_readme_command_in_full(block, checkout):
    run_block(block, ALWAYS, checkout, timeout=3500)
