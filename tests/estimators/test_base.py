"""What holds for every estimator, the user's own included, and how one is built."""

import itertools
from functools import partial

import pytest
import torch
from scenes import blurred, compressed, noisy, scene

from morsr.errors import ConfigError, InputError
from morsr.estimators import DegradationEstimator, build_estimator


class Darkness(DegradationEstimator):
    """A user's own estimator."""

    names = ("darkness", "noise")

    def estimate(self, lr):
        dark = 1 - lr.mean(dim=(1, 2, 3))
        return torch.stack([dark, dark / 2], dim=1)


def test_arguments_that_no_file_holds_are_known():
    class Adjusted(Darkness):
        def __init__(self, width: int = 4, *, worst: bool = False) -> None:
            super().__init__(worst=worst)

    class Kept(Adjusted):
        def settings(self):
            return {"width": 4}

    assert [made.unsaved() for made in (Darkness(), Adjusted(), Kept())] == [[], ["width"], []]
    assert all(build_estimator(kind).unsaved() == [] for kind in ("frequency", "learned"))


KINDS = ("frequency", "learned", f"{__name__}.Darkness")


@pytest.fixture(scope="module", params=KINDS)
def estimator(request):
    return build_estimator(request.param, worst=True)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (1, 200), (17, 23), (150, 260)])
def test_any_size_is_finite_and_independent_of_batch_mates(estimator, size):
    images = torch.rand((3, 3, *size), generator=torch.Generator().manual_seed(0))
    images[1] = 0.5
    whole = estimator(images)
    assert whole.scores.shape == (3, estimator.dim) == (3, len(whole.names))
    for values in (whole.scores, whole.severity):
        assert bool(((values >= 0) & (values <= 1)).all())
    assert bool((whole.severity >= whole.scores[:, -1] - 1e-6).all()), "no less than the worst"
    turned = estimator(images.flip(0))
    torch.testing.assert_close(turned.scores.flip(0), whole.scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(estimator(images[1:2]).scores, whole.scores[1:2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_whatever_is_around_and_no_gradient(estimator, dtype, request):
    image = noisy(scene(), 5).requires_grad_()
    plain = estimator(image)
    assert not plain.scores.requires_grad
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(estimator(image).scores, plain.scores, atol=0, rtol=0)
    request.addfinalizer(partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("medium")
    torch.testing.assert_close(estimator(image).scores, plain.scores, atol=0, rtol=0)
    assert torch.get_float32_matmul_precision() == "medium"
    around = torch.nn.Sequential(build_estimator(estimator.spec["kind"], worst=True)).to(dtype).train()
    torch.testing.assert_close(around(image).scores, plain.scores, atol=0, rtol=0)
    assert estimator(image.detach().to(dtype)).scores.dtype == torch.float32


@pytest.mark.parametrize(
    "image",
    [
        torch.full((1, 3, 8, 8), float("nan")),
        torch.ones(1, 1, 8, 8),
        torch.ones(3, 8, 8),
        2 * torch.ones(1, 3, 8, 8),
        torch.ones(1, 3, 8, 8).int(),
        torch.ones(1, 1, 8, 8, dtype=torch.uint8),
    ],
)
def test_bad_input_is_refused(estimator, image):
    with pytest.raises(InputError, match="lr"):
        estimator(image)


@pytest.mark.parametrize("kind", ["frequency", "learned"])
@pytest.mark.parametrize(
    ("name", "make", "levels"),
    [("noise", noisy, [1, 4, 8, 15, 30]), ("blur", blurred, [0.5, 0.8, 1.2, 1.8]), ("jpeg", compressed, [80, 55, 35])],
)
def test_scores_and_severity_rise_with_the_degradation(kind, name, make, levels):
    estimator = build_estimator(kind)
    clean = torch.cat([scene(seed=seed) for seed in range(4)])
    scores = [estimator(torch.cat([make(image[None], level) for image in clean])) for level in levels]
    for values in (
        [float(result.scores[:, estimator.names.index(name)].mean()) for result in scores],
        [float(result.severity.mean()) for result in scores],
    ):
        assert all(later > earlier for earlier, later in itertools.pairwise(values)), values
        assert values[-1] - values[0] > 0.15


def test_noise_and_blocks_of_a_large_image_are_not_averaged_away():
    estimator = build_estimator("frequency")
    large = torch.nn.functional.interpolate(scene(), scale_factor=5, mode="bilinear")
    noise, blocks = estimator.names.index("noise"), estimator.names.index("jpeg")
    clean = estimator(large).scores[0]
    assert estimator(noisy(large, 15)).scores[0, noise] > clean[noise] + 0.2
    assert estimator(compressed(large, 35)).scores[0, blocks] > clean[blocks] + 0.2


def test_an_estimator_of_ones_own():
    images, mine = torch.rand(2, 3, 8, 8), Darkness(worst=True)
    result = mine(images)
    assert result.names == ("darkness", "noise", "worst")
    torch.testing.assert_close(result.severity, result.scores[:, 1])  # of the kinds it has noise alone
    torch.testing.assert_close(result.scores[:, 2], result.scores[:, 1])
    assert build_estimator(mine) is mine
    assert mine.spec == {"kind": f"{__name__}.Darkness", "args": {"worst": True}}
    assert not Darkness().state_dict()


@pytest.mark.parametrize("spec", ["musiq", "nowhere.Mine", "morsr.estimators.Mine", "torch.nn.Linear", ""])
def test_a_name_that_is_no_estimator_is_one_line(spec):
    with pytest.raises(ConfigError) as caught:
        build_estimator(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["frequency", "learned"])
def test_a_stored_spec_builds_the_same_and_worst_is_asked_for(kind):
    images = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    plain, more = build_estimator({"kind": kind, "args": {}}), build_estimator(kind, worst=True)
    assert plain.spec == {"kind": kind, "args": {}}
    scores, found = plain(images), build_estimator(more.spec)(images)
    assert found.names == (*scores.names, "worst")
    parts = torch.stack([scores.scores[:, scores.names.index(name)] for name in ("blur", "noise", "jpeg")], dim=1)
    torch.testing.assert_close(found.scores, torch.cat([scores.scores, parts.amax(dim=1, keepdim=True)], dim=1))
    torch.testing.assert_close(found.severity, 1 - (1 - parts).prod(dim=1))
