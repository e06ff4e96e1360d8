"""A model whose estimator is the user's own class runs where the class is given again; its file imports nothing."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from twins import on_base, save

from morsr.errors import ConfigError, WeightsError
from morsr.estimators.learned import LearnedEstimator
from morsr.models.bases import package_weights
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


def test_the_class_is_given_again(file):
    with pytest.raises(ConfigError, match=r"--estimator own_scores\.Two"):
        load_generator(file)
    assert "own_scores" not in sys.modules, "a file imports nothing"
    scores = load_generator(file, estimator="own_scores.Two").estimator(torch.rand(1, 3, 8, 8)).scores  # type: ignore[misc]
    assert scores.tolist() == [[0.25, 0.25]]
    with pytest.raises(ConfigError, match="takes 2 scores, Three gives 3"):
        load_generator(file, estimator="own_scores.Three")


def test_the_learned_ones_file_is_named_anew(small_base, tmp_path, monkeypatch):
    weights = Path(shutil.copy(package_weights("tiny") / "estimator.safetensors", "mine.safetensors"))
    saved = save(tmp_path / "own.safetensors", on_base(small_base, LearnedEstimator("mine.safetensors")))
    monkeypatch.setenv("HOME", str(tmp_path))
    weights.rename(tmp_path / "moved.safetensors")
    with pytest.raises(WeightsError, match="--estimator FILE"):
        load_generator(saved)
    assert load_generator(saved, estimator="~/moved.safetensors").estimator.dim == 5  # type: ignore[union-attr]
