"""The protocol of estimators: building by name, calibration statistics."""

from __future__ import annotations

import pytest
import torch

from morsr.errors import ConfigError, InputError
from morsr.estimators import DegradationEstimator, build_estimator, score_statistics
from morsr.estimators.views import bounded_view, native_crops, pad_to_smallest


class Darkness(DegradationEstimator):
    """A user's own estimator."""

    names = ("darkness", "noise")

    def estimate(self, lr):
        dark = 1 - lr.mean(dim=(1, 2, 3))
        return torch.stack([dark, dark / 2], dim=1)


def test_an_estimator_of_ones_own():
    images = torch.rand(2, 3, 8, 8)
    result = Darkness()(images)
    torch.testing.assert_close(result.severity, result.scores[:, 1])
    assert Darkness().dim == 2
    assert build_estimator(f"{__name__}.Darkness")(images).names == ("darkness", "noise")
    mine = Darkness(worst=True)
    assert build_estimator(mine) is mine
    assert mine(images).names == ("darkness", "noise", "worst")
    torch.testing.assert_close(mine(images).scores[:, 2], result.scores[:, 1])
    assert mine.spec == {"kind": f"{__name__}.Darkness", "args": {"worst": True}}


@pytest.mark.parametrize("spec", ["musiq", "nowhere.Mine", "morsr.estimators.Mine", "torch.nn.Linear", ""])
def test_a_name_that_is_no_estimator_is_one_line(spec):
    with pytest.raises(ConfigError) as caught:
        build_estimator(spec)
    assert "\n" not in str(caught.value)


def test_a_file_never_chooses_a_class_of_ones_own(monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(ConfigError, match=r"--estimator mine\.Mine"):
        build_estimator({"kind": "mine.Mine", "args": {}})


@pytest.mark.parametrize("kind", ["frequency", "learned"])
def test_the_worst_dimension_is_added_and_travels(kind):
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    plain, more = build_estimator(kind), build_estimator(kind, worst=True)
    assert plain.spec == {"kind": kind, "args": {}}
    again = build_estimator(more.spec)
    assert again.names == (*plain.names, "worst")
    assert again.dim == plain.dim + 1
    scores, found = plain(images), again(images)
    parts = [scores.scores[:, scores.names.index(name)] for name in ("blur", "noise", "jpeg")]
    torch.testing.assert_close(found.scores, torch.cat([scores.scores, torch.stack(parts, 1).amax(1)[:, None]], dim=1))
    torch.testing.assert_close(found.severity, scores.severity)


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match="sharpness"):
        build_estimator("frequency", sharpness=3)


def test_calibration_statistics():
    estimator = build_estimator("frequency")
    batches = [
        torch.rand((4, 3, 24 + 8 * i, 32), generator=torch.Generator().manual_seed(i)) ** (1 + i) for i in range(3)
    ]
    scores = torch.cat([estimator(batch).scores for batch in batches])
    mean, deviation = score_statistics(estimator, iter(batches), minimum=12)
    torch.testing.assert_close(mean, scores.mean(dim=0))
    moving = scores.std(dim=0) > 1e-4
    torch.testing.assert_close(deviation[moving], scores.std(dim=0)[moving])
    with pytest.raises(InputError, match=r"1000.*12"):
        score_statistics(estimator, batches)


def test_a_dimension_that_never_moves_is_only_centred():
    estimator = build_estimator("frequency")
    _, deviation = score_statistics(estimator, [torch.full((3, 3, 16, 16), 0.5)], minimum=3)
    torch.testing.assert_close(deviation, torch.ones(estimator.dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["frequency", "learned"])
def test_estimators_stay_in_float32(kind, dtype):
    images = torch.rand(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    around = torch.nn.Sequential(build_estimator(kind)).to(dtype)
    torch.testing.assert_close(around(images).scores, build_estimator(kind)(images).scores, rtol=0, atol=0)


@pytest.mark.parametrize(("height", "width", "count"), [(128, 128, 1), (20, 300, 3), (129, 100, 2), (1000, 900, 9)])
def test_crops_are_bounded_on_the_grid_and_reach_the_borders(height, width, count):
    rows = torch.arange(height).view(-1, 1).expand(height, width)
    columns = torch.arange(width).expand(height, width)
    crops = native_crops(torch.stack([rows, columns]).float()[None])
    assert crops.shape[:3] == (1, count, 2)
    assert max(crops.shape[-2:]) <= 128
    assert bool((crops[0, :, :, 0, 0] % 8 == 0).all())
    for axis, length in enumerate((height, width)):
        assert crops[:, :, axis].min() == 0
        assert crops[:, :, axis].max() > length - 1 - 8


def test_view_does_not_alias_and_padding_replicates():
    stripes = (torch.arange(1024) % 2).float().expand(1, 3, 600, 1024)
    view = bounded_view(stripes)
    assert max(view.shape[-2:]) == 128
    torch.testing.assert_close(view, torch.full_like(view, 0.5))
    padded = pad_to_smallest(torch.arange(3.0).view(1, 1, 1, 3))
    assert padded.shape == (1, 1, 16, 16)
    assert padded[0, 0, 5].tolist() == [0, 1] + [2] * 14


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("size", [(300, 1000), (128, 77), (1, 1), (40, 9)])
@pytest.mark.parametrize("kind", ["frequency", "learned"])
def test_whole_numbers_are_scored_as_the_fractions_they_stand_for(kind, size, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, torch.iinfo(dtype).max + 1, (2, 3, *size), generator=generator).to(dtype)
    estimator = build_estimator(kind)
    ours, wanted = estimator(images), estimator(images.float() / torch.iinfo(dtype).max)
    torch.testing.assert_close(ours.scores, wanted.scores, rtol=0, atol=0)
    torch.testing.assert_close(ours.severity, wanted.severity, rtol=0, atol=0)
    with pytest.raises(InputError, match="expected 3 channels"):
        estimator(images[:, :1])
    with pytest.raises(InputError, match="expected floating-point values"):
        estimator(images.int())
