"""The command line in-process: every config runs, and what a user gets wrong is one line."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from restorer_twins import photo
from safetensors.torch import load_file
from training_twins import Pairs

from morsr.cli import main
from morsr.models.bases import load_base
from morsr.training.config_files import read_config

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
CONFIGS = sorted(str(path.relative_to(EXPERIMENTS)) for path in EXPERIMENTS.rglob("*.yaml"))
# One of each kind of run; the others differ from one of them in a few numbers.
KINDS = ("tiny/pisasr.yaml", "sd21/mor_16gb.yaml", "base/tiny_autoencoder.yaml",
         "base/tiny_diffusion.yaml", "estimator/learned.yaml")  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    for index in range(3):
        photo(tmp_path / "photos" / f"{index}.png", (80, 96))
    return tmp_path / "photos"


def arguments(name: str, base: Path, photos: Path, out: Path, steps: int = 0) -> list[str]:
    """A config on small images and the small base: a fast_dev_run, or so many real steps without validation.

    It is given as one text, which is parsed once; every override on a command line costs another pass.
    """
    settings = read_config(EXPERIMENTS / name)
    kind, model = settings["model"]["class_path"].rpartition(".")[2], settings["model"]["init_args"]
    data, trainer = settings["data"]["init_args"], settings["trainer"]
    trainer |= {"default_root_dir": str(out), "accelerator": "cpu", "precision": "32-true"}
    if steps:
        trainer |= {"max_steps": steps, "limit_val_batches": 0, "val_check_interval": None, "log_every_n_steps": 1}
        trainer |= {"enable_progress_bar": False}
        trainer["logger"]["init_args"]["save_dir"] = str(out)
    else:
        trainer["fast_dev_run"] = 1
    data |= {"train": [str(photos)], "val": [str(photos)], "batch_size": 2, "num_workers": 0, "val_multiple": 16}
    data["crop_size"] = 64 if kind == "LearnedEstimatorTraining" else 32
    if kind in ("OneStepSRModule", "WholeModel"):
        trainer["strategy"] = "auto"
        model |= {"base": str(base), "calibration_images": 4, "losses": from_the_start(model["losses"])}
        model["adapters"]["targets"] = ["sd_unet@unet", "tiny_vae_encoder@vae"]
        model["accumulate"] = min(2, model.get("accumulate", 1))
        if "patch_size" in data:
            data["patch_size"] = 16  # windows of the small crops that the tests degrade
        # Adapters of another base, and CLIP's weights, which are not here.
        model |= {"start_from": None} if "start_from" in model else {}
        model |= {"estimator": "frequency"} if model.get("estimator") == "clip" else {}
    elif kind != "LearnedEstimatorTraining":
        model |= {"out": f"{out}/base"} | ({"base": str(base)} if kind == "DiffusionTraining" else {})
    return ["fit", "--config", yaml.safe_dump(settings)]


def from_the_start(loss: dict[str, Any]) -> dict[str, Any]:
    """The terms of a config without LPIPS, whose weights are not here, and without the wait before their start."""
    extra = loss.get("extra", {})
    if "imagenet" in extra:  # Lite1 and Lite2 are not installed with the tests
        extra["imagenet"]["init_args"]["sizes"] = [0]
    terms = {name: value and {**value, "start": 0, "ramp": 0} for name, value in loss.items() if name != "extra"}
    return {**terms, "lpips": None, **({"extra": extra} if extra else {})}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in CONFIGS]
)
def test_a_config_trains_and_a_fast_dev_run_writes_nothing(name, small_base, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)  # where configs name their recipes from
    before = set(tmp_path.rglob("*"))
    assert main(arguments(name, small_base, photos, tmp_path / "out")) == 0
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_what_it_is_for(name):
    settings = read_config(EXPERIMENTS / name)
    lines = (EXPERIMENTS / name).read_text().splitlines()
    assert [line.partition(": ")[0] for line in lines[:3]] == ["# Purpose", "# Cost", "# Reaches"]
    assert re.search(r"measured|estimated", lines[1])
    losses = settings["model"]["init_args"].get("losses") or {}
    if any(losses.get(name) for name in ("lpips", "features", "vsd", "gan", "csd")):  # PSNR likes these runs' start
        keep = [one for one in settings["trainer"]["callbacks"] if one["class_path"].endswith(".AdapterCheckpoint")]
        assert [one["init_args"]["monitor"] for one in keep] == [None]


def test_a_base_phase_resumes_by_the_command_line_alone(small_base, photos, tmp_path):
    """Settings come from the config and the command line, never from the checkpoint, and the result is the same."""
    options = arguments("base/tiny_diffusion.yaml", small_base, photos, tmp_path / "out", 2)
    options += ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint"]
    options += ["--trainer.callbacks.every_n_train_steps=1"]
    assert main([*options, f"--model.out={tmp_path}/straight"]) == 0
    assert main([*options, f"--model.out={tmp_path}/old", "--trainer.max_steps=1", "--model.schedule=constant"]) == 0
    (checkpoint,) = (tmp_path / "out" / "base_tiny_diffusion" / "version_1").rglob("*.ckpt")
    stored = torch.load(checkpoint, weights_only=True)
    assert "hyper_parameters" not in stored
    forged = {"_class_path": "lightning.pytorch.demos.boring_classes.BoringModel", "out": str(tmp_path / "old")}
    torch.save({**stored, "hyper_parameters": forged}, checkpoint)
    before = (tmp_path / "old" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert main([*options, f"--model.out={tmp_path}/new", f"--ckpt_path={checkpoint}"]) == 0
    assert (tmp_path / "old" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    base, straight, new = (load_base(place) for place in (small_base, tmp_path / "straight", tmp_path / "new"))
    assert new.base_id == base.base_id
    assert (new.unet.conv_in.weight - base.unet.conv_in.weight).abs().max() > 0
    torch.testing.assert_close(new.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_a_resume_with_nothing_left_to_do_says_so(small_base, photos, tmp_path, caplog):
    options = arguments("tiny/mor.yaml", small_base, photos, tmp_path / "out", 1)
    assert main([*options, "--ckpt_path=last"]) == 0  # none yet: from the start
    assert "Nothing left to do" not in caplog.text
    keep = "--trainer.callbacks=[{class_path: morsr.training.callbacks.AdapterCheckpoint}]"  # no closing message
    assert main([*options, "--ckpt_path=last", keep]) == 0
    assert "Nothing left to do at step 1" in caplog.text
    first, second = sorted((tmp_path / "out").rglob("adapters.safetensors"))
    torch.testing.assert_close(load_file(second), load_file(first), rtol=0, atol=0)


class Shared(Pairs):
    """A data module of one's own with an argument that the config's has too, of another type."""

    def __init__(self, batch_size: int = 1, side: int = 32) -> None:
        super().__init__()


def test_a_data_module_may_share_settings_with_the_configs(small_base, photos, tmp_path):
    options = arguments("tiny/mor.yaml", small_base, photos, tmp_path / "out", 1)
    assert main([*options, f"--data={__name__}.Shared"]) == 0


def test_a_run_with_a_name_goes_on(small_base, photos, tmp_path, caplog):
    options = arguments("tiny/mor.yaml", small_base, photos, tmp_path / "out", 1)
    options += ["--trainer.logger.init_args.version=first", "--ckpt_path=last"]
    for _ in range(2):
        assert main(options) == 0
    assert "Nothing left to do at step 1" in caplog.text


# options, and what the one line names; those that a parser refuses alone are in tests/commands/test_slips.py
CALLBACK = "--trainer.callbacks+=lightning.pytorch.callbacks"
REFUSED = [
    (["--model.base=/nowhere/at/all"], "/nowhere/at/all"),
    (["--data.train=[empty]"], "empty"),
    (["--trainer.gradient_clip_val=1.0"], "model.clip"),
    (["--trainer.precision=bf16-true"], "bf16-mixed"),
    (["--trainer.strategy=ddp_spawn"], "ddp_spawn"),
    ([f"{CALLBACK}.BatchSizeFinder"], "BatchSizeFinder"),
    ([f"{CALLBACK}.ModelCheckpoint", "--trainer.callbacks.train_time_interval=00:00:05:00"], "every_n_train_steps"),
    (["--trainer.logger=lightning.pytorch.loggers.logger.DummyLogger"], "TensorBoardLogger"),
    ([f"{CALLBACK}.ModelCheckpoint", "--trainer.callbacks.monitor=val/psnr",
      "--trainer.callbacks.every_n_train_steps=4"], "every_n_train_steps"),
    ([f"{CALLBACK}.ModelCheckpoint", "--trainer.callbacks.filename={val/psnr}",
      "--trainer.callbacks.train_time_interval=00:00:05:00"], "train_time_interval"),
    (["--optimizer=Adam", "--optimizer.lr=0.01"], "model.lr"),
    (["--seed_everything=-5"], "seed"),
    (["--model.estimator=morsr.estimators.Absent"], "Absent"),
    (["--model.optimizers={judge: {class_path: torch.optim.Adam, init_args: {lr: 0.1}}}"], "judge"),
    (["--ckpt_path=best"], "best"),
    (["--ckpt_path=absent.ckpt"], "absent.ckpt"),
    (["--ckpt_path=half.ckpt"], "half.ckpt"),
    (["--ckpt_path=weights.ckpt", "--model.base=/nowhere"], "weights.ckpt"),
]  # fmt: skip


@pytest.mark.parametrize(("extra", "word"), REFUSED, ids=[extra[0] for extra, _ in REFUSED])
def test_what_a_run_refuses_is_one_line_and_leaves_no_folder(extra, word, small_base, photos, tmp_path, capsys):
    Path("empty").mkdir()
    torch.save({"state_dict": {"x": torch.zeros(1000)}, "global_step": 3}, "weights.ckpt")
    Path("half.ckpt").write_bytes(Path("weights.ckpt").read_bytes()[:2000])
    out = tmp_path / "out"
    code = main([*arguments("tiny/mor.yaml", small_base, photos, out, 1), *extra])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("morsr: ")]
    assert code == 2
    assert word in line
    assert not list(out.glob("mor_tiny/*"))


def test_null_removes_a_loss_term_on_the_command_line(capsys):
    config = str(EXPERIMENTS / "sd21/mor.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", config, "--model.losses.gan=null", "--model.losses.vsd.start=7", "--print_config"])
    assert stop.value.code == 0
    losses = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["losses"]
    assert losses["gan"] is None
    before = read_config(EXPERIMENTS / "sd21/mor.yaml")["model"]["init_args"]["losses"]
    assert losses["vsd"].items() >= {**before["vsd"], "start": 7}.items()
    assert losses["lpips"]["weight"] == before["lpips"]["weight"]
