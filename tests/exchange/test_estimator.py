"""A model whose estimator is the user's own class runs where the class is given again; its file imports nothing."""

import sys
from pathlib import Path

import pytest
import torch
from twins import on_base, save

from morsr.cli import main
from morsr.errors import ConfigError
from morsr.models.loading import load_generator

CLASSES = """import torch
from morsr.estimators import DegradationEstimator
class Two(DegradationEstimator):
    names = ("a", "b")
    def estimate(self, lr):
        return torch.full((len(lr), 2), 0.25)
class Three(Two):
    names = ("a", "b", "c")
"""


@pytest.fixture
def file(small_base, tmp_path, monkeypatch):
    """Adapters that were trained with a class of the user's own."""
    Path("own_scores.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(str(tmp_path))
    saved = save(tmp_path / "own.safetensors", on_base(small_base, "own_scores.Two"))
    sys.modules.pop("own_scores")
    return saved


def test_the_class_is_given_again(file, photo, capsys):
    with pytest.raises(ConfigError, match=r"--estimator own_scores\.Two"):
        load_generator(file)
    assert "own_scores" not in sys.modules, "a file imports nothing"
    scores = load_generator(file, estimator="own_scores.Two").estimator(torch.rand(1, 3, 8, 8)).scores  # type: ignore[misc]
    assert scores.tolist() == [[0.25, 0.25]]
    with pytest.raises(ConfigError, match="takes 2 scores, Three gives 3"):
        load_generator(file, estimator="own_scores.Three")
    own = ["upscale", str(photo), "out.png", "--overwrite", "--model", str(file), "--estimator"]
    assert main([*own, "own_scores.Two"]) == 0
    assert main([*own, "own_scores.Absent"]) == 2
    assert "Absent" in capsys.readouterr().err
