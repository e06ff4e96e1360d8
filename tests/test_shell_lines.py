"""Every shell line of README and pages is accepted by its own program; what a processor does in seconds is run.

Lines are those of shell blocks, of indented blocks and of inline code. The README's blocks run in test_readme.
"""

import argparse
import functools
import importlib
import keyword
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import pytest
from PIL import Image
from skimage import data

from morsr.cli import COMMANDS, LIGHTNING, main
from morsr.training.cli import MorsrCLI

REPO = Path(__file__).resolve().parents[1]
PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")),
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "docs/results").glob("*.md")),
    *sorted((REPO / "src/morsr/weights").glob("*/README.md")),
]
PROGRAMS = ("morsr", "make", "python", "pytest", "pip", "torchrun", "srun", "tensorboard", "source")
PROGRAM = rf"(?:{'|'.join(PROGRAMS)})\b"
LINES = re.compile(
    rf"^```(?:sh|bash|shell|console)\n(.*?)^```|^```.*?^```|^ {{4}}({PROGRAM}[^\n]*)|`({PROGRAM} [^`]+)`", re.M | re.S
)
MAKEFILE = (REPO / "Makefile").read_text()


class Line(NamedTuple):
    page: Path
    text: str


def shell_lines(page: Path) -> Iterator[Line]:
    for block, indented, inline in LINES.findall(page.read_text()):
        text = (block or indented or " ".join(inline.split())).replace("\\\n", " ")
        for one in text.splitlines():
            bare = re.sub(r"(^|\s+)#.*$", "", one).strip()
            if bare:
                yield Line(page, bare)


ALL = [line for page in PAGES for line in shell_lines(page)]


class Parsed(Exception):
    """A program has accepted its arguments."""


def accepted(*_: Any) -> None:
    raise Parsed


def check_morsr(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    name, *rest = words
    if "--help" in rest or "--data.help" in rest:
        assert name in (*COMMANDS, *LIGHTNING)
    elif name in LIGHTNING and rest:
        monkeypatch.setattr(MorsrCLI, "before_instantiate_classes", accepted)
        with pytest.raises(Parsed):
            main(words)
    elif name in COMMANDS and rest:
        module = importlib.import_module(
            f"morsr.commands.{name}_" if keyword.iskeyword(name) else f"morsr.commands.{name}"
        )
        monkeypatch.setattr(module, "run", functools.wraps(module.run)(lambda *_, **__: 0))
        assert main(words) == 0
    else:
        assert name in (*COMMANDS, *LIGHTNING)


def check_make(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    assert targets
    assert set(targets) <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    assert set(given) <= set(re.findall(r"^([A-Z_]+) \?=", MAKEFILE, re.M))
    config = given.get("CONFIG", "experiments/tiny/mor.yaml")
    assert config == "X.yaml" or (REPO / config).is_file()
    if "ARGS" in given:
        check_morsr(["fit", "--config", config, *shlex.split(given["ARGS"])], monkeypatch)


def check_python(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = REPO / words[0]
    assert script.is_file()
    if len(words) == 1:  # the text only names it
        return
    for parser in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        parse = parser.parse_args
        monkeypatch.setattr(parser, "parse_args", lambda *given, parse=parse, **named: accepted(parse(*given, **named)))
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend(str(script.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(script), run_name="__main__")


def check(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(text)
    if program in ("torchrun", "srun") and "morsr" in words:
        program, words = "morsr", words[words.index("morsr") + 1 :]
    if program == "morsr":
        check_morsr(words, monkeypatch)
    elif program == "make":
        check_make(words, monkeypatch)
    elif program == "python":
        check_python(words, monkeypatch)
    elif program == "pytest":
        assert all((REPO / word).exists() for word in words if word.startswith("tests"))
    elif program == "pip":
        extras = re.findall(r"^(\w+) = \[", (REPO / "pyproject.toml").read_text(), re.M)
        assert set(re.findall(r"\[(\w+)\]", text)) <= set(extras)
    else:
        assert program in PROGRAMS


def test_the_pages_have_their_lines():
    assert len(ALL) > 60
    assert {line.page.name for line in ALL} >= {"README.md", "training.md", "upscale.md", "RESULTS.md"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(line.page == page for line in ALL)], ids=lambda page: page.stem
)
def test_every_line_is_accepted_by_its_program(page, monkeypatch):
    Path("experiments").symlink_to(REPO / "experiments")
    for line in sorted({line.text for line in ALL if line.page == page}):
        with monkeypatch.context() as patches:
            try:
                check(line, patches)
            except (AssertionError, Exception, pytest.fail.Exception) as error:
                raise AssertionError(f"{page.name}: {line}") from error


# What needs files or packages that are not here, another program or a browser, or hours.
NOT_RUN = re.compile(
    r"osediff|pisa|a/scores|--method-a|runs/ablation|estimator/learned|sd21|FOLDER_OR|demo|--help|--list"
)
RUN = {
    page: [line.text for line in ALL if line.page == page and re.match(r"morsr [a-z]+ ", line.text)]
    for page in PAGES
    if page.parent == REPO / "docs"
}
TWO_STEPS = "--trainer.max_steps=2 --trainer.limit_val_batches=1 --data.batch_size=2 --model.calibration_images=4"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", [page for page, lines in RUN.items() if lines], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page):
    from morsr.models.loading import find_adapters

    Path("experiments").symlink_to(REPO / "experiments")
    photo = Image.fromarray(data.chelsea()[60:188, 100:228])
    folders = {"hr": 128, "lr": 32, "outputs": 128, "photos": 96, "FOLDER": 128}
    for folder, side in folders.items():
        Path(folder).mkdir()
        for name in "ab":
            photo.resize((side, side)).save(Path(folder, f"{name}.png"))
    photo.resize((48, 48)).save("photo.jpg")
    photo.resize((48, 48)).save("photo.png")
    Path("runs/mor_tiny/version_0").mkdir(parents=True)
    for copy in ("adapters.safetensors", "runs/mor_tiny/version_0/adapters.safetensors"):
        shutil.copy(find_adapters("tiny"), copy)
    for text in RUN[page]:
        words = shlex.split(text)[1:]
        if NOT_RUN.search(text):
            continue
        if words[0] in LIGHTNING and "--config" in words:
            words += TWO_STEPS.split()
        if words[0] in ("upscale", "degrade"):  # their outputs are new
            for output in filter(Path.is_dir, map(Path, words[2:])):
                shutil.rmtree(output)
        assert main(words) == 0, text
