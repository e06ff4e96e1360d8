"""What docs/method.md names exists, the Python of all pages runs, and their links lead somewhere."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data

from morsr.cli import main

REPO = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[`([\w/]+\.py)`\]\(\.\./src/morsr/([\w/]+\.py)\)((?:,? ?`[\w.]+`)*)")

NOTEBOOKS = sorted((REPO / "experiments/notebooks").glob("*.ipynb"))
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md")), *sorted((REPO / "docs/results").glob("*.md"))]


def references(text: str) -> list[tuple[str, str, list[str]]]:
    """Shown file, file and names of every link to the source; a plain word after the first name is its argument."""
    return [(shown, path, re.findall(r"`([\w.]+)`", names)) for shown, path, names in LINK.findall(text)]


def is_there(path: str, name: str) -> bool:
    """Whether a module has a name, dotted for what is inside a class."""
    *classes, last = name.split(".")
    place = importlib.import_module("morsr." + path.removesuffix(".py").replace("/", "."))
    for one in classes:
        place = getattr(place, one)
    return hasattr(place, last) or last in getattr(place, "__annotations__", {})


def test_every_file_and_name_of_the_method_page_exists():
    text = (REPO / "docs" / "method.md").read_text()
    assert len(references(text)) > 60
    assert text.count("../src/") == len(references(text)), "a link that this test does not read"
    for shown, path, names in references(text):
        assert shown == path
        assert all(is_there(path, name) for name in names[:1]), f"{path}: {names[0]}"


def blocks(page: Path) -> str:
    """The Python of a page in one piece; what needs a download is left out."""
    found = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    return "\n".join(block for block in found if "path/to" not in block)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page):
    from morsr.degradation import DegradationRecipe, sample_keys

    photo = Image.fromarray(data.chelsea()[100:228, 150:278])
    for folder, side in (("lr", 32), ("hr", 128), ("datasets/RealSR/test_LR", 32), ("datasets/RealSR/test_HR", 128)):
        Path(folder).mkdir(parents=True)
        photo.resize((side, side)).save(Path(folder) / "a.png")
    photo = photo.resize((32, 32))
    for name in ("photo.jpg", "photo.png", "in.tif"):
        photo.save(name)
    if "OUT/config.json" in blocks(page):
        assert main(["export", "diffusers", "OUT", "--model", "tiny", "--image", "photo.png"]) == 0
    names = {
        "image": photo,
        "images": [photo, photo.rotate(90)],
        "lr": torch.rand(12, 3, 32, 32),
        "parameters": DegradationRecipe.load("realesrgan").sample(sample_keys(0, 0, torch.arange(12))),
        "restore": lambda lr: F.interpolate(lr, scale_factor=4),
    }
    exec(compile(blocks(page), str(page), "exec"), names)


def broken_links(page: Path, text: str) -> list[str]:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [one for one in targets if "://" not in one and not (page.parent / one).exists()]


def test_links_lead_somewhere():
    assert {page.name: found for page in PAGES if (found := broken_links(page, page.read_text()))} == {}
    assert broken_links(PAGES[0], "[a](docs/gone.md), [b](docs/method.md#x)") == ["docs/gone.md"]


def words(text: str) -> int:
    return len(re.findall(r"[^\s|]+", text))  # bars of tables are none


def prose_of_notebooks() -> str:
    cells = [cell for path in NOTEBOOKS for cell in json.loads(path.read_text())["cells"]]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_the_pages_are_short():
    """By a plain count, with code and tables; the notebooks' text with the pages' text."""
    assert words(PAGES[0].read_text()) <= 900
    pages = "\n".join(path.read_text() for path in (REPO / "docs").rglob("*.md"))
    assert len(pages.split()) <= 9000
    assert words(re.sub(r"^```.*?^```", "", pages, flags=re.M | re.S)) + words(prose_of_notebooks()) <= 9000


def test_pages_docstrings_and_messages_are_in_plain_english():
    translated = re.compile(
        r"\bof (?:its|their) own\b|stands? beside|in place of|\btold\b(?! apart)|\bgoes on\b|for ever\b|bit for bit"
    )
    texts = {str(path): path.read_text() for path in (*PAGES, *(REPO / "src").rglob("*.py"))}
    texts["notebooks"] = prose_of_notebooks()
    assert {name: found for name, text in texts.items() if (found := translated.findall(text))} == {}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="constraints.txt pins its packages for 3.11 and later")
@pytest.mark.timeout(300)
def test_the_site_builds_strictly(tmp_path):
    """Every page is in the navigation, every link and every name of the reference exists."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "reference" / "adapters.html").read_text()
    assert "balance_alpha" in page
    notebook = (tmp_path / "site" / "notebooks" / "1_inspect_routing.html").read_text()
    assert notebook.count('alt="output"') >= 3
    assert not re.search(r'(?:src|href)="https?://(?!(?:squidfunk|www\.mkdocs|arxiv|github))', page), "offline"
