"""For the site: pages of the notebooks, and links to files of the repository, which the site does not hold.

A link to such a file becomes its name; one to a notebook leads to its page.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).resolve().parents[1] / "experiments" / "notebooks"
NOTEBOOK_LINK = re.compile(r"\((?:\.\./)+experiments/(notebooks/\w+)\.ipynb\)")
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?:src|benchmarks|experiments|tests)/[^)]*\)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of the notebooks, with their pictures."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        page, pictures = markdown(json.loads(path.read_text(encoding="utf-8")), path.stem)
        for name, content in {f"{path.stem}.md": page, **pictures}.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(r"\1", NOTEBOOK_LINK.sub(r"(\1.md)", markdown))


def markdown(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook with outputs as Markdown, and its pictures by file name."""
    lines: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        lines += [source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```", ""]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            kind = next((kind for kind in data if kind.startswith("image/")), None)
            if kind:
                name = f"{stem}_{len(pictures)}.{kind.removeprefix('image/')}"
                pictures[name] = base64.b64decode("".join(data[kind]))
                lines += [f"![output]({name})", ""]
            else:
                lines += [f"```text\n{''.join(output['text']).rstrip()}\n```", ""]
    return "\n".join(lines), pictures
