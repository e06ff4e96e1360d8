"""NIQE against basicsr's own numbers."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from morsr.errors import InputError
from morsr.functional.niqe import niqe
from morsr.models.metrics import build_metric

if importlib.util.find_spec("basicsr") is None:
    pytest.skip("the pristine model comes with basicsr", allow_module_level=True)


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def patterned(noisy: bool) -> np.ndarray:
    y, x = np.mgrid[:200, :296]
    hr = np.stack([(3 * x + 5 * y + x * y // 16 + 40 * c) % 256 for c in range(3)], -1)
    error = (x * y % 17 - 8)[..., None] * np.array([1, 2, -1])
    return np.clip(hr + error * noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("noisy", "expected"), [(True, 21.488785), (False, 25.805758)])
def test_golden_of_basicsr(noisy: bool, expected: float):
    # basicsr.metrics.niqe.calculate_niqe(image[..., ::-1], crop_border=0)                  (basicsr 1.4.2)
    assert build_metric("niqe")(as_tensor(patterned(noisy))).item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
def test_agrees_with_basicsr_live():
    from morsr.degradation.basicsr_compat import import_basicsr

    reference = import_basicsr("metrics.niqe").calculate_niqe
    generator = np.random.default_rng(0)
    image = generator.normal(128, 40, (200, 300, 3)).clip(0, 255).astype(np.uint8)
    image[:100, :100] = 255  # a saturated corner, where the sign of a rounding error would count
    assert build_metric("niqe")(as_tensor(image)).item() == pytest.approx(reference(image[..., ::-1], 0), abs=5e-3)


def test_published_column_is_the_full_swing_variant(shared_data: Path):
    # The published column was made with pyiqa, whose NIQE takes full-swing luma; basicsr and MATLAB take studio swing.
    folder = shared_data / "realsr"
    rows = list(csv.DictReader((folder / "osediff_published_scores.csv").open()))[:10]
    metric = {name: build_metric(name) for name in ("niqe", "niqe-yiq")}
    errors: dict[str, list[float]] = {"niqe": [], "niqe-yiq": []}
    for row in rows:
        image = as_tensor(np.array(Image.open(folder / "osediff" / row["image"])))
        for name in metric:
            errors[name].append(abs(metric[name](image).item() - float(row["niqe"])))
    assert np.mean(errors["niqe-yiq"]) < 0.01 < 0.05 < np.mean(errors["niqe"])


def test_batch_members_do_not_mix():
    images = torch.rand(2, 3, 96, 192)
    metric = build_metric("niqe")
    torch.testing.assert_close(metric(images), torch.cat([metric(images[:1]), metric(images[1:])]))


def test_no_texture_has_no_value():
    assert torch.isnan(build_metric("niqe")(torch.full((1, 3, 96, 192), 0.5))).all()


@pytest.mark.parametrize("size", [(95, 400), (96, 96)])
def test_too_few_blocks(size: tuple[int, int]):
    with pytest.raises(InputError, match="two blocks of 96x96"):
        build_metric("niqe")(torch.rand(1, 3, *size))


def test_unknown_luma():
    with pytest.raises(InputError, match="'ycbcr' or 'yiq'"):
        niqe(torch.rand(1, 3, 96, 192), torch.zeros(36), torch.eye(36), luma="lab")
