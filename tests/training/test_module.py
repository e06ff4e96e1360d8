"""The module under Lightning, on a small base: what is trained, saved, resumed and refused."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
import training_twins as twins
from torch import nn
from training_twins import ADAPTERS, build

from morsr.adapters import active_adapters, read_adapters_header
from morsr.errors import ConfigError, WeightsError
from morsr.models.bases import load_base
from morsr.models.generator import OneStepConfig
from morsr.models.loading import find_adapters, load_generator
from morsr.models.losses import Distillation, Gan, Losses, LossTerm, Weight, encoder_features
from morsr.training.callbacks import AdapterEMA
from morsr.training.module import OneStepSRModule


def test_the_constructor_only_stores_and_networks_are_read_on_the_cpu(small_base, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.models.vgg16", Mock(side_effect=OSError("offline")))
    module = OneStepSRModule(base="/nowhere")
    assert not list(module.parameters())
    with pytest.raises(WeightsError, match="/nowhere"):
        module.configure_model()
    told = r"LPIPS.*vgg16-397923af\.pth.*offline.*losses\.features"  # before a base is read
    with pytest.raises(WeightsError, match=told):
        OneStepSRModule(base="/nowhere", losses=Losses(lpips=Weight())).configure_model()
    module = OneStepSRModule(base=str(small_base))
    with torch.device("meta"):  # as Lightning does it with the device of the run
        module.configure_model()
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}


def test_modules_trained_whole_are_not_stored_in_16_bits():
    with pytest.raises(ConfigError, match="base_dtype"):
        OneStepSRModule(base_dtype="bfloat16", adapters=replace(ADAPTERS, modules_to_save=("vae.decoder",)))


def test_encoder_features_are_those_of_the_original_where_a_copy_is_trained(small_base):
    images, found = torch.rand(1, 3, 32, 32), []
    for saved in ((), ("vae.encoder",)):
        base = build(
            small_base, adapters=replace(ADAPTERS, targets=("sd_unet@unet",), modules_to_save=saved)
        ).generator.base
        with active_adapters(base, None):
            found.append(encoder_features(base, images))
    torch.testing.assert_close(found[1], found[0])


class Running(LossTerm):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))


def head(channels: int) -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(channels, 1, 1))


def test_a_checkpoint_holds_the_buffers_of_heads_and_of_terms_of_ones_own(small_base):
    module = build(small_base, losses=Losses(gan=Gan(head=head), extra={"mine": Running()}))
    made = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(made)
    names = {name.rpartition(".")[2] for name in made["state_dict"] if "lora" not in name}
    assert {"mean", "_u", "_v"} <= names
    assert "extra_losses.mine.mean" in made["state_dict"]


class Judge(LossTerm):
    def __init__(self, network: str) -> None:
        super().__init__()
        self.network, self.scale = network, nn.Parameter(torch.ones(()))

    def trained(self) -> dict[str, list[nn.Parameter]]:
        return {self.network: [self.scale]}


@pytest.mark.parametrize("networks", [("judge", "judge"), ("generator", "judge"), ("judge", "score")])
def test_networks_of_one_name_are_refused(networks, small_base):
    extra = {f"term{index}": Judge(network) for index, network in enumerate(networks)}
    vsd = Distillation(weight=1.0) if "score" in networks else None
    with pytest.raises(ConfigError, match="network"):
        build(small_base, losses=Losses(l2=Weight(), vsd=vsd, extra=extra))


def test_checkpoint_and_adapters_file_give_the_same_generator(small_base, tmp_path):
    module = build(small_base)
    twins.fit(module, tmp_path, 2, save_at=2)
    stored = torch.load(tmp_path / "at-step=2.ckpt", weights_only=True)
    assert stored["state_dict"]
    assert not any("base_layer" in key or "vae.decoder" in key or "norm" in key for key in stored["state_dict"])
    module.save_adapters(tmp_path / "adapters.safetensors")
    header = read_adapters_header(tmp_path / "adapters.safetensors")
    assert header["base_id"] == stored["morsr"]["base_id"] == "morsr/test"
    assert header["extra"]["one_step"]["timestep"] == 150
    assert header["extra"]["estimator"]["kind"] == "frequency"
    lr = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        expected = module.eval().generator(lr).sr
        for file in ("at-step=2.ckpt", "adapters.safetensors"):
            torch.testing.assert_close(load_generator(tmp_path / file)(lr).sr, expected, atol=1e-6, rtol=0, msg=file)
    path = tmp_path / "at-step=2.ckpt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError):
        load_generator(path)


def test_a_checkpoint_of_averaged_weights_restores_with_the_average(small_base, tmp_path):
    module, average = build(small_base), AdapterEMA(decay=0.9, warmup=0)
    twins.fit(module, tmp_path, 4, callbacks=[average], save_at=4)
    lr = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        raw = module.eval().generator(lr).sr
        with average.averaged(module):
            expected = module.generator(lr).sr
        found = load_generator(tmp_path / "at-step=4.ckpt")(lr).sr
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(raw, expected, atol=1e-6)


def test_adapters_of_another_timestep_or_estimator_are_refused(small_base, tmp_path):
    file = tmp_path / "runs" / "version_0" / "adapters.safetensors"
    build(small_base).save_adapters(file)
    later = OneStepConfig(timestep=400, scale_input=True)
    with pytest.raises(WeightsError, match="timestep 150, not 400"):
        build(small_base, one_step=later, weights=str(file))
    module = build(small_base, estimator="learned")
    module.trainer = SimpleNamespace(log_dir=str(tmp_path / "runs" / "version_1"))  # type: ignore[assignment]
    with pytest.raises(WeightsError, match="estimator"):  # of the newest run
        module._find_weights()


def test_adapters_of_a_base_made_by_hand_say_which_base_they_want(small_base, tmp_path):
    base = load_base(small_base)
    base.source, base.base_id = None, "by hand"
    OneStepSRModule(base=base, adapters=ADAPTERS).save_adapters(tmp_path / "adapters.safetensors")
    with pytest.raises(WeightsError, match="by hand"):
        load_generator(tmp_path / "adapters.safetensors")


def test_predictions_have_the_scale_of_the_data(small_base):
    module = build(small_base)
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(scale=2))  # type: ignore[assignment]
    assert module.eval().predict_step({"lr": torch.rand(1, 3, 8, 8)}, 0)["sr"].shape == (1, 3, 16, 16)


def test_loaders_without_a_data_module_are_refused(small_base, tmp_path):
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", max_steps=1, logger=False)
    with pytest.raises(ConfigError, match="data module"):
        trainer.fit(build(small_base), twins.Pairs().train_dataloader())


def test_the_tasks_share_of_the_routers_gradient(small_base):
    module = build(small_base, loss={"l2": 1.0})
    for parameter in module.objective.trained()["generator"]:
        torch.nn.init.normal_(parameter, std=0.1)
    phase, router = twins.plain_phase(module), module.generator.adapters.router
    before = copy.deepcopy(router.state_dict())
    terms = module.objective.generator_loss(twins.batch(), twins.draws(), step=0).terms
    pulls = [torch.autograd.grad(terms[one], [router.weight, router.bias], retain_graph=True) for one in terms]
    task, balance = (torch.cat([one.flatten() for one in pull]).norm() for pull in pulls)
    router.load_state_dict(before)
    share = phase.run(twins.batch(), twins.draws(), step=0).task_share
    torch.testing.assert_close(share, task / (task + balance), rtol=1e-3, atol=0)


def test_a_checkpoint_of_release_0_1_says_so(small_base):
    torch.save({"state_dict": {"generator.backbone.unet.conv_in.down": torch.zeros(1)}, "morsr": {}}, "old.ckpt")
    with pytest.raises(WeightsError, match=r"morsr 0\.1"):
        load_generator("old.ckpt")


def test_a_run_may_end_by_the_clock(small_base, tmp_path):
    module = build(small_base, schedule="constant")  # whose router has noise at the start
    with pytest.warns(UserWarning, match="the router's noise falls over a share of the run"):
        trainer = twins.fit(module, tmp_path, -1, max_time={"seconds": 1})
    assert trainer.global_step > 0
    assert module.generator.adapters.router.noise_sigma == 0
    with pytest.raises(ConfigError):  # a cosine needs to know its end
        twins.fit(build(small_base, schedule="cosine"), tmp_path, -1, max_time={"seconds": 1})


def test_without_weights_the_set_shipped_for_the_base_is_taken(small_base, tmp_path):
    nowhere: Any = SimpleNamespace(log_dir=str(tmp_path / "version_0"), default_root_dir=".")
    file = find_adapters("tiny")
    module = build(
        file.parent, adapters=read_adapters_header(file)["config"],
        one_step=OneStepConfig(timestep=200, scale_input=True), estimator="learned", estimator_args={"worst": True},
    )  # fmt: skip
    module.trainer = nowhere
    module._find_weights()
    images = torch.rand(1, 3, 16, 16)
    torch.testing.assert_close(module.eval()(images), load_generator(file).eval()(images).sr.clamp(0, 1))
    module = build(small_base)
    module.trainer = nowhere
    with pytest.raises(WeightsError, match=r"train it first, or name some by model\.weights"):
        module._find_weights()
