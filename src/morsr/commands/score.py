"""`morsr score`: metrics of restored images, with a named protocol."""

from __future__ import annotations

from pathlib import Path

from morsr.errors import ConfigError
from morsr.files import expanded, printable


def run(
    *,
    pred: list[str] | None = None,
    gt: Path | None = None,
    lr: Path | None = None,
    metrics: str = "psnr,ssim,niqe",
    out: Path = Path("scores"),
    published: str | None = None,
    accelerator: bool = False,
) -> int:
    """Score folders of restored images and write two tables; 1 if some files could not be scored.

    Args:
        pred: restored images: folders or single files, as PATH or NAME=PATH; NAME is the row's
        gt: references of the same paths without suffix
        lr: inputs of the same paths without suffix: adds the bicubic row
        metrics: names with commas
        out: folder for the tables
        published: data set, such as realsr, whose published scores are printed below
        accelerator: run learned metrics on the accelerator, if any
    """
    if not pred:
        raise ConfigError("score: expected restored images, --pred DIR")

    import torch

    from morsr.evaluation.score import score_folders
    from morsr.evaluation.tables import published_rows

    papers = published_rows(published) if published else {}
    report = score_folders(
        named_paths(pred), gt, lr, [name for name in metrics.split(",") if name.strip()],
        out=out,
        device=torch.accelerator.current_accelerator(check_available=True) if accelerator else None,
    )  # fmt: skip
    print(report.to_text())
    for method, scores in papers.items():
        print(f"published, {method}: " + ", ".join(f"{name} {score:g}" for name, score in scores.items()))
    print(printable(f"Written to {out}: scores.csv, scores.txt"))
    return 1 if report.problems else 0


def named_paths(texts: list[str]) -> dict[str, Path]:
    """Row name to path, from `PATH` (called after its last part) or `NAME=PATH`."""
    found: dict[str, Path] = {}
    for text in texts:
        name, _, rest = ("", "", text) if "=" not in text or expanded(text).exists() else text.partition("=")
        path = expanded(rest)
        name = name.strip() or (path.resolve().stem if path.is_file() else path.resolve().name)
        if name in found:
            raise ConfigError(f"score: two rows would be called {name!r}; name them: --pred NAME={path}")
        found[name] = path
    return found
