"""What a checkpoint or a file of adapters was trained with: taken along, told of, or refused."""

import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_twins import ADAPTERS, Pairs, batch, build, fit

from morsr.adapters import read_adapters_header
from morsr.errors import WeightsError
from morsr.models.bases import loading
from morsr.models.bases.base import PROMPTS_FILE
from morsr.models.bases.reading import read_prompts
from morsr.models.generator import OneStepConfig
from morsr.models.loading import load_generator
from morsr.training.module import OneStepSRModule


def checkpoint(module: OneStepSRModule) -> dict[str, Any]:
    """What a trainer would save of the module."""
    made: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(made)
    made["state_dict"] = {key: value.clone() for key, value in made["state_dict"].items()}
    return made


@pytest.fixture(scope="module")
def made(small_base):
    return checkpoint(build(small_base))


@pytest.mark.parametrize(
    ("told", "settings"),
    [
        ("one_step with timestep 150, not 400", {"one_step": OneStepConfig(timestep=400, scale_input=True)}),
        ("adapters with scale 1.0, not 2.0", {"adapters": replace(ADAPTERS, scale=2.0)}),
        ("adapters with gate 'renormalize_real', not 'softmax'", {"adapters": replace(ADAPTERS, gate="softmax")}),
        ("num_shared 2, not 3, num_zero 1, not 2", {"adapters": replace(ADAPTERS, num_shared=3, num_zero=2)}),
        ("the estimator 'frequency', not 'learned'", {"estimator": "learned"}),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(told, settings, small_base, made):
    """Most of them change no name and no shape, so that the tensors alone would be taken and give other pictures."""
    with pytest.raises(WeightsError, match=told) as stopped:
        build(small_base, **settings).on_load_checkpoint(made)
    assert "model.start_from" in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_a_checkpoint_with_the_states_of_another_optimizer_or_schedule_is_refused(small_base, tmp_path):
    fit(build(small_base), tmp_path, 1, save_at=1)
    sgd = {"generator": partial(torch.optim.SGD, momentum=0.9)}
    falling = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    for settings, told in (({"optimizers": sgd}, "AdamW -> SGD"), ({"scheduler": falling}, "LambdaLR -> Exponential")):
        with pytest.raises(WeightsError, match=told):
            fit(build(small_base, **settings), tmp_path, 2, ckpt=tmp_path / "at-step=1.ckpt")


def renamed(base: Path, folder: Path) -> Path:
    """The same base from another mirror: another folder, another id, half precision."""
    shutil.copytree(base, folder)
    save_file(load_file(folder / PROMPTS_FILE), folder / PROMPTS_FILE, {"base_id": "someone/mirror"})
    for path in folder.glob("*/*.safetensors"):
        save_file({key: value.half() for key, value in load_file(path).items()}, path, {"format": "pt"})
    return folder


def test_a_base_is_known_by_its_weights_and_not_by_its_name(small_base, tmp_path):
    """Else a lost mirror or a renamed folder would lock a half-done run out of its own base."""
    fit(build(small_base), tmp_path, 1, save_at=1)
    mirror, ckpt = renamed(small_base, tmp_path / "mirror"), tmp_path / "at-step=1.ckpt"
    again = build(mirror)
    assert again.generator.base.base_id == "someone/mirror"
    trainer = fit(again, tmp_path, 2, ckpt=ckpt)
    assert trainer.global_step == 2
    trainer.validate(build(mirror), datamodule=Pairs(), ckpt_path=str(ckpt))
    trainer.test(build(mirror), dataloaders=Pairs().val_dataloader(), ckpt_path=str(ckpt))
    assert load_generator(ckpt, base=mirror).base.base_id == "someone/mirror"

    unet = next((mirror / "unet").glob("*.safetensors"))
    save_file({key: value * 1.5 for key, value in load_file(unet).items()}, unet, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"another base \(made for 'morsr/test'\): the weights of"):
        fit(build(mirror), tmp_path, 2, ckpt=ckpt)
    with pytest.raises(WeightsError, match="another base"):
        load_generator(ckpt, base=mirror)


def test_optimizer_settings_that_a_resumed_run_does_not_take_are_told(small_base, tmp_path):
    fit(build(small_base), tmp_path, 1, save_at=1)
    path = tmp_path / "at-step=1.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*has no effect")
        fit(build(small_base), tmp_path / "same", 2, ckpt=path)
        # The schedule is no state: what the config says holds from the next step on.
        trainer = fit(build(small_base, schedule="cosine"), tmp_path / "cosine", 2, ckpt=path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
    with pytest.warns(UserWarning, match=r"has no effect: lr 0\.01 -> 0\.02, betas .*0\.9, .* -> .*0\.5, .*start_from"):
        trainer = fit(build(small_base, lr=2e-2, betas=(0.5, 0.9)), tmp_path / "other", 2, ckpt=path)
    group = trainer.optimizers[0].param_groups[0]
    assert (group["initial_lr"], group["betas"][0]) == (1e-2, 0.9)


@pytest.fixture
def encoder(monkeypatch):
    """A text encoder for the small base, which has none: the letters' codes."""

    def encoded(folder: Path, name: str, texts: dict[str, str], *, family: type) -> dict[str, torch.Tensor]:
        made = {side: torch.tensor([[[ord(one) / 50 for one in text.ljust(8)[:8]]]]) for side, text in texts.items()}
        return read_prompts(folder, name, {}, family=family) | made

    monkeypatch.setattr(loading, "read_prompts", encoded)


def test_adapters_bring_their_prompts(encoder, small_base, tmp_path):
    """Else `morsr test` would score another model than `morsr upscale` runs; those of the config stay."""
    texts = {"clean": "a photo", "degraded": "blur"}
    trained = build(small_base, prompts=texts).eval()
    file = tmp_path / "runs" / "version_0" / "adapters.safetensors"
    trained.save_adapters(file)
    embeddings = trained.generator.base.prompts
    resumed, start, found = build(small_base), build(small_base, start_from=str(file)), build(small_base)
    assert not torch.equal(embeddings["clean"], resumed.generator.base.prompt_clean)
    resumed.on_load_checkpoint(checkpoint(trained))
    fit(start, tmp_path, 0)
    log_dir = str(tmp_path / "runs" / "version_1")
    found.trainer = SimpleNamespace(log_dir=log_dir, default_root_dir=".")  # type: ignore[assignment]
    found._find_weights()
    for module in (build(small_base, weights=str(file)), resumed, start, found):
        torch.testing.assert_close(module.generator.base.prompts, embeddings, rtol=0, atol=0)
        module.save_adapters(tmp_path / "again.safetensors")
        assert read_adapters_header(tmp_path / "again.safetensors")["extra"]["prompts"] == texts
    with torch.no_grad():
        lr = batch()["lr"]
        torch.testing.assert_close(load_generator(file)(lr).sr, trained.generator(lr).sr)
    sea = {"clean": "sea"}
    own, expected = build(small_base, prompts=sea, weights=str(file)), build(small_base, prompts=sea)
    torch.testing.assert_close(own.generator.base.prompt_clean, expected.generator.base.prompt_clean, rtol=0, atol=0)
