"""Where `morsr average` writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from morsr.adapters import average_adapters
from morsr.errors import InputError


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    with pytest.raises(InputError, match="the output would overwrite an input"):
        average_adapters([tmp_path / "x.safetensors", tmp_path / "y.safetensors"], "~/x.safetensors")
