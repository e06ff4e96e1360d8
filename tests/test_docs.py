"""What docs/method.md names exists: files, and the functions, classes, settings and constants in them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[`([\w/]+\.py)`\]\(\.\./src/morsr/([\w/]+\.py)\)((?:,? ?`[\w.]+`)*)")


def names_of(tree: ast.AST) -> set[str]:
    """Names defined at the top of a module or in the bodies of its classes, dotted."""
    found: set[str] = set()
    for node in getattr(tree, "body", []):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{name}" for name in names_of(node)}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def references(text: str) -> list[tuple[str, str, list[str]]]:
    return [(shown, path, re.findall(r"`([\w.]+)`", names)) for shown, path, names in LINK.findall(text)]


def missing(text: str) -> list[str]:
    broken = []
    for shown, path, names in references(text):
        file = REPO / "src" / "morsr" / path
        if shown != path or not file.is_file():
            broken.append(f"{shown} -> {path}")
            continue
        known = names_of(ast.parse(file.read_text()))
        # A plain word after the first name is an argument of it.
        broken += [f"{path}: {name}" for name in names[:1] if name not in known]
    return broken


def test_every_file_and_name_of_the_method_page_exists() -> None:
    text = (REPO / "docs" / "method.md").read_text()
    assert len(references(text)) > 60
    assert text.count("../src/") == len(references(text)), "a link that this test does not read"
    assert not missing(text)


def test_a_name_that_is_gone_is_found() -> None:
    link = "[`models/generator.py`](../src/morsr/models/generator.py)"
    assert missing(f"{link} `enlarge`") == []
    assert missing(f"{link} `OneStepConfig.scale_input`") == []
    assert missing(f"{link} `shrink`") == ["models/generator.py: shrink"]
    assert missing(link.replace("generator", "gone")) == ["models/gone.py -> models/gone.py"]
