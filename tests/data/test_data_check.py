"""`morsr data-check` names what is missing, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from morsr.cli import main
from morsr.data.images import list_images
from morsr.errors import ConfigError

Settings = dict[str, object]


@pytest.fixture
def config(tmp_path: Path):
    def write(class_path: str = "morsr.data.RealESRGANDataModule", **settings: object) -> str:
        init = {"crop_size": 32, "val_multiple": 16, "cache_dir": str(tmp_path / "cache"), **settings}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"class_path": class_path, "init_args": init}}))
        return str(tmp_path / "c.yaml")

    return write


def test_complete_data(config, photos: Path, capsys: pytest.CaptureFixture[str]):
    absent = {"lr": "absent/LR", "hr": "absent/HR", "optional": True, "name": "real"}
    path = config(train=[str(photos)], val=[str(photos)], test=["skimage:eval", absent], dead_leaves=0.5)
    assert main(["data-check", "--config", path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "everything is there"
    assert any(line.split()[:2] == ["ok", "train"] and "7 images" in line for line in lines)
    assert any(line.split()[:3] == ["absent", "test", "real:"] for line in lines)


def test_every_missing_thing_is_named(config, photos: Path, capsys: pytest.CaptureFixture[str]):
    (photos / "photo2.png").write_bytes(b"damaged")
    path = config(
        train=[str(photos), "nowhere"], val=[{"lr": "a", "hr": "b"}], test=[str(photos)], crop_size=68,
        recipe="unheard", val_recipe="unseen",
    )  # fmt: skip
    assert main(["data-check", "--config", path]) == 1
    output = capsys.readouterr().out
    missing = [line for line in output.splitlines() if line.startswith("MISSING")]
    assert len(missing) == 5
    assert all(
        any(name in line for line in missing)
        for name in ("nowhere", "too small for crops of 68", "unheard", "unseen", "a: ")
    )
    assert "7 images; 1 of 7 looked at will be passed over" in output
    assert output.endswith("5 missing\n")


@pytest.mark.parametrize(
    "override",
    [["--data.train=[nowhere]"], ["--data.init_args.train=[nowhere]"], ["--data.train", "[nowhere]"]],
    ids=["as one", "by init_args", "as two"],
)
def test_overrides_count_as_in_a_run(override: list[str], config, photos: Path, capsys: pytest.CaptureFixture[str]):
    path = config(train=[str(photos)], test=[str(photos)])
    assert main(["data-check", "--config", path, "--model.lr=1e-3", *override, "--trainer.max_steps", "5"]) == 1
    missing = [line for line in capsys.readouterr().out.splitlines() if line.startswith("MISSING")]
    assert len(missing) == 1
    assert "nowhere" in missing[0]


@pytest.mark.parametrize("wrong", ["--dat.train=[x]", "--data.trian=[x]", "x", "--data.train"])
def test_what_overrides_nothing_is_an_error(wrong: str, config, photos: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data-check", "--config", config(train=[str(photos)]), wrong]) == 2
    assert wrong.lstrip("-").partition("=")[0].rpartition(".")[2] in capsys.readouterr().err


@pytest.fixture
def pairs(tmp_path: Path) -> dict[str, str]:
    """Three pairs whose HR images are of 48x32, 52x32 and 56x32 pixels."""
    for folder, scale in (("LR", 1), ("HR", 4)):
        (tmp_path / "real" / folder).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (scale * (12 + number), scale * 8)).save(tmp_path / "real" / folder / f"{number}.png")
    return {"lr": str(tmp_path / "real/LR"), "hr": str(tmp_path / "real/HR")}


def check(path: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["data-check", "--config", path])
    return code, capsys.readouterr().out


def test_pairs_that_are_too_small_for_crops_are_missing(config, pairs, capsys: pytest.CaptureFixture[str]):
    settings = {"train": [pairs], "val": [pairs], "test": []}
    assert check(config(**settings, crop_size=32), capsys)[0] == 0
    code, output = check(config(**settings, crop_size=36), capsys)
    assert code == 1
    (line,) = [line for line in output.splitlines() if line.startswith("MISSING")]
    assert "none of 3 pairs looked at can be used" in line
    assert "48x32 pixels, too small for crops of 36" in line
    assert "val      real: 3 pairs" in output, "validation pairs are taken whole"


def test_no_training_source_at_all_is_missing(config, photos: Path, capsys: pytest.CaptureFixture[str]):
    absent = {"lr": "absent/LR", "hr": "absent/HR", "optional": True, "name": "real"}
    code, output = check(config(train=[absent], test=[]), capsys)
    assert code == 1
    assert "MISSING train    sources: none of the optional ones is there" in output
    assert check(config(train=[absent], test=[], dead_leaves=1.0), capsys)[0] == 0
    assert check(config(train=[absent, str(photos)], test=[]), capsys)[0] == 0


@pytest.mark.parametrize("use", ["train", "val", "test"])
def test_damaged_pairs_are_counted_and_missing_if_none_is_left(
    config, pairs, photos: Path, use: str, capsys: pytest.CaptureFixture[str]
):
    settings = {"train": [str(photos)], "test": [], use: [pairs]}
    (Path(pairs["lr"]) / "1.png").write_bytes(b"")
    code, output = check(config(**settings), capsys)
    assert code == 0
    assert "real: 2 pairs; 1 of 3 cannot be read and will be passed over: " in output
    for number in (0, 2):
        (Path(pairs["hr"]) / f"{number}.png").write_bytes(b"")
    code, output = check(config(**settings), capsys)
    assert code == 1
    assert "real: none of 3 pairs can be used; the first: " in output


def test_two_sources_of_one_name_are_missing(config, photos: Path, capsys: pytest.CaptureFixture[str]):
    code, output = check(config(train=[str(photos)], test=[str(photos), str(photos)]), capsys)
    assert code == 1
    assert "MISSING test     names: two sources are called 'photos'" in output


@pytest.mark.parametrize(
    ("class_path", "settings", "message"),
    [
        ("morsr.data.RealESRGANDataModule", {"crop": 3}, "does not accept option 'crop'"),
        ("some.OtherModule", {}, "OtherModule"),
        ("morsr.data.RealESRGANDataModule", {"dead_leaves": 3}, "dead_leaves"),
    ],
)
def test_wrong_configs(config, class_path: str, settings: Settings, message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["data-check", "--config", config(class_path, **settings)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": "wide"}, "data.crop_size\": Expected a <class 'int'>. Got value: wide"),
        ({"crop_size": True}, "data.crop_size\": Expected a <class 'int'>. Got value: True"),
        ({"dead_leaves": [1]}, "data.dead_leaves\": Expected a <class 'float'>"),
        ({"val": None}, "are lists of sources"),
        ({"val": [None]}, 'data.val"'),
        ({"val_seeds": 3}, 'data.val_seeds"'),
        ({"train": [3]}, 'data.train"'),
        ({"train": [["photos"]]}, 'data.train"'),
        ({"train": "photos"}, 'data.train"'),
        ({"recipe": {}}, "data.recipe\": Expected a <class 'str'>"),
        ({"engine": "cuda"}, 'data.engine"'),
        ({3: 4}, "Key must be a string, got: 3"),
    ],
)
def test_settings_of_the_wrong_kind(config, settings: Settings, message: str, capsys: pytest.CaptureFixture[str]):
    Path(path := config()).write_text(
        yaml.safe_dump({"data": {"class_path": "morsr.data.RealESRGANDataModule", "init_args": settings}})
    )
    assert main(["data-check", "--config", path]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": [{"lr": 3, "hr": 4}]}, "expected {lr, hr, name, optional} with two folders, got {"),
        ({"train": [{"source": "a.csv", "root": 3}]}, "a.csv: expected a folder as root, got 3"),
    ],
)
def test_sources_without_a_path(config, settings: Settings, message: str, capsys: pytest.CaptureFixture[str]):
    code, output = check(config(**settings), capsys)
    assert code == 1
    assert any(line.startswith("MISSING train") and message in line for line in output.splitlines()), output


def test_numbers_written_as_text_are_taken_as_a_run_takes_them(config, photos: Path, capsys):
    assert (
        check(config(train=[str(photos)], test=[], crop_size="32", dead_leaves="1e-1", val_seeds=["1"]), capsys)[0] == 0
    )


def test_settings_that_are_no_mapping(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "c.yaml").write_text("data: {class_path: RealESRGANDataModule, init_args: [a]}")
    assert main(["data-check", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "data.init_args: expected a mapping of settings, got ['a']" in capsys.readouterr().err


@pytest.mark.parametrize("source", [3, ["photos"], None])
def test_a_source_of_another_kind_is_refused(source):
    with pytest.raises(ConfigError, match="expected a path or"):
        list_images(source)


def test_unreadable_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["data-check", "--config", str(tmp_path / "none.yaml")]) == 2
    (tmp_path / "c.yaml").write_text("data: [1, 2")
    assert main(["data-check", "--config", str(tmp_path / "c.yaml")]) == 2
    (tmp_path / "c.yaml").write_text("model: x")
    assert main(["data-check", "--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_shipped_configs_name_settings_that_exist(repo_root: Path):
    import inspect

    from morsr.commands.data_check import read_data_settings
    from morsr.data.datamodule import RealESRGANDataModule

    known = inspect.signature(RealESRGANDataModule).parameters
    for path in sorted((repo_root / "experiments").glob("*.yaml")):
        if not path.name.startswith("predict"):  # that one takes files as they are
            assert set(read_data_settings(str(path))) <= set(known), path.name
