"""RealESRGANDataModule: its batches, resuming, several devices, and what is refused or found missing."""

import multiprocessing
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from data_files import save, smooth
from PIL import Image

from morsr.data import RealESRGANDataModule
from morsr.degradation import DegradationRecipe, apply, true_severity
from morsr.errors import ConfigError, InputError

Batch = dict[str, Any]


class Recorder(L.LightningModule):
    """Notes what every training batch held, and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[list[int], float]] = []
        self.epochs: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.seen.append((batch["key"].tolist(), round(float(batch["lr"].double().mean()), 9)))
        self.epochs.append(self.current_epoch)
        return self.layer(batch["lr"].mean().view(1, 1)).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert batch["lr"].shape[-1] * 4 == batch["hr"].shape[-1]

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.trainer.estimated_stepping_batches  # with max_epochs, asks for the loader before the loops are restored
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(folder: Path | None = None, **settings: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def fit(data: RealESRGANDataModule, folder: Path, *, steps: int, resume: Path | None = None, **more: Any) -> Recorder:
    run, model = trainer(folder, max_steps=steps, max_epochs=100, **more), Recorder()
    run.fit(model, data, ckpt_path=resume, weights_only=True)
    run.save_checkpoint(folder / "end.ckpt")
    return model


def batches(data: RealESRGANDataModule, count: int) -> list[Batch]:
    """The first finished training batches."""
    data.setup("fit")
    found: list[Batch] = []
    while len(found) < count:
        found += list(data.train_dataloader())[: count - len(found)]
    return [data.finish_batch(batch) for batch in found]


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    for first, second in zip(one, two, strict=True):
        assert first["stem"] == second["stem"]
        for name in ("key", "hr", "lr", "severity"):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def mixed(photos, pairs, tmp_path):
    """Sources of unequal weights, pairs, synthetic images, a file that is damaged and one that is too small."""
    for number in range(3):
        save(tmp_path / "more" / f"m{number}.png", smooth(40, 48, 10 + number))
    (photos / "photo1.png").write_bytes((photos / "photo1.png").read_bytes()[:-40])
    save(tmp_path / "more" / "small.png", smooth(20, 90, 0))
    train = [{"source": str(photos), "weight": 2.5}, str(tmp_path / "more"), pairs]
    return {"train": train, "dead_leaves": 0.25, "cache_mb": 0, "samples_per_epoch": 32}


def test_a_training_batch_is_the_recipe_applied_to_its_crops(make_data):
    (batch,) = batches(make_data(dead_leaves=0.5, recipe="realesrgan"), 1)
    assert set(batch) == {"hr", "lr", "stem", "key", "severity", "parameters"}
    assert (batch["hr"].shape, batch["lr"].shape) == ((4, 3, 32, 32), (4, 3, 8, 8))
    assert batch["hr"].dtype == batch["lr"].dtype == torch.float32
    assert 0 <= batch["hr"].min() < batch["hr"].max() <= 1
    assert (batch["hr"].flatten(1).std(1) > 0.01).all(), "synthetic images are rendered"
    assert sum(stem.startswith("dead_leaves") for stem in batch["stem"]) == 2
    parameters = DegradationRecipe.load("realesrgan").sample(batch["key"])
    torch.testing.assert_close(batch["lr"], apply(batch["hr"], parameters), rtol=0, atol=0)
    torch.testing.assert_close(batch["severity"], true_severity(parameters).combined)
    torch.testing.assert_close(batch["parameters"].key, batch["key"])


def test_pairs_of_files_keep_their_lr_images(make_data, mixed):
    kinds = set()
    for batch in batches(make_data(**mixed), 8):
        real = [len(stem) == 1 for stem in batch["stem"]]
        assert ("parameters" in batch) == (not any(real))
        assert batch["severity"].isnan().tolist() == real
        for is_pair, hr, lr in zip(real, batch["hr"], batch["lr"], strict=True):
            assert torch.equal(hr, lr.repeat_interleave(4, 1).repeat_interleave(4, 2)) == is_pair
        kinds |= {stem[0] for stem in batch["stem"]}
    assert {"p", "m", "d"} < kinds, "every source takes part"


@pytest.mark.parametrize("change", [{"num_workers": 2}, {"cache_mb": 512}], ids=str)
def test_workers_and_memory_change_nothing(make_data, mixed, change):
    one, other = make_data(**mixed), make_data(**{**mixed, **change})
    assert_same(batches(one, 10), batches(other, 10))
    assert sorted(Path(path).name for path in other.skipped) == ["photo1.png", "small.png"]
    assert one.skipped == other.skipped


def test_windows_are_cut_from_the_degraded_crops(make_data):
    whole, cut = batches(make_data(crop_size=64), 2), batches(make_data(crop_size=64, patch_size=32), 2)
    places = set()
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(other["score_lr"], one["lr"], rtol=0, atol=0)
        for lr, hr, small_lr, small_hr in zip(one["lr"], one["hr"], other["lr"], other["hr"], strict=True):
            found = [
                (top, left)
                for top in range(9)
                for left in range(9)
                if torch.equal(lr[:, top : top + 8, left : left + 8], small_lr)
                and torch.equal(hr[:, 4 * top : 4 * top + 32, 4 * left : 4 * left + 32], small_hr)
            ]
            assert len(found) == 1
            places.update(found)
    assert len(places) > 4


def test_sets_of_validation_and_test_may_share_names(make_data, photos, tmp_path):
    other = tmp_path / "other" / photos.name
    other.mkdir(parents=True)
    for path in photos.glob("*.png"):
        Image.open(path).rotate(180).save(other / path.name)
    data = make_data(val=[str(photos)], test=[str(other)], test_seeds=[0], val_crop=48)
    found = []
    for use in ("validate", "test"):
        data.setup(use)
        loader = data.val_dataloader() if use == "validate" else data.test_dataloader()
        found.append(data.finish_batch(next(iter(loader))))
    assert found[0]["stem"] == found[1]["stem"]
    fresh = make_data(test=[str(other)], test_seeds=[0])
    fresh.setup("test")
    assert torch.equal(found[1]["lr"], fresh.finish_batch(next(iter(fresh.test_dataloader())))["lr"])


@pytest.mark.parametrize("use", ["validate", "test"])
def test_evaluation_batches(make_data, photos, pairs, use):
    (photos / "photo1.png").write_bytes(b"damaged")
    (Path(pairs["lr"]) / "1.png").write_bytes((Path(pairs["lr"]) / "1.png").read_bytes()[:-40])
    sources = [str(photos), {**pairs, "name": "cameras"}, {"lr": "a/LR", "hr": "a/HR", "optional": True}]
    data = make_data(val=sources, test=sources, val_seeds=[5, 6], test_seeds=[5, 6], val_crop=48, val_recipe="camera")
    data.setup(use)
    loader = data.val_dataloader() if use == "validate" else data.test_dataloader()
    found = [data.finish_batch(batch) for batch in loader]
    again = [data.finish_batch(batch) for batch in loader]
    assert_same(found, again)
    assert [batch["set"] for batch in found] == [["photos"]] * 12 + [["cameras"]] * 2
    assert [batch["stem"] for batch in found][:2] == [["photo0_s5"], ["photo0_s6"]]
    assert (found[0]["image"], found[-1]["stem"], found[-1]["image"]) == (["photo0"], ["2"], ["2"])
    first, pair = found[0], found[-1]
    assert first["hr"].shape[-2:] == ((48, 48) if use == "validate" else (64, 64))
    parameters = DegradationRecipe.load("camera").sample(first["key"])
    torch.testing.assert_close(first["lr"], apply(first["hr"], parameters), rtol=0, atol=1e-6)
    assert torch.equal(pair["hr"], pair["lr"].repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert "parameters" not in pair
    assert sorted(Path(path).name for path in data.skipped) == ["1.png", "photo1.png"]
    with pytest.warns(UserWarning, match="photo1"):
        data.teardown(use)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.teardown(use)  # named once


class Echo(L.LightningModule):
    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        return batch


def test_predict_batches(make_data, photos):
    found: Any = trainer().predict(Echo(), make_data(predict=str(photos)))
    assert [batch["stem"] for batch in found] == [[f"photo{number}"] for number in range(7)]
    assert [batch["lr"].shape for batch in found] == [(1, 3, 64, 72 + 4 * number) for number in range(7)]


def test_a_resumed_run_sees_what_a_straight_one_sees(make_data, mixed, tmp_path):
    mixed["samples_per_epoch"] = 16
    run = fit(make_data(**mixed), tmp_path, steps=7)
    assert run.epochs == [0] * 4 + [1] * 3
    assert len({tuple(keys) for keys, _ in run.seen}) == 7
    for stop, before, after in ((2, 0, 2), (4, 1, 2), (6, 0, 0)):  # number of steps, workers before and after
        head = fit(make_data(**mixed, num_workers=before), tmp_path, steps=stop).seen
        tail = fit(make_data(**mixed, num_workers=after), tmp_path, steps=7, resume=tmp_path / "end.ckpt").seen
        assert head + tail == run.seen


def test_resume_from_a_checkpoint_written_during_validation(make_data, tmp_path, photos):
    from lightning.pytorch.callbacks import ModelCheckpoint

    settings = {"val": [str(photos)]}
    straight = fit(make_data(**settings), tmp_path, steps=7, limit_val_batches=0).seen
    saver = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{step}", every_n_train_steps=None, monitor=None)
    checks = {"val_check_interval": 3, "limit_val_batches": 1}
    fit(make_data(**settings), tmp_path, steps=5, callbacks=[saver], **checks)
    (kept,) = sorted((tmp_path / "kept").glob("step=3*.ckpt"))
    assert fit(make_data(**settings, num_workers=1), tmp_path, steps=7, resume=kept, **checks).seen == straight[3:]


def test_an_epoch_has_a_hundred_joined_batches_at_least(make_data, photos):
    data = make_data(train=[str(photos)], samples_per_epoch=None)
    data.trainer = SimpleNamespace(world_size=2, global_rank=0, state=SimpleNamespace(fn=None))
    data.setup("fit")
    assert len(data.train_dataloader()) == 100


def test_two_devices_see_together_what_one_sees_with_both_batches(make_data, mixed):
    mixed["samples_per_epoch"] = 16
    whole = make_data(**mixed, batch_size=8)
    whole.setup("fit")
    shares = []
    for rank in range(2):
        data = make_data(**mixed)
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, state=SimpleNamespace(fn=None))  # type: ignore[assignment]
        data.setup("fit")
        shares.append([data.finish_batch(batch) for _ in range(2) for batch in data.train_dataloader()])
    both = [whole.finish_batch(batch) for _ in range(2) for batch in whole.train_dataloader()]
    assert len(both) == len(shares[0]) == 4
    for batch, *parts in zip(both, *shares, strict=True):
        assert batch["stem"] == parts[0]["stem"] + parts[1]["stem"]
        for name in ("key", "hr", "lr"):
            torch.testing.assert_close(batch[name], torch.cat([part[name] for part in parts]), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------ what is refused or missing

BAD: list[tuple[dict[str, Any], str, type[Exception]]] = [
    ({"train": []}, "", ConfigError),
    ({"patch_size": 34}, "", ConfigError),
    ({"crop_size": 30}, "", ConfigError),
    ({"recipe": "unheard"}, "fit", ConfigError),
    ({"train": "absent"}, "fit", InputError),
    ({"train": [{"lr": "a", "hr": "b", "optional": True}]}, "fit", InputError),
    ({"val": ["absent"]}, "fit", InputError),
    ({"test": [{"path": "x"}]}, "test", ConfigError),
    ({"test": ["photos", "x/photos"]}, "test", ConfigError),
    ({"test": ["photos"], "val_multiple": 512}, "test", InputError),
    ({}, "predict", ConfigError),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "stage", "error"), BAD, ids=str)
def test_wrong_settings_are_refused(make_data, settings, stage, error):
    def make() -> None:
        made = make_data(**settings)
        if stage:
            made.setup(stage)

    with pytest.raises(error):
        make()


@pytest.mark.parametrize("settings", [settings for settings, _, _ in BAD[:-2]], ids=str)
def test_what_a_run_would_refuse_is_missing_before_it(settings, photos):
    given = {"train": [str(photos)], "val_multiple": 16, "test": "photos", **settings}
    assert RealESRGANDataModule.missing(**given)


def test_complete_data_lack_nothing(photos, pairs, monkeypatch):
    monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("a file was opened"))
    sources = [str(photos), pairs, {"source": "absent", "optional": True}]
    assert RealESRGANDataModule.missing(train=sources, val=sources, test="skimage:eval") == []
    assert RealESRGANDataModule.missing(train="absent", dead_leaves=1.0) == []


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_a_batch_is_made_on_the_device(make_data):
    data = make_data(dead_leaves=0.5)
    data.setup("fit")
    raw = next(iter(data.train_dataloader()))
    device = torch.accelerator.current_accelerator()
    batch = data.finish_batch(data.transfer_batch_to_device(raw, device, 0))
    assert batch["lr"].device.type == batch["hr"].device.type == batch["severity"].device.type == device.type
    assert batch["parameters"].key.device.type == "cpu"


def test_a_signal_to_the_group_of_the_run_does_not_reach_its_workers(make_data, mixed):
    data = make_data(**mixed, num_workers=1)
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    workers = multiprocessing.active_children()
    assert workers
    assert all(os.getpgid(one.pid) == one.pid for one in workers)
