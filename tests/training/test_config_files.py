"""Configs that extend one another."""

from pathlib import Path

import pytest

from morsr.errors import ConfigError
from morsr.training.config_files import expand_configs, read_config


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_child_changes_what_it_names_and_keeps_the_rest(tmp_path):
    write(
        tmp_path,
        parent="a: 1\nmodel: {class_path: x.Y, init_args: {lr: 1, loss: {l2: 1, vsd: 2}, names: [p, q]}}\n",
        child="extends: parent.yaml\nmodel: {init_args: {loss: {vsd: 0}, names: [r]}}\n",
    )
    assert read_config(tmp_path / "child.yaml") == {
        "a": 1,
        "model": {"class_path": "x.Y", "init_args": {"lr": 1, "loss": {"l2": 1, "vsd": 0}, "names": ["r"]}},
    }


def test_another_class_takes_nothing_over(tmp_path):
    write(
        tmp_path,
        parent="model: {class_path: x.Y, init_args: {lr: 1}}\n",
        child="extends: parent.yaml\nmodel: {class_path: x.Z, init_args: {width: 2}}\n",
    )
    assert read_config(tmp_path / "child.yaml")["model"] == {"class_path": "x.Z", "init_args": {"width": 2}}


@pytest.mark.parametrize("parent", ["nowhere", "one"])
def test_a_missing_parent_and_a_circle_are_named(parent, tmp_path):
    write(tmp_path, one="extends: two.yaml\n", two=f"extends: {parent}.yaml\n")
    with pytest.raises(ConfigError, match=rf"{parent}\.yaml"):
        read_config(tmp_path / "one.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    write(tmp_path, parent="\ufeffa: 1\n", child="\ufeffextends: parent.yaml\nb: 2\n")
    assert expand_configs(["fit", "--config", str(tmp_path / "child.yaml")]) == ["fit", "--config=a: 1\nb: 2\n"]


def test_a_file_that_is_no_text_is_one_line(tmp_path):
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"# caf\xe9\nextends: parent.yaml\n")
    for read in (read_config, lambda path: expand_configs(["fit", f"--config={path}"])):
        with pytest.raises(ConfigError, match=r"last.ckpt: expected a YAML config in UTF-8") as error:
            read(path)
        assert "\n" not in str(error.value)
