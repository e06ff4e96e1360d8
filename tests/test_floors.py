"""The house has five floors and arrows point down only: every import of the source is read from its syntax tree."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src"

FLOORS = {
    "cli": 5, "cli_parser": 5, "__main__": 5, "commands": 5,
    "training": 4, "data": 4, "evaluation": 4, "restoring": 4,
    "models": 3,
    # Estimators stand under the models: loading a generator builds the estimator that its router was trained with.
    "adapters": 2, "degradation": 2, "estimators": 2, "imaging": 2,
    "functional": 1,
    "errors": 0, "files": 0, "hub": 0, "cli_errors": 0,
}  # fmt: skip
# On the top floor the command line is made of its commands; on all others neighbours stay apart.
NEIGHBOURS = {
    ("hub", "errors"),
    ("hub", "files"),
    ("cli", "commands"),
    ("cli", "cli_parser"),
    ("__main__", "cli"),
}

# A heavy package and the only places that may import it, as module prefixes.
ONLY_IN = {
    "basicsr": (),
    "diffusers": ("morsr.models.bases",),
    "transformers": ("morsr.estimators.clip", "morsr.models.bases"),
    "lightning": ("morsr.training", "morsr.data", "morsr.evaluation", "morsr.commands", "morsr.cli"),
    "pytorch_lightning": (),
    "pyvips": ("morsr.imaging.files",),
    "pickle": (),
}
FUNCTIONAL_ONLY = {"torch", "einops", "numpy", "morsr"}


def source_files() -> list[Path]:
    return sorted((SOURCE / "morsr").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = SOURCE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported: statements anywhere, also in functions, and import_module("...")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            assert not node.level, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"  # a name of `morsr` itself stands for a module of some floor
                yield node.lineno, full if node.module == "morsr" or is_module(full) else node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def unit(module: str) -> str:
    """The first name under the package, `models` for `morsr.models.generator`; empty for the package itself."""
    return [*module.split("."), ""][1]


def broken_import(module: str, target: str) -> str | None:
    """Say what is wrong with one import, or None."""
    here, root = unit(module), target.partition(".")[0]
    if root == "morsr":
        there = unit(target)
        if not here or not there or here == there:
            return None
        floor = 0 if there == "__version__" else FLOORS.get(there, 6)
        if floor > FLOORS[here]:
            return f"floor {FLOORS[here]} imports {target} of floor {floor}"
        if floor == FLOORS[here] and (here, there) not in NEIGHBOURS:
            return f"imports its neighbour {target}"
        return None
    if root in ONLY_IN and not any(module == place or module.startswith(place + ".") for place in ONLY_IN[root]):
        return f"imports {target}, which only {', '.join(ONLY_IN[root]) or 'nobody'} may"
    standard = root in sys.stdlib_module_names
    if here == "functional" and root not in FUNCTIONAL_ONLY and not standard:
        return f"imports {target}; functional/ knows torch, einops and numpy only"
    if not here and not standard:
        return f"imports {target}; `import morsr` stays light"
    return None


def test_imports_point_down_only():
    broken = []
    for path in source_files():
        module, tree = module_name(path), ast.parse(path.read_text())
        if unit(module) and unit(module) not in FLOORS:
            broken.append(f"{module} has no floor: give it one in the table of this test")
            continue
        found = imported_modules(tree)
        broken += [f"{path}:{line}: {problem}" for line, target in found if (problem := broken_import(module, target))]
    assert not broken, "\n".join(broken)


def test_no_files_import_each_other_in_a_circle():
    trees = {module_name(path): ast.parse(path.read_text()) for path in source_files()}
    TopologicalSorter({name: {found for _, found in imported_modules(tree)} for name, tree in trees.items()}).prepare()


def test_no_device_string_and_no_pickle():
    """Devices are handed in or asked of torch.accelerator; comparing with a device type is fine."""
    broken = []
    for path in source_files():
        tree = ast.parse(path.read_text())
        compared = {id(leaf) for node in ast.walk(tree) if isinstance(node, ast.Compare) for leaf in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in compared:
                named = node.value.partition(":")[0] in ("cuda", "mps", "xpu")
                if named and FLOORS.get(unit(module_name(path)), 0) < 5:
                    broken.append(f"{path}:{node.lineno}: device string {node.value!r}")
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
                if keywords.get("weights_only") is not True:
                    broken.append(f"{path}:{node.lineno}: torch.load without weights_only=True")
    assert not broken, "\n".join(broken)
