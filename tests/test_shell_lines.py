"""Every shell line of README and pages is accepted by its own program; what a processor does in seconds is run.

Lines are those of shell blocks, of indented blocks and of inline code. The README's blocks are preceded by a comment:
    <!-- test: run -->    in short form in `make test`, in full in `make test-all`
    <!-- test: slow -->   in full only
    <!-- test: skip -->   is only shown: it needs a download or another machine
"""

import argparse
import functools
import importlib
import keyword
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
from PIL import Image
from skimage import data

from morsr.cli import COMMANDS, LIGHTNING, main
from morsr.models.loading import find_adapters
from morsr.training.cli import MorsrCLI

REPO = Path(__file__).resolve().parents[1]
README = REPO / "README.md"
PAGES = [
    *(README, REPO / "CONTRIBUTING.md", REPO / "benchmarks/RESULTS.md"),
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "docs/results").glob("*.md")),
    *sorted((REPO / "src/morsr/weights").glob("*/README.md")),
]
PROGRAM = r"(?:morsr|make|python|torchrun|srun)\b"
BLOCKS = re.compile(
    rf"^```(?:sh|bash|shell|console)\n(.*?)^```|^```.*?^```|^ {{4}}({PROGRAM}[^\n]*)|`({PROGRAM} [^`]+)`", re.M | re.S
)


def lines_of(text: str) -> list[str]:
    """The lines of a shell block without comments, continued ones joined."""
    bare = (re.sub(r"(^|\s+)#.*$", "", line).strip() for line in text.replace("\\\n", " ").splitlines())
    return [line for line in bare if re.match(PROGRAM, line)]


LINES = {
    page: [
        line
        for block, indented, inline in BLOCKS.findall(page.read_text())
        for line in lines_of(block or indented or " ".join(inline.split()))
    ]
    for page in PAGES
}


def readme(*modes: str) -> list[str]:
    """The lines of the README's blocks that are marked so."""
    marked = re.findall(rf"^<!-- test: (?:{'|'.join(modes)}) -->\n```bash\n(.*?)^```", README.read_text(), re.M | re.S)
    return [line for block in marked for line in lines_of(block)]


def commands(line: str) -> list[list[str]]:
    """The arguments of every `morsr` that a line runs; `make` itself says which those are."""
    program, *words = shlex.split(line)
    if program in ("torchrun", "srun") and "morsr" in words:
        program, words = "morsr", words[words.index("morsr") + 1 :]
    if program != "make":
        return [words] if program == "morsr" else []
    variables = re.findall(r"^([A-Z_]+) \?=", (REPO / "Makefile").read_text(), re.M)
    assert {word.partition("=")[0] for word in words if "=" in word} <= set(variables)
    dry = ["make", "--dry-run", "PY=python", "STAMP=LICENSE", *words]  # STAMP: no makefile, which make would remake
    said = subprocess.run(dry, cwd=REPO, capture_output=True, text=True, check=True, timeout=60).stdout
    return [shlex.split(one)[3:] for one in said.splitlines() if one.startswith("python -m morsr ")]


class Parsed(Exception):
    """A program has accepted its arguments."""


def accepted(*_: Any) -> None:
    raise Parsed


def check_morsr(words: list[str], patches: pytest.MonkeyPatch) -> None:
    name, *rest = words
    assert name in (*COMMANDS, *LIGHTNING)
    if not rest or "--help" in rest or "--data.help" in rest or "X.yaml" in rest:
        return
    if name in LIGHTNING:
        patches.setattr(MorsrCLI, "before_instantiate_classes", accepted)
        with pytest.raises(Parsed):
            main(words)
    else:
        module = importlib.import_module(f"morsr.commands.{name}{'_' * keyword.iskeyword(name)}")
        patches.setattr(module, "run", functools.wraps(module.run)(lambda *_, **__: 0))
        assert main(words) == 0


def check_python(words: list[str], patches: pytest.MonkeyPatch) -> None:
    script = REPO / words[0]
    assert script.is_file()
    if len(words) == 1:  # the text only names it
        return
    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        parse = parser.parse_args
        patches.setattr(parser, "parse_args", lambda *given, parse=parse, **named: accepted(parse(*given, **named)))
    patches.setattr(sys, "argv", words)
    patches.syspath_prepend(str(script.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


ACCEPTED: set[tuple[str, ...]] = set()  # several pages show the same line


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in PAGES if LINES[page]], ids=lambda page: page.stem)
def test_every_line_is_accepted_by_its_program(page, monkeypatch):
    Path("experiments").symlink_to(REPO / "experiments")
    for line in sorted(set(LINES[page])):
        with monkeypatch.context() as patches:
            try:
                for words in commands(line):
                    as_it_is = line.startswith("make ") and "ARGS=" not in line
                    if not as_it_is and tuple(words) not in ACCEPTED:
                        check_morsr(words, patches)
                        ACCEPTED.add(tuple(words))
                if line.startswith("python "):
                    check_python(shlex.split(line)[1:], patches)
            except (AssertionError, Exception, pytest.fail.Exception) as error:
                raise AssertionError(f"{page.name}: {line}") from error


# What needs files or packages that are not here, another program or a browser, or hours.
NOT_RUN = re.compile(
    r"osediff|pisa|a/scores|--method-a|runs/ablation|estimator/learned|sd21|FOLDER_OR|demo|--help|--list"
)
PAGES_RUN = {page: LINES[page] for page in PAGES if page.parent == REPO / "docs" and "morsr " in str(LINES[page])}
TWO_STEPS = "--trainer.max_steps=2 --trainer.limit_val_batches=1 --data.batch_size=2 --model.calibration_images=4"


def prepare() -> None:
    """What the lines find in their working folder: photographs, configs and a run."""
    Path("experiments").symlink_to(REPO / "experiments")
    photo = Image.fromarray(data.chelsea()[60:188, 100:228])
    for folder, side in {"hr": 192, "lr": 48, "outputs": 192, "photos": 96, "FOLDER": 128}.items():
        Path(folder).mkdir()
        for name in "ab":
            photo.resize((side, side)).save(Path(folder, f"{name}.png"))
    for name in ("photo.jpg", "photo.png"):
        photo.resize((48, 48)).save(name)
    Path("runs/mor_tiny/version_0").mkdir(parents=True)
    for copy in ("adapters.safetensors", "runs/mor_tiny/version_0/adapters.safetensors"):
        shutil.copy(find_adapters("tiny"), copy)


def run(words: list[str], *more: str) -> None:
    """Run one command; those that train or test take further options."""
    if words[0] in ("upscale", "degrade"):  # their outputs are new
        for output in filter(Path.is_dir, map(Path, words[2:])):
            shutil.rmtree(output)
    assert main([*words, *more] if "--config" in words else words) == 0, words


def test_the_readmes_lines_in_short_form():
    prepare()
    lines = readme("run")
    assert {"make train", "morsr upscale sample:chelsea out.png"} <= set(lines)
    for line in lines:
        for words in commands(line.replace("sample:chelsea", "photo.jpg")):
            run(words, *TWO_STEPS.split(), "--data.crop_size=64", "--data.val_crop=64", "--data.num_workers=0")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_readmes_lines_in_full():
    prepare()
    for line in readme("run", "slow"):
        for words in commands(line):
            run(words)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES_RUN, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page):
    prepare()
    for line in PAGES_RUN[page]:
        if line.startswith("morsr ") and not NOT_RUN.search(line) and len(line.split()) > 2:
            run(shlex.split(line)[1:], *TWO_STEPS.split())
