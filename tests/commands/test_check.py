"""`morsr check` says in one answer what a run lacks, and reads nothing large."""

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from morsr.cli import main

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_everything_that_is_missing_is_in_one_answer(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(Path("hub").absolute()))
    Path("run.yaml").write_text(yaml.safe_dump({"extends": str(EXPERIMENTS / "sd21/mor.yaml")}))
    Path("empty").mkdir()
    overrides = ["--model.start_from=lost.safetensors", "--model.weights=empty", "--model.val_metrics=[psnr, lpips]"]
    table = "--trainer.callbacks+=morsr.evaluation.callback.BenchmarkTable"
    overrides += [table, "--trainer.callbacks.metrics=[musiq]"]
    assert main(["check", "run.yaml", "--data.train=[nowhere]", "--data.val=[]", "--data.test=[]", *overrides]) == 1
    said = lines(capsys)
    for words in ("model.base", "model.estimator", "vgg16", "lost.saf", "file empty", "lpips", "musiq", "nowhere"):
        assert any(line.startswith("missing") and words in line for line in said), words
    assert said[-1] == f"run.yaml: {len(said) - 1} missing"


def test_overrides_are_those_of_a_run(capsys):
    Path("photos").mkdir()
    Image.new("RGB", (512, 512)).save("photos/a.png")
    config = str(EXPERIMENTS / "tiny/mor.yaml")
    assert main(["check", config, "--data.train=[photos]", "--trainer.max_steps", "5"]) == 0
    assert lines(capsys) == [f"{config}: ready"]
    assert main(["check", config, "--data.train=[lost]"]) == 1
    capsys.readouterr()
    assert main(["check", config, "--model.estimator=mine.Nope", "--ckpt_path=lost.ckpt"]) == 1
    assert [line.split()[1] for line in lines(capsys)[:-1]] == ["model.estimator:", "ckpt_path:"]
    assert main(["check", config, "--model.base=random:nope"]) == 1
    assert main(["check", config, "--seed_everything=3"]) == 0
    assert main(["check", config, "--model.losses.extra.edge=null"]) == 0
    assert main(["check", config, "--data.trian=[photos]"]) == 2
    assert "data.trian" in capsys.readouterr().err


def test_the_schema_knows_the_shipped_configs(capsys):
    jsonschema = pytest.importorskip("jsonschema")
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    validator = jsonschema.Draft202012Validator(schema)
    for path in sorted(EXPERIMENTS.rglob("*.yaml")):
        wrong = [error.message[:100] for error in validator.iter_errors(yaml.safe_load(path.read_text()))]
        assert not wrong, f"{path.name}: {wrong}"
    config = yaml.safe_load((EXPERIMENTS / "tiny/mor.yaml").read_text())
    config["model"]["init_args"]["adapters"]["topk"] = 3
    assert list(validator.iter_errors(config))
