"""The learned estimator: its file, its face, its training."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from scenes import scene
from scipy import stats

from morsr.degradation import DegradationRecipe, apply, sample_keys, true_severity
from morsr.degradation.stages import SingleRecipe
from morsr.errors import ConfigError, WeightsError
from morsr.estimators import build_estimator
from morsr.estimators.learned import DegradationNet, crop_statistics, load_net, save_net
from morsr.training.estimator import LearnedEstimatorTraining


@pytest.fixture
def weights(tmp_path):
    net = DegradationNet(hidden=16)
    net.set_standardization(crop_statistics(torch.rand(8, 3, 32, 32)))
    save_net(tmp_path / "net.safetensors", net)
    return tmp_path / "net.safetensors"


def recipe_batch(count, epoch=0):
    hr = torch.cat([scene(96, 96, seed) for seed in range(count)])
    parameters = DegradationRecipe.load("realesrgan").sample(sample_keys(0, epoch, torch.arange(count)))
    return {"hr": hr, "lr": apply(hr, parameters), "parameters": parameters}


def test_dropout_stays_off_and_the_weights_travel(weights):
    estimator = build_estimator("learned", weights=weights).train()
    image = torch.rand(1, 3, 40, 40)
    torch.testing.assert_close(estimator(image).scores, build_estimator(estimator.spec)(image).scores, atol=0, rtol=0)
    assert not any(parameter.requires_grad for parameter in estimator.parameters())


def test_statistics_are_the_same_in_a_training_of_half_precision():
    images = scene()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = crop_statistics(images)
    torch.testing.assert_close(found, crop_statistics(images), atol=0, rtol=0)


def test_files_that_cannot_be_used(weights, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:100])
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    state = load_net(weights).state_dict()
    save_file({**state, "head.1.bias": torch.zeros(8)}, tmp_path / "wide.safetensors")
    for name in ("none", "cut", "other", "wide"):
        with pytest.raises(WeightsError, match=rf"{name}.safetensors"):
            build_estimator("learned", weights=tmp_path / f"{name}.safetensors")


def test_severity_of_the_shipped_estimator_follows_each_degradation_alone():
    from skimage import data

    estimator = build_estimator("learned")
    assert sum(parameter.numel() for parameter in estimator.parameters()) <= 500_000
    images = [torch.from_numpy(image[:256, :256].copy()) for image in (data.astronaut(), data.coffee(), data.chelsea())]
    photographs = [image.permute(2, 0, 1)[None].float() / 255 for image in images]
    recipe = SingleRecipe(blur=(0.4, 2.0), noise=(1.0, 30.0), jpeg=(30.0, 95.0))
    for place, factor in enumerate(("blur", "noise", "jpeg")):
        draws = torch.stack([torch.full((6,), (place + 0.5) / 3), torch.linspace(0, 1, 6), torch.ones(6)], dim=1)
        parameters = recipe.draw(torch.arange(6), draws)  # which way, how strong, no gray noise
        found = [estimator(apply(hr.expand(6, -1, -1, -1), parameters)).severity.tolist() for hr in photographs]
        sign = -1 if factor == "jpeg" else 1
        rhos = [sign * stats.spearmanr(range(6), one).statistic for one in found]
        assert sum(rhos) / len(rhos) >= 0.95, (factor, rhos)


def test_training_step_learns_and_replays():
    torch.manual_seed(0)
    module = LearnedEstimatorTraining(out="", hidden=32, dropout=0.0, replay=2, pool=16, lr=5e-3)
    module.log = lambda *args, **kwargs: None
    optimizer = torch.optim.AdamW(module.net.parameters(), lr=5e-3)
    batch, losses = recipe_batch(8), []
    for _ in range(25):
        loss = module.training_step(dict(batch), 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert len(module._seen) == 16
    assert not bool((module.net.deviation == 1).all())


def test_several_devices_are_refused():
    module = LearnedEstimatorTraining(out="")
    module.trainer = SimpleNamespace(world_size=2)
    with pytest.raises(ConfigError, match="devices"):  # the pool is one process's
        module.configure_optimizers()


def test_labels_are_those_of_the_batch_s_scale():
    module, batch = LearnedEstimatorTraining(out=""), recipe_batch(8)
    wide = {**batch, "hr": torch.rand(8, 3, 48, 48)}  # twice the LR images' size
    expected = torch.stack(true_severity(batch["parameters"], scale=2)[:4], dim=1)
    assert torch.equal(module.targets(wide)[:, :4], expected)
    assert not torch.equal(module.targets(batch)[:, :4], expected)
