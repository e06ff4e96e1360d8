"""A model saved as a folder comes back the same: from the folder, from a hub, as a restorer and as a pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import cached
from torch import Tensor

from morsr import Restorer
from morsr.adapters import read_adapters_header, save_adapters
from morsr.errors import ConfigError, InputError, WeightsError
from morsr.estimators import build_estimator
from morsr.estimators.learned import DegradationNet, save_net
from morsr.models.bases import load_base
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.models.loading import load_generator


def same_image(one: Restorer, other: Restorer, lr: Tensor) -> None:
    expected = one(lr)
    assert expected.std() > 0.01
    torch.testing.assert_close(other(lr), expected, atol=0, rtol=0)


def test_round_trip_of_a_folder_that_holds_its_base(generator, lr):
    """A base known by its place on this machine only goes along, so that the folder can be moved."""
    restorer = Restorer(generator, device="cpu")
    assert restorer.save_pretrained("model") == Path("model")
    shutil.move("model", "moved")
    generator.base.source = "gone"
    loaded = Restorer.from_pretrained("moved", device="cpu")
    same_image(restorer, loaded, lr)
    loaded.save_pretrained("again")
    same_image(restorer, Restorer.from_pretrained("again", device="cpu"), lr)
    with pytest.raises(ConfigError, match="made for"):
        load_generator("moved", base="tiny")


def test_a_preset_is_named_and_not_copied():
    restorer = Restorer.from_pretrained("tiny", device="cpu")
    restorer.save_pretrained("model")
    held = {path.name for path in Path("model").iterdir()}
    assert held == {"adapters.safetensors", "config.json"}
    described = json.loads(Path("model/config.json").read_text())
    assert (described["base"], described["library_name"]) == ("tiny", "morsr")
    same_image(restorer, Restorer.from_pretrained("model", device="cpu"), torch.rand(1, 3, 8, 8))
    restorer.save_pretrained("whole", include_base=True)
    assert load_base("whole/base").base_id == "morsr/tiny"
    same_image(restorer, Restorer.from_pretrained("whole", device="cpu"), torch.rand(1, 3, 8, 8))


def test_without_adapters_and_over_an_earlier_save(generator, small_base, lr):
    Restorer(generator, device="cpu").save_pretrained("model")
    bare = Restorer(OneStepGenerator(load_base(small_base), one_step=OneStepConfig(timestep=90)), device="cpu")
    bare.save_pretrained("model")
    assert not Path("model/adapters.safetensors").exists()
    loaded = Restorer.from_pretrained("model", device="cpu")
    assert loaded.generator.one_step.timestep == 90
    same_image(bare, loaded, lr)


def test_a_decoder_of_release_0_1_is_refused(generator, adapters_file):
    """Another decoder than the training's would give another image."""
    Restorer(generator, device="cpu").save_pretrained("model")
    edit = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps({**edit, "decoder": "decoder"}))
    extra = {**(read_adapters_header(adapters_file)["extra"] or {}), "decoder": "other"}
    save_adapters("old.safetensors", generator.base, base_id="morsr/test", extra=extra)
    for model in ("model", "old.safetensors"):
        with pytest.raises(WeightsError):
            load_generator(model)


def test_files_of_the_estimator_go_along(small_base, lr, tmp_path):
    save_net(tmp_path / "net.safetensors", DegradationNet(hidden=8))
    estimator = build_estimator("learned", weights=tmp_path / "net.safetensors")
    restorer = Restorer(OneStepGenerator(load_base(small_base), estimator), device="cpu")
    restorer.save_pretrained("model")
    expected = estimator(lr).scores
    (tmp_path / "net.safetensors").unlink()
    shutil.move("model", "moved")
    loaded = load_generator("moved")
    torch.testing.assert_close(loaded.estimator(lr).scores, expected)


def test_hub_id(generator, lr, tmp_path):
    restorer = Restorer(generator, device="cpu")
    restorer.save_pretrained("model")
    cached(tmp_path / "cache", "someone/mor", Path("model"))
    generator.one_step = OneStepConfig(timestep=70)
    restorer.save_pretrained("other")
    cached(tmp_path / "cache", "someone/mor", Path("other"), revision="v2")
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    second = Restorer.from_pretrained("someone/mor", device="cpu", revision="v2", **where)
    same_image(restorer, second, lr)
    assert Restorer.from_pretrained("someone/mor", device="cpu", **where).generator.one_step.timestep == 150
    with pytest.raises(WeightsError, match="someone/absent: no such file or folder here"):
        Restorer.from_pretrained("someone/absent", device="cpu", **where)


def test_what_cannot_be_saved_or_loaded(generator, small_base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder"):
        Restorer(generator, device="cpu").save_pretrained(tmp_path / "file")
    bare = OneStepGenerator(load_base(small_base))
    bare.base.source = None
    Restorer(bare, device="cpu").save_pretrained("model")
    content = json.loads(Path("model/config.json").read_text())
    for damage in ({"library_name": "other"}, {"estimator": "learned"}, {"estimator": {"kind": "learned"}}):
        Path("model/config.json").write_text(json.dumps(content | damage))
        with pytest.raises(WeightsError, match="not the description"):
            load_generator("model")
    for one_step in ({"timestep": "x"}, {"timestep": 1.5}):
        Path("model/config.json").write_text(json.dumps(content | {"one_step": one_step}))
        with pytest.raises(WeightsError, match="description cannot be read"):
            load_generator("model")
    Path("model/config.json").write_text("{")
    with pytest.raises(WeightsError, match="not the description"):
        load_generator("model")
    Path("model/config.json").unlink()
    with pytest.raises(WeightsError, match=r"adapters\.safetensors: no such adapters file"):
        load_generator("model")
