"""Slips in configs and overrides: one line of at most 160 characters that names the setting, the value and a remedy."""

from pathlib import Path

import lightning  # noqa: F401  its log handler keeps the stderr that it finds when it is imported
import pytest
import yaml

from morsr.cli import main

CONFIG = str(Path(__file__).resolve().parents[2] / "experiments" / "tiny/mor.yaml")

# arguments, and what the line must name: the setting, the value, the remedy
SLIPS = [
    (["--model.adapters.topk=4"], ["model.adapters.topk", "top_k"]),
    (["--model.adapters.top_k=four"], ["model.adapters.top_k", "four", "whole number"]),
    (["--model.adapters={topk: 4}"], ["model.adapters", "topk", "top_k"]),
    (["--model.lr=fast"], ["model.lr", "fast", "a number"]),
    (["--model.adapter.top_k=4"], ["model.adapter", "adapters"]),
    (["model.lr=1"], ["model.lr", "--model.lr"]),
    (["--model.lr"], ["model.lr", "--model.lr=VALUE"]),
    (["--model.adapters.targets=unet"], ["model.adapters.targets", "unet", "a list"]),
    (["--model.losses.l2=much"], ["model.losses.l2", "much", "settings of Weight"]),
    (["--model.losses.gna.start=7"], ["model.losses.gna", "did you mean gan?"]),
    (["--model.losses.extra.edge=morsr.estimators.Absent"], ["model.losses.extra", "morsr.estimators", "Absent"]),
    (["--model.losses.l2.weight=-0.5"], ["model.losses.l2.weight", "-0.5", "at least 0"]),
    (["--model.one_step.parametrization=x0"], ["model.one_step.parametrization", "x0", "epsilon"]),
    (["--model.router=absent.Sharp"], ["model.router", "absent.Sharp", "{here}"]),
    (["--trainer.precision=16bit"], ["trainer.precision", "16bit", "16-mixed"]),
    (["--trainer.devices=two"], ["devices", "two", "int > 0"]),
    (["--trainer.max_step=20"], ["trainer.max_step", "trainer.max_steps"]),
    (["--trainer.max_steps=many"], ["trainer.max_steps", "many", "whole number"]),
    (["--trainer.callbacks+=morsr.training.callbacks.ImageGrit"], ["ImageGrit", "ImageGrid"]),
    (["--data.batchsize=3"], ["data.batchsize", "batch_size"]),
    (["--data=absent.Data"], ["data", "absent.Data", "{here}"]),
    (["--model=pathlib.Path"], ["model", "pathlib.Path", "LightningModule"]),
    (["--dat.train=[x]"], ["--dat.train", "data"]),
    (["--seed_everything=many"], ["seed", "many"]),
    (["--confg", "x.yaml"], ["--confg", "--config"]),
    (["--config=nowhere.yaml"], ["nowhere.yaml"]),
    (["extra"], ["extra"]),
    (["--data.recipe=realersgan"], ["recipe", "realersgan", "realesrgan"]),
]


@pytest.mark.parametrize(("extra", "words"), SLIPS, ids=[extra[0] for extra, _ in SLIPS])
def test_a_slip_is_one_short_line(extra, words, capsys):
    assert main(["fit", "--config", CONFIG, *extra]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert len(said) <= 167
    here = str(Path.cwd())[:12]
    for word in words:
        assert (here if word == "{here}" else word) in said
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data:\n  init_args:\n    batch_size: [1\n", ["wrong.yaml", "line 4"]),
        ("modell:\n  lr: 1\n", ["modell", "did you mean model?"]),
        ("- a\n", ["wrong.yaml", "mapping", "['a']"]),
        ("hello", ["wrong.yaml", "mapping", "hello"]),
        ("", ["wrong.yaml", "mapping"]),
        (f"extends: {CONFIG}\nmodel: {{init_args: {{adapters: {{num_rank: 3}}}}}}\n",
         ["model.adapters.num_rank: unknown setting; did you mean num_ranks?"]),
    ],
)  # fmt: skip
def test_a_broken_config_is_one_short_line(text, words, capsys):
    Path("wrong.yaml").write_text(text)
    assert main(["fit", "--config", "wrong.yaml"]) == 2
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "loading" not in line]
    assert len(said) <= 167
    assert [word for word in words if word not in said] == []


def test_a_printed_config_is_valid_input_again(capsys):
    printed = []
    for config in (CONFIG, "printed.yaml"):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--model.lr=0.003", "--config", config, "--print_config"])
        assert stopped.value.code == 0
        printed.append(capsys.readouterr().out)
        Path("printed.yaml").write_text(printed[-1])
    assert yaml.safe_load(printed[0])["model"]["init_args"]["lr"] == 0.003
    assert yaml.safe_load(printed[0]) == yaml.safe_load(printed[1])


@pytest.mark.parametrize(
    ("option", "setting"), [("--model.adapters.help", "--model.adapters.top_k"), ("--data.help", "--data.batch_size")]
)
def test_settings_are_listed_with_their_defaults(option, setting, capsys):
    assert main(["fit", "--config", CONFIG, option]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "(type:" in shown.partition(f"{setting} ")[2]
    assert "default:" in shown.partition(f"{setting} ")[2]
