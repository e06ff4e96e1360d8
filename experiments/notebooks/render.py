"""Run the notebooks and store what they show in them; the site makes its pages from these files.

    python experiments/notebooks/render.py [NAME ...]

They run in a temporary folder, so that their own files (a report, a training run) do not litter the checkout. About
six minutes on two cores. A test runs them in short form, with the same functions.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import io
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
from PIL import Image

from morsr.models.loading import find_adapters

HERE = Path(__file__).resolve().parent


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


def smaller(png: str) -> dict[str, str]:
    """A picture of an output; photographs become JPEGs."""
    if len(png) < 200_000:
        return {"image/png": png}
    buffer = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]).convert("RGB").save(buffer, "JPEG", quality=90)
    return {"image/jpeg": base64.b64encode(buffer.getvalue()).decode()}


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Keep of the outputs what a reader wants: pictures and text, without times, warnings and objects' names."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                kept.append(nbformat.v4.new_output("display_data", data=smaller(data["image/png"])))
            elif output.get("name") == "stdout" and (text := plain(output.text).strip("\n")):
                kept.append(nbformat.v4.new_output("stream", name="stdout", text=text + "\n"))
        if "outputs" in cell:
            cell.outputs = kept
    notebook.metadata["adapters"] = digest()
    return notebook


def digest() -> str:
    """Of the shipped adapters, so that a test sees when the stored outputs are those of others."""
    return hashlib.sha256(find_adapters("tiny").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(path.stem for path in HERE.glob("*.ipynb")))
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the notebooks with outputs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        started = time.perf_counter()
        with workplace() as folder:
            notebook = execute(load(HERE / f"{name}.ipynb", {}), folder)
        nbformat.write(tidy(notebook), options.out / f"{name}.ipynb")
        print(f"{options.out / name}.ipynb  {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
