"""Run the notebooks and write what they show into docs/notebooks, as Markdown with pictures.

    python experiments/notebooks/render.py [NAME ...] [--set MODEL='"tiny"' ...]

The notebooks themselves stay without outputs; a test runs them with the same functions. They run in a temporary folder,
so that their own files (a report, a training run) do not litter the checkout. About three minutes on two cores.
"""

from __future__ import annotations

import argparse
import ast
import base64
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs" / "notebooks"


def load(path: Path, values: dict[str, Any]) -> nbformat.NotebookNode:
    """Read a notebook and put other values behind its cell of parameters.

    Raises:
        KeyError: a name that the cell of parameters does not set.
    """
    notebook = nbformat.read(path, as_version=4)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    known = {
        target.id
        for node in ast.parse(notebook.cells[place].source).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for name in values:
        if name not in known:
            raise KeyError(f"{path.name} has no parameter {name}; it has {', '.join(sorted(known))}")
    if values:
        source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, *, timeout: int = 1800) -> nbformat.NotebookNode:
    """Run every cell with `folder` as the working folder; an error in a cell is raised."""
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources)
    # A kernel chooses the backend that puts pictures into the notebook only where none is set.
    return client.execute(env={name: value for name, value in os.environ.items() if name != "MPLBACKEND"})


@contextmanager
def workplace() -> Iterator[Path]:
    """A temporary folder in which the notebooks find the configs where they look for them, one folder up."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "notebooks"
        folder.mkdir()
        shutil.copytree(
            HERE.parent, folder.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.ipynb", "*.py")
        )
        yield folder


def plain(text: str) -> str:
    """What a terminal would show in the end: without colours, carriage returns and folders of this machine."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    text = "\n".join(line.rsplit("\r", 1)[-1].rstrip() for line in text.splitlines())
    return re.sub(
        rf"({re.escape(str(Path.home()))}|{re.escape(tempfile.gettempdir())}/[^/\s]+|/\S+/site-packages)/", "", text
    )


def markdown(notebook: nbformat.NotebookNode, name: str, folder: Path) -> Path:
    """Write an executed notebook as `folder`/name.md with its pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}_*.png"):
        old.unlink()
    lines, pictures = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            lines += [cell.source, ""]
            continue
        lines += ["```python", cell.source, "```", ""]
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                file = folder / f"{name}_{pictures}.png"
                file.write_bytes(base64.b64decode(data["image/png"]))
                lines += [f"![output]({file.name})", ""]
                pictures += 1
            elif output.get("name") == "stdout" or "text/plain" in data:
                text = plain(output.get("text") or data["text/plain"]).rstrip()
                lines += ["```text", text, "```", ""] if text and "UserWarning" not in text else []
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(path.stem for path in HERE.glob("*.ipynb")))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="value of a parameter")
    parser.add_argument("--out", type=Path, default=DOCS)
    options = parser.parse_args()
    values = {name: ast.literal_eval(value) for name, _, value in (pair.partition("=") for pair in options.set)}
    for name in options.names:
        started = time.perf_counter()
        with workplace() as folder:
            notebook = execute(load(HERE / f"{name}.ipynb", values), folder)
        print(f"{markdown(notebook, name, options.out)}  {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
