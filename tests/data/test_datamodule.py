"""RealESRGANDataModule: the batch, its determinism over workers and resumed runs, and files that cannot be used."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DistributedSampler

from morsr.data.datamodule import RealESRGANDataModule
from morsr.data.evaluation_set import collate_pairs
from morsr.errors import ConfigError, InputError

Make = Callable[..., RealESRGANDataModule]


class Recorder(L.LightningModule):
    """Notes what every training batch held, and learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[list[int], float]] = []
        self.epochs: list[int] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append((batch["key"].tolist(), round(float(batch["lr"].double().mean()), 9)))
        self.epochs.append(self.current_epoch)
        return self.layer(batch["lr"].mean().view(1, 1)).sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert batch["lr"].shape[-1] * 4 == batch["hr"].shape[-1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.trainer.estimated_stepping_batches  # with max_epochs, asks for the loader before the loops are restored
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(data: RealESRGANDataModule, folder: Path, *, steps: int, resume: Path | None = None, **more: Any) -> Recorder:
    trainer = L.Trainer(
        max_steps=steps, max_epochs=100, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **more,
    )  # fmt: skip
    model = Recorder()
    trainer.fit(model, data, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return model


def batches(data: RealESRGANDataModule, count: int) -> list[dict[str, Any]]:
    data.setup("fit")
    found: list[dict[str, Any]] = []
    while len(found) < count:
        found += list(data.train_dataloader())[: count - len(found)]
    return [data.finish_batch(batch) for batch in found]


def test_training_batch(make_data: Make):
    batch = batches(make_data(dead_leaves=0.5, recipe="light"), 1)[0]
    assert set(batch) == {"hr", "lr", "stem", "key", "parameters"}
    assert batch["hr"].shape == (4, 3, 32, 32)
    assert batch["lr"].shape == (4, 3, 8, 8)
    assert batch["hr"].dtype == batch["lr"].dtype == torch.float32
    assert 0 <= batch["hr"].min() < batch["hr"].max() <= 1
    assert len(batch["parameters"]) == len(batch["stem"]) == 4
    assert sum(stem.startswith("dead_leaves") for stem in batch["stem"]) == 2
    assert (batch["hr"].flatten(1).std(1) > 0.01).all()
    torch.testing.assert_close(batch["parameters"].key, batch["key"])


def test_lr_is_the_recipe_applied_to_hr(make_data: Make):
    from morsr.degradation import DegradationRecipe, apply

    batch = batches(make_data(recipe="realesrgan"), 1)[0]
    parameters = DegradationRecipe.from_preset("realesrgan").sample(batch["key"])
    torch.testing.assert_close(batch["lr"], apply(batch["hr"], parameters), rtol=0, atol=0)


def test_samples_do_not_depend_on_workers(make_data: Make):
    runs = [batches(make_data(dead_leaves=0.25, recipe="light", num_workers=workers), 4) for workers in (0, 1, 2)]
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            assert one["stem"] == two["stem"]
            torch.testing.assert_close(one["hr"], two["hr"], rtol=0, atol=0)
            torch.testing.assert_close(one["lr"], two["lr"], rtol=0, atol=0)


def test_memory_makes_no_difference(make_data: Make):
    kept, read = (batches(make_data(recipe="light", cache_mb=mb), 2) for mb in (512, 0))
    for one, two in zip(kept, read, strict=True):
        torch.testing.assert_close(one["hr"], two["hr"], rtol=0, atol=0)


def test_windows_are_cut_from_the_degraded_crops(make_data: Make):
    whole = batches(make_data(crop_size=64), 2)
    cut = batches(make_data(crop_size=64, patch_size=32), 2)
    places = set()
    for one, other in zip(whole, cut, strict=True):
        assert other["hr"].shape[1:] == (3, 32, 32)
        assert other["lr"].shape[1:] == (3, 8, 8)
        torch.testing.assert_close(other["context"], one["lr"], rtol=0, atol=0)
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
    assert len(places) > len(whole[0]["lr"])


def test_seeds_and_epochs_differ(make_data: Make):
    data = make_data(recipe="light")
    data.setup("fit")
    loader = data.train_dataloader()
    first, second = list(loader), list(loader)
    assert first[0]["key"].tolist() != second[0]["key"].tolist()
    other = batches(make_data(recipe="light", seed=1), 1)[0]
    assert other["key"].tolist() != first[0]["key"].tolist()


def test_a_loop_of_ones_own_sees_new_samples_in_every_epoch(make_data: Make):
    data = make_data(recipe="light")
    data.setup("fit")
    data.train_dataloader()  # one that nobody reads uses no epoch up
    own = [batch["key"].tolist() for _ in range(3) for batch in data.train_dataloader()]
    again = make_data(recipe="light")
    again.setup("fit")
    loader = again.train_dataloader()
    assert own == [batch["key"].tolist() for _ in range(3) for batch in loader]
    assert len({tuple(keys) for keys in own}) == len(own)


@pytest.mark.parametrize("use", ["validate", "fit"])
def test_a_loop_of_ones_own_goes_on_after_a_trainer(make_data: Make, photos: Path, tmp_path: Path, use: str):
    data = make_data(recipe="light", val=[str(photos)])
    if use == "fit":
        seen = [tuple(keys) for keys, _ in fit(data, tmp_path, steps=6, limit_val_batches=1).seen]
    else:
        L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(Recorder(), data, verbose=False)
        seen = []
    own = [tuple(batch["key"].tolist()) for _ in range(3) for batch in data.train_dataloader()]
    assert len(own) == 12
    assert len({*seen, *own}) == len(seen) + 12
    again = fit(data, tmp_path, steps=6, limit_val_batches=1).seen
    assert [keys for keys, _ in again[:4]] == [batch["key"].tolist() for batch in batches(make_data(recipe="light"), 4)]


@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_resumed_run_sees_what_a_straight_one_sees(make_data: Make, tmp_path: Path, stop: int):
    settings = {"dead_leaves": 0.25, "recipe": "light"}
    run = fit(make_data(**settings), tmp_path, steps=10)
    straight = run.seen
    assert run.epochs == [0] * 4 + [1] * 4 + [2] * 2
    assert len({tuple(keys) for keys, _ in straight}) == 10
    head = fit(make_data(**settings), tmp_path, steps=stop).seen
    tail = fit(make_data(**settings), tmp_path, steps=10, resume=tmp_path / "end.ckpt").seen
    assert head + tail == straight


def test_resume_from_a_checkpoint_written_during_validation_with_workers(make_data: Make, tmp_path: Path, photos: Path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    settings = {"recipe": "light", "val": [str(photos)]}
    straight = fit(make_data(**settings), tmp_path, steps=7, limit_val_batches=0).seen
    saver = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, filename="{step}", every_n_train_steps=None, monitor=None)
    checks = {"val_check_interval": 3, "limit_val_batches": 1}
    fit(make_data(**settings), tmp_path, steps=5, callbacks=[saver], **checks)
    (kept,) = sorted((tmp_path / "kept").glob("step=3*.ckpt"))
    tail = fit(make_data(**settings, num_workers=1), tmp_path, steps=7, resume=kept, **checks).seen
    assert tail == straight[3:]


@pytest.fixture
def mixed(photos: Path, tmp_path: Path) -> dict[str, Any]:
    """Sources of unequal weights, real pairs, synthetic images, a file that is damaged and one that is too small."""
    second = tmp_path / "second"
    for folder, scale in (("more", 4), ("lr", 1), ("hr", 4)):
        (second / folder).mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 256, (10 * scale, 12 * scale, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(second / folder / f"{folder[0]}{number}.png")
    for number in range(3):
        (second / "lr" / f"l{number}.png").rename(second / "lr" / f"h{number}.png")
    (photos / "photo1.png").write_bytes((photos / "photo1.png").read_bytes()[:-40])
    Image.fromarray(np.zeros((20, 90, 3), np.uint8)).save(second / "more" / "small.png")
    pairs = {"lr": str(second / "lr"), "hr": str(second / "hr")}
    train = [{"source": str(photos), "weight": 2.5}, str(second / "more"), pairs]
    return {"train": train, "dead_leaves": 0.25, "recipe": "light", "cache_mb": 0, "samples_per_epoch": 32}


def test_mixed_sources_with_bad_files_do_not_depend_on_workers(make_data: Make, mixed: dict[str, Any]):
    runs = {}
    for workers in (0, 1, 2, 3):
        data = make_data(**mixed, num_workers=workers)
        runs[workers] = batches(data, 12), data.skipped
    first, skipped = runs[0]
    assert sorted(Path(path).name for path in skipped) == ["photo1.png", "small.png"]
    stems = [stem for batch in first for stem in batch["stem"]]
    assert len({stem[0] for stem in stems}) == 4, "every source takes part"
    for workers, (found, noted) in runs.items():
        assert noted == skipped, f"{workers} workers name other files"
        for one, two in zip(first, found, strict=True):
            assert one["stem"] == two["stem"]
            for name in ("key", "hr", "lr"):
                torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=f"{name}, {workers} workers")


@pytest.mark.parametrize(("stop", "before", "after"), [(3, 0, 3), (5, 2, 1), (11, 3, 0)])
def test_mixed_sources_with_bad_files_go_on_in_mid_epoch(
    make_data: Make, mixed: dict[str, Any], tmp_path: Path, stop: int, before: int, after: int
):
    straight = fit(make_data(**mixed), tmp_path, steps=13).seen
    head = fit(make_data(**mixed, num_workers=before), tmp_path, steps=stop).seen
    tail = fit(make_data(**mixed, num_workers=after), tmp_path, steps=13, resume=tmp_path / "end.ckpt").seen
    assert head + tail == straight


def test_a_large_manifest_starts_without_opening_a_file(
    make_data: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = "".join(f"img/{number:06d}.png,{512 if number else 20},512,{'0' * 32},1\n" for number in range(155_000))
    (tmp_path / "m.csv").write_text(f"path,width,height,hash,weight\n{rows}")
    for name in ("PIL.Image.open", "os.stat", "os.path.isfile", "os.path.exists"):
        monkeypatch.setattr(name, lambda path, *rest, **more: pytest.fail(f"{path} was looked at"))
    data = make_data(train=[str(tmp_path / "m.csv")], samples_per_epoch=None, num_workers=2)
    data.setup("fit")
    loader = data.train_dataloader()
    monkeypatch.undo()
    assert len(data.manifest()["train"]["digest"]) == 32
    assert data.manifest()["train"]["images"] == 154_999
    assert len(loader) == 154_999 // 4 + 1


def test_a_changed_batch_size_is_reported_on_resume(make_data: Make, tmp_path: Path):
    fit(make_data(recipe="light"), tmp_path, steps=1)
    with pytest.warns(UserWarning, match="batch_size 4 -> 8"):
        fit(make_data(recipe="light", batch_size=8), tmp_path, steps=2, resume=tmp_path / "end.ckpt")


def test_everything_that_changes_samples_is_reported_on_resume(make_data: Make, photos: Path, tmp_path: Path):
    fit(make_data(recipe="light"), tmp_path, steps=1)
    (photos / "photo0.png").rename(photos / "other.png")
    changed = {
        "dead_leaves": 0.25, "patch_size": 16, "max_downscale": 2.0, "usm": True, "flips": False, "turns": False,
        "recipe": "camera",
    }  # fmt: skip
    with pytest.warns(UserWarning, match="samples will differ") as caught:
        fit(make_data(**changed), tmp_path, steps=2, resume=tmp_path / "end.ckpt")
    (text,) = [str(warning.message) for warning in caught if "samples will differ" in str(warning.message)]
    for name in (*changed, "images"):
        assert f"{name} " in text
    assert "max_downscale 1.0 -> 2.0" in text


def test_a_checkpoint_of_an_earlier_version_goes_on(make_data: Make, tmp_path: Path):
    fit(make_data(recipe="light"), tmp_path, steps=1)
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    kept = checkpoint["RealESRGANDataModule"]
    for name in ("dead_leaves", "patch_size", "max_downscale", "usm", "flips", "turns", "scale", "recipe", "images"):
        kept.pop(name)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="samples will differ")
        assert len(fit(make_data(recipe="light"), tmp_path, steps=2, resume=tmp_path / "old.ckpt").seen) == 1


@pytest.mark.parametrize("cache_mb", [512, 0])
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_passed_over_and_named(
    make_data: Make, photos: Path, tmp_path: Path, cache_mb: int, workers: int
):
    (photos / "photo1.png").write_bytes(b"damaged")
    Image.fromarray(np.zeros((20, 90, 3), np.uint8)).save(photos / "small.png")
    data = make_data(recipe="light", cache_mb=cache_mb, num_workers=workers)
    with pytest.warns(UserWarning, match="2 image files were passed over") as caught:
        fit(data, tmp_path, steps=4)
    text = str([str(warning.message) for warning in caught])
    assert "photo1.png" in text
    assert "small.png: 90x20 pixels, too small for crops of 32" in text


@pytest.mark.parametrize("cache_mb", [512, 0.01, 0])
def test_sizes_in_a_manifest_spare_opening_files(make_data: Make, photos: Path, cache_mb: float):
    rows = "".join(f"photo{number}.png,{72 + 4 * number},64\n" for number in range(5))
    (photos / "m.csv").write_text(f"path,width,height\n{rows}absent.png,31,64\n")
    data = make_data(train=[str(photos / "m.csv")], cache_mb=cache_mb, recipe="light")
    data.setup("fit")
    assert [Path(path).name for path in data.skipped] == ["absent.png"]
    assert "31x64 pixels, too small" in data.skipped[str(photos / "absent.png")]


def test_nothing_usable_is_an_error(make_data: Make, photos: Path):
    for cache_mb in (512, 0):
        data = make_data(crop_size=128, cache_mb=cache_mb)
        with pytest.raises(InputError, match=r"can(not)? be used"):
            batches(data, 1)


def test_synthetic_images_alone_need_no_source(make_data: Make):
    batch = batches(make_data(train=[], dead_leaves=1.0, recipe="light"), 1)[0]
    assert all(stem.startswith("dead_leaves_") for stem in batch["stem"])
    assert len(set(batch["stem"])) == 4


def test_shrinking_turning_and_mirroring(make_data: Make, photos: Path):
    plain = batches(make_data(recipe="light", flips=False, turns=False), 2)
    varied = batches(make_data(recipe="light", max_downscale=2.0), 2)
    assert any(not torch.equal(one["hr"], two["hr"]) for one, two in zip(plain, varied, strict=True))
    # without any augmentation a crop is a window of its photograph
    for batch in plain:
        for stem, crop in zip(batch["stem"], batch["hr"], strict=True):
            (path,) = photos.rglob(f"{stem}.png")
            whole = torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)
            windows = whole.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)
            assert (windows == crop.mul(255).round().byte()).flatten(2).all(2).any()


def test_usm_sharpens_the_target_and_only_once(make_data: Make, tmp_path: Path):
    from morsr.functional.corrupt import unsharp_mask

    (tmp_path / "sharp.yaml").write_text("sharpen: true\n")
    recipe = str(tmp_path / "sharp.yaml")
    plain, sharp = (batches(make_data(recipe=recipe, usm=usm), 1)[0] for usm in (False, True))
    torch.testing.assert_close(sharp["hr"], unsharp_mask(plain["hr"]))
    assert plain["parameters"].sharpen.all()
    assert not sharp["parameters"].sharpen.any()


def test_validation_and_test_batches(make_data: Make, photos: Path, tmp_path: Path):
    for folder, scale in (("LR", 1), ("HR", 4)):
        (tmp_path / "real" / folder).mkdir(parents=True)
        Image.fromarray(np.full((8 * scale, 12 * scale, 3), 99, np.uint8)).save(tmp_path / "real" / folder / "r.png")
    real = {"lr": str(tmp_path / "real/LR"), "hr": str(tmp_path / "real/HR")}
    absent = {"lr": "absent/LR", "hr": "absent/HR", "optional": True}
    data = make_data(val=[str(photos), real, absent], val_seeds=[5, 6], val_crop=48, recipe="light")
    data.setup("validate")
    found = [data.finish_batch(batch) for batch in data.val_dataloader()]
    assert len(found) == 15
    assert found[0]["stem"] == ["photo0_s5"]
    assert found[0]["set"] == ["photos"]
    assert (found[0]["hr"].shape, found[0]["lr"].shape) == ((1, 3, 48, 48), (1, 3, 12, 12))
    assert len(found[0]["parameters"]) == len(found[0]["key"]) == 1
    assert found[-1]["set"] == ["real"]
    assert "parameters" not in found[-1]
    torch.testing.assert_close(found[-1]["lr"], torch.full((1, 3, 8, 12), 99 / 255))

    with pytest.raises(InputError, match="there is none"):
        make_data(test=[{**absent, "optional": False}]).setup("test")


@pytest.mark.parametrize("use", ["validate", "test"])
def test_two_sources_of_one_name_are_refused(make_data: Make, photos: Path, tmp_path: Path, use: str):
    other = tmp_path / "other" / "photos"
    shutil.copytree(photos, other)
    absent = {"lr": "absent/photos/LR", "hr": "absent/photos/HR", "optional": True}
    twice = [str(photos), str(other)]
    with pytest.raises(ConfigError, match=r"two sources are called 'photos': .*name: N"):
        make_data(val=twice, test=twice, recipe="light").setup(use)
    for wrong in ({"lr": str(photos)}, {"path": str(photos)}):
        with pytest.raises(ConfigError, match="source: expected"):
            make_data(val=[wrong], test=[wrong]).setup(use)
    named = [str(photos), {"source": str(other), "name": "others"}, absent]
    data = make_data(val=named, test=named, test_seeds=[0], recipe="light")
    data.setup(use)
    loader = data.val_dataloader() if use == "validate" else data.test_dataloader()
    assert [batch["set"] for batch in loader] == [["photos"]] * 7 + [["others"]] * 7


def test_validation_images_may_have_a_recipe_of_their_own(make_data: Make, photos: Path):
    settings = {"val": [str(photos)], "val_crop": 48}
    data = make_data(recipe="realesrgan", val_recipe="light", **settings)
    data.setup("fit")
    alone = make_data(recipe="light", **settings)
    alone.setup("validate")
    (first, *_), (same, *_) = data.val_dataloader(), alone.val_dataloader()
    assert torch.equal(first["lr"], same["lr"])
    assert torch.equal(batches(data, 1)[0]["lr"], batches(make_data(recipe="realesrgan", **settings), 1)[0]["lr"])
    assert data.manifest()["recipe"]["validation"] == "light"


def test_batches_of_unequal_validation_images_are_refused(make_data: Make, photos: Path):
    data = make_data(val=[str(photos)], val_batch_size=7, recipe="light")
    with pytest.raises(ConfigError, match="val_batch_size"):
        list(data.val_dataloader())
    cropped = make_data(val=[str(photos)], val_batch_size=7, val_crop=32, recipe="light")
    (batch,) = [cropped.finish_batch(batch) for batch in cropped.val_dataloader()]
    assert batch["lr"].shape == (7, 3, 8, 8)
    assert len(batch["parameters"]) == 7


def test_predict_batches(make_data: Make, photos: Path):
    data = make_data(predict=[str(photos)])
    data.setup("predict")
    first = data.finish_batch(next(iter(data.predict_dataloader())))
    assert (first["stem"], first["lr"].shape) == (["photo0"], (1, 3, 64, 72))
    with pytest.raises(ConfigError, match="predict"):
        make_data().setup("predict")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 34}, "patch_size"),
        ({"crop_size": 64, "patch_size": 128}, "patch_size"),
        ({"dead_leaves": 1.5}, "dead_leaves"),
        ({"train": []}, "train"),
        ({"train": "photos"}, "lists of sources"),
        ({"crop_size": 30}, "crop_size"),
        ({"crop_size": 8}, "crop_size"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_downscale": 0.5}, "max_downscale"),
        ({"val_seeds": [1, 1]}, "val_seeds"),
        ({"test_seeds": []}, "test_seeds"),
        ({"val_crop": 8}, "val_crop"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_wrong_settings_are_refused(make_data: Make, settings: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        make_data(**settings)


def test_a_config_names_it_and_its_sources(tmp_path: Path):
    from lightning.pytorch.cli import LightningCLI

    config = tmp_path / "c.yaml"
    config.write_text(
        "data:\n  class_path: morsr.data.RealESRGANDataModule\n  init_args:\n"
        "    train: [photos, {source: more.csv, weight: 2.0}]\n    test: [{lr: a, hr: b, optional: true}]\n"
        "    dead_leaves: 0.25\n    engine: basicsr\n"
    )
    cli = LightningCLI(
        Recorder, L.LightningDataModule, subclass_mode_data=True, run=False, save_config_callback=None,
        args=["--config", str(config), "--data.batch_size=3", "--trainer.logger=false"],
    )  # fmt: skip
    assert isinstance(cli.datamodule, RealESRGANDataModule)
    assert cli.datamodule.train == ["photos", {"source": "more.csv", "weight": 2.0}]
    assert (cli.datamodule.batch_size, cli.datamodule.engine, cli.datamodule.synthetic) == (3, "basicsr", 0.25)


def test_the_manifest_follows_the_images(make_data: Make, photos: Path) -> None:
    data = make_data()
    data.setup("fit")
    first = data.manifest()
    assert first["train"]["images"] == 7
    assert first["recipe"]["hash"]
    (photos / "photo0.png").rename(photos / "other.png")
    renamed = make_data()
    renamed.setup("fit")
    assert renamed.manifest()["train"]["digest"] != first["train"]["digest"]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_nothing_to_validate_or_test_is_an_error(make_data: Make, tmp_path: Path, stage: str):
    absent = {"lr": str(tmp_path / "LR"), "hr": str(tmp_path / "HR"), "optional": True}
    data = make_data(val=[absent], test=[absent])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    model = Recorder()
    model.test_step = model.validation_step  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"data\.(val|test): expected at least one set of images"):
        getattr(trainer, stage)(model, data, verbose=False)
    fit(data, tmp_path, steps=1)  # a training goes on without


def test_several_devices_count_every_validation_image_once(make_data: Make, photos: Path):
    data = make_data(val=[str(photos)], recipe="light")
    data.trainer = SimpleNamespace(world_size=2, state=SimpleNamespace(fn=None), global_rank=0)  # type: ignore[assignment]
    pairs = data.val_dataloader().dataset  # type: ignore[union-attr]
    shares = [list(DistributedSampler(pairs, num_replicas=2, rank=rank, shuffle=False)) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4], "devices wait for each other after every batch"
    seen = [[collate_pairs([pairs[place]]) for place in share] for share in shares]
    counted = [batch["stem"][0] for share in seen for batch in share if not any(batch.get("repeated", ()))]
    assert len(set(counted)) == len(counted) == 7
    assert [batch.get("repeated") for batch in seen[1]] == [None, None, None, [True]]
    assert len(list(pairs)) == 8
