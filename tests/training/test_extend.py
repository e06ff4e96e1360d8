"""docs/extend.md: its classes are written to a file, named by its options, and trained with for a step."""

import re
from pathlib import Path

from training_twins import run_options

from morsr.adapters import read_adapters_header
from morsr.cli import main
from morsr.models.bases import load_base

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
CLASSES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
OPTIONS = [line for block in re.findall(r"```\n(--.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def test_every_class_of_the_page_trains_and_restores(tmp_path, capsys):
    Path("mine.py").write_text("\n\n".join(CLASSES[:-1]))
    load_base("tiny").save("my_base")
    assert len(OPTIONS) == 9
    one_step = run_options("tiny/mor.yaml", "tiny", max_steps=1, default_root_dir=str(tmp_path / "out"))
    settings = ["--model.adapters.targets=[sd_unet@unet, tiny_vae_encoder@vae]", "--data.batch_size=2"]
    assert main([*one_step, *settings, *OPTIONS]) == 0
    (file,) = tmp_path.rglob("adapters*.safetensors")
    held = {path.name for path in file.parent.iterdir()}
    assert {"config.yaml", "metrics.csv", "versions.json", "summary.json"} <= held
    header = read_adapters_header(file)
    assert header["condition_names"] == ["darkness", "contrast"]
    assert header["extra"]["estimator"]["kind"] == "mine.Darkness"
    assert header["extra"]["router"] == "mine.Worst"
    restore = ["upscale", "sample:chelsea", "out.png", f"--model={file}"]
    for option in ("--estimator=mine.Darkness", "--base=mine.MyBase", "--router=mine.Worst"):
        assert main(restore) == 2
        assert option.replace("=", " ") in capsys.readouterr().err
        assert main([*restore, option.replace(option[option.index(".") :], ".Head")]) == 2
        assert "subclass" in capsys.readouterr().err
        restore.append(option)
    assert main(restore) == 0


def test_a_data_module_of_the_page_trains(small_base, tmp_path):
    Path("mine.py").write_text("\n\n".join(CLASSES[:-1]))
    one_step = run_options("tiny/mor.yaml", small_base, max_steps=1, default_root_dir=str(tmp_path / "out"))
    assert main([*one_step, "--data=mine.Pairs"]) == 0
