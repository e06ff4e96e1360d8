"""What `Trainer.fit` itself must set up: the router's training mode, calibration, and where weights are read from."""

from dataclasses import replace
from typing import Any

import lightning as L
import torch
import training_twins as twins
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from training_twins import ADAPTERS, build, fit

from morsr.models.draws import Draws


def test_running_means_of_the_balance_take_in_every_training_batch_and_no_other(small_base, tmp_path):
    module = build(small_base, adapters=replace(ADAPTERS, logit_noise=0.0))
    module.eval()  # as after a validation
    context = module.generator.adapters.router
    twins.fit(module, tmp_path, 3, data=twins.Pairs())
    assert float(context.images_seen) == 6
    assert context.share.std() > 0
    before = context.share.clone()
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    trainer.validate(module, datamodule=twins.Pairs(), verbose=False)
    torch.testing.assert_close(context.share, before, atol=0, rtol=0)


def test_the_routers_noise_is_drawn_in_a_fit_and_ends(small_base, tmp_path):
    seen: list[float] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(module.generator.adapters.router.noise_sigma)

    ends = []
    for noise in (0.0, 5.0):
        module = build(small_base, adapters=replace(ADAPTERS, logit_noise=noise, logit_noise_until=0.5))
        fit(module, tmp_path / str(noise), 4, callbacks=[Look()])
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad]))
    assert seen[4:] == [5.0, 2.5, 0.0, 0.0]
    assert not torch.equal(*ends)


def test_calibration_goes_on_into_further_epochs(small_base, tmp_path, monkeypatch):
    module = build(small_base, calibration_images=15)
    seen = 0
    estimate = module.generator.estimator.forward

    def count(images: Tensor) -> Any:
        nonlocal seen
        seen += len(images)
        return estimate(images)

    with monkeypatch.context() as patched:
        patched.setattr(module.generator.estimator, "forward", count)
        fit(module, tmp_path, 0)
    assert seen == 16  # of 6 per epoch


def test_a_resumed_run_needs_no_start_file(small_base, tmp_path):
    start = tmp_path / "start.safetensors"
    build(small_base).save_adapters(start)
    fit(build(small_base, start_from=str(start)), tmp_path, 1, save_at=1)
    start.unlink()
    trainer = fit(build(small_base, start_from=str(start)), tmp_path / "on", 2, ckpt=tmp_path / "at-step=1.ckpt")
    assert trainer.global_step == 2


def test_shared_ranks_alone_restore_a_share_of_the_images(small_base):
    module = build(small_base, adapters=replace(ADAPTERS, routed_dropout=0.4))
    batch, draws = {"lr": torch.rand(64, 3, 4, 4), "hr": torch.rand(64, 3, 16, 16)}, Draws(torch.arange(64))
    module.generator.adapters.router.train()
    with torch.no_grad():
        output = module.objective.generator_loss(batch, draws, step=0).output
    mass = output.routing.gates.sum(-1)
    dropped = (mass == 0).all(0)
    assert 0.2 < dropped.float().mean() < 0.6
    assert (mass[:, ~dropped] > 0).any()
    assert output.routing.probabilities[:, dropped].sum(-1).allclose(torch.ones(()))
