"""Scores that papers have published, to be printed beside a run's own rows and marked as what they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from morsr.errors import ConfigError


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table: never computed here, only quoted."""

    method: str
    dataset: str
    scores: dict[str, float]
    source: str


def published_datasets() -> tuple[str, ...]:
    """The data sets that published rows exist for."""
    return tuple(dict.fromkeys(row.dataset for row in _rows()))


def published_rows(dataset: str) -> tuple[PublishedRow, ...]:
    """The published rows of one data set, by its name in any case ("realsr").

    Raises:
        ConfigError: no rows for that name; the message lists the names.
    """
    rows = tuple(row for row in _rows() if row.dataset.lower() == dataset.strip().lower())
    if not rows:
        raise ConfigError(f"no published rows for {dataset!r}; known: {', '.join(published_datasets())}")
    return rows


@lru_cache(maxsize=1)
def _rows() -> tuple[PublishedRow, ...]:
    tables = json.loads(files("morsr.evaluation").joinpath("published.json").read_text(encoding="utf-8"))["tables"]
    return tuple(
        PublishedRow(row["method"], table["dataset"], row["scores"], table["source"])
        for table in tables
        for row in table["rows"]
    )
