"""Scoring folders, methods and test sets: pairing, bad input, the numbers, and the tables that come of them."""

import csv
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import morsr.evaluation.callback as callback_module
from morsr.cli import main
from morsr.errors import ConfigError, InputError
from morsr.evaluation.callback import BenchmarkTable, ScoreDump
from morsr.evaluation.comparison import compare_tables
from morsr.evaluation.score import bicubic_method, evaluate, score_folders
from morsr.evaluation.tables import BenchmarkReport, ImageScore, published_rows
from morsr.models.metrics import METRICS
from morsr.models.scores import ScoreMeans


def picture(seed: int, size: int = 32) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def noisy(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.clip(image + np.random.default_rng(1).normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    """gt, lr and two sets of outputs of four images and one in a subfolder, a JPEG among the references."""
    for seed, stem in enumerate(("a", "b", "c", "d", "sub/e")):
        hr = picture(seed)
        shown = {"gt": hr, "lr": cv2.resize(hr, (8, 8), interpolation=cv2.INTER_AREA)}
        for name, image in {**shown, "good": noisy(hr, 3), "bad": noisy(hr, 20)}.items():
            path = tmp_path / name / f"{stem}.{'jpg' if (name, stem) == ('gt', 'sub/e') else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return tmp_path


def quiet(folders: Path, **options: Any) -> BenchmarkReport:
    options = {"outputs": {"good": folders / "good"}, "hr": folders / "gt", "metrics": ["psnr"], **options}
    return score_folders(**options)


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def table_of(text: str, metric: str) -> dict[str, list[str]]:
    """Method to the cells behind it, of one metric's lines of an aligned table."""
    found: dict[str, list[str]] = {}
    current = ""
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line.rstrip())
        current = cells[0] or current
        if current.startswith(metric) and len(cells) > 2:
            found[cells[1]] = cells[2:]
    return found


def test_score_command_writes_and_prints_one_table(folders, capsys):
    shutil.copytree(folders / "bad", folders / "rate=1")
    words = f"--pred {folders}/good worse={folders}/rate=1 --gt {folders}/gt --lr {folders}/lr --published RealSR"
    assert main(["score", *words.split(), "--metrics", "psnr,ssim,lpips", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    lines = rows_of(Path("out/scores.csv"))
    assert [line["method"] for line in lines] == ["bicubic", "good", "worse"] * 5
    assert {line["image"] for line in lines} == {"a", "b", "c", "d", "sub/e"}
    assert "stablesr" in Path("out/scores.txt").read_text()
    assert "alexnet" in printed
    columns = [(line["method"], float(line["psnr"])) for line in lines]
    means = {name: np.mean([value for one, value in columns if one == name]) for name, _ in columns}
    assert means["good"] > means["worse"]
    shown = table_of(printed, "psnr")
    assert "|" not in printed, "no Markdown on the terminal"
    assert list(shown) == ["bicubic", "good", "worse"]
    assert "MoR-DASR: psnr 25.32" in printed
    assert float(shown["good"][0]) == pytest.approx(means["good"], abs=1e-4)
    assert float(shown["good"][1]) == pytest.approx(means["good"] - means["bicubic"], abs=1e-4)
    assert "lpips is absent" in printed


DAMAGES: dict[str, Any] = {
    "size": lambda at, image: Image.fromarray(image[:-2]).save(at),
    "16 bits": lambda at, image: cv2.imwrite(str(at), image.astype(np.uint16) * 257),
    "alpha": lambda at, image: Image.fromarray(image).convert("RGBA").save(at),
    "transparent palette": lambda at, image: Image.fromarray(image).quantize(64).save(at, transparency=3),
    "two pages": lambda at, image: (
        at.unlink(),
        Image.fromarray(image).save(
            at.with_suffix(".tif"), save_all=True, append_images=[Image.fromarray(image[::-1])]
        ),
    ),
    "text": lambda at, image: at.write_bytes(b"not an image"),
    "missing": lambda at, image: at.unlink(),
    "no reference": lambda at, image: (at.parent.parent / "gt" / "b.png").unlink(),
    "no input": lambda at, image: (at.parent.parent / "lr" / "b.png").unlink(),
    "turned input": lambda at, image: Image.fromarray(image[:20, :8]).save(at.parent.parent / "lr" / "b.png"),
    "twice": lambda at, image: Image.fromarray(image).save(at.parent / "b.jpg"),
    "cut in half": lambda at, image: at.write_bytes(at.read_bytes()[:-900]),  # the head is whole
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_cannot_be_scored_is_named_and_left_out(folders, kind):
    DAMAGES[kind](folders / "good" / "b.png", picture(1))
    report = quiet(folders, lr=folders / "lr")
    assert report.images == ("a", "c", "d", "sub/e")
    assert re.search(r"\bb\b", " ".join(report.problems))
    assert all(text in report.to_text() for text in report.problems)
    words = f"--pred {folders}/good --gt {folders}/gt --lr {folders}/lr --metrics psnr"
    assert main(["score", *words.split()]) == 1


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"hr": "empty"}, InputError),
        ({"metrics": ["psnrr"]}, ConfigError),
        ({"outputs": {"bicubic": "good"}, "lr": "lr"}, ConfigError),
        ({"hr": None, "metrics": ["psnr"]}, InputError),
        ({"metrics": ["lpips"]}, InputError),
        ({"hr": "gt/a.png"}, InputError),
    ],
)
def test_arguments_that_cannot_work(folders, options, error):
    Path("empty").mkdir()
    with pytest.raises(error):
        quiet(folders, out="out", **options)
    assert not Path("out").exists()


def test_single_files_of_any_name_and_without_reference(folders):
    report = quiet(folders, outputs={"x": folders / "good" / "a.png"}, hr=folders / "gt" / "b.png")
    assert report.images == ("a",)
    report = quiet(folders, hr=None, metrics=["psnr", "niqe"])
    assert list(report.absent) == ["psnr"]
    assert [info.name for info in report.metrics] == ["niqe"]


def pairs(count: int = 3, size: int = 48) -> list[Any]:
    made = [(f"photo{i}", picture(i, size)) for i in range(count)]
    return [SimpleNamespace(stem=s, hr=hr, lr=cv2.resize(hr, (12, 12), interpolation=cv2.INTER_AREA)) for s, hr in made]


def test_methods_are_scored_as_saved_files(tmp_path):
    given = pairs()
    truths = iter([pair.hr for pair in given])
    almost = lambda lr: torch.from_numpy(next(truths) / 255).permute(2, 0, 1)[None] + 0.4 / 255  # noqa: E731
    report = evaluate({"bicubic": bicubic_method(4), "almost": almost}, given, ["psnr"], out=tmp_path)
    assert report.mean("almost", "psnr") == pytest.approx(80), "rounded to 8 bits before it is scored"
    assert report.difference("almost", "psnr").low > 20
    assert {path.name for path in tmp_path.iterdir()} == {"scores.csv", "scores.txt", "side_by_side.png"}
    assert float(rows_of(tmp_path / "scores.csv")[1]["psnr"]) == pytest.approx(80)


@pytest.mark.parametrize(
    ("methods", "given", "error"),
    [
        ({"x": bicubic_method(4)}, [], InputError),
        ({"x": bicubic_method(4)}, pairs(1) * 2, InputError),
        ({"x": lambda lr: lr}, pairs(1), InputError),
        ({"x": lambda lr: bicubic_method(4)(lr) * math.nan}, pairs(1), InputError),
    ],
)
def test_methods_and_pairs_that_cannot_be_used(methods, given, error, tmp_path):
    with pytest.raises(error):
        evaluate(methods, given, ["psnr"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mean_over_fewer_images_says_so_and_whole_photographs_are_resampled():
    rows = [ImageScore("a", "x", {"psnr": 20.0}), ImageScore("b", "x", {"psnr": math.nan})]
    report = BenchmarkReport(rows, [METRICS["psnr"]])
    assert table_of(report.to_text(), "psnr")["x"] == ["20.0000 (n=1)"]
    for method, metric in (("y", "psnr"), ("x", "ssim")):
        with pytest.raises(ConfigError):
            report.mean(method, metric)
    with pytest.raises(ConfigError):
        report.difference("x", "psnr")
    draws = np.random.default_rng(0)
    level = draws.normal(size=8).repeat(10)
    grouped = [
        ImageScore(f"i{n}", method, {"psnr": value}, group=f"p{n // 10}")
        for method, values in (("bicubic", level * 0), ("x", level + 0.1 * draws.normal(size=80)))
        for n, value in enumerate(values)
    ]
    wide = BenchmarkReport(grouped, [METRICS["psnr"]], reference="bicubic").difference("x", "psnr")
    alone = [ImageScore(row.image, row.method, row.scores) for row in grouped]
    narrow = BenchmarkReport(alone, [METRICS["psnr"]], reference="bicubic").difference("x", "psnr")
    assert (wide.count, narrow.count) == (8, 80)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_published_rows_are_the_papers():
    rows = published_rows("realsr")
    assert (rows["MoR-DASR"]["psnr"], rows["OSEDiff"]["ssim"]) == (25.32, 0.7341)
    assert all(set(scores) <= {*METRICS, "fid"} for scores in rows.values())
    assert len(published_rows("DRealSR ablation")) == 5
    with pytest.raises(ConfigError, match="RealSR"):
        published_rows("urban100")


def test_compare_command(folders, capsys):
    for name in ("good", "bad"):
        quiet(folders, outputs={name: folders / name}, lr=folders / "lr", out=name)
    assert main(["compare", "good/scores.csv", "bad/scores.csv"]) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("psnr"))
    a, b, difference = map(float, re.findall(r"(?<= )[+-]?\d+\.\d{4}", first)[:3])
    assert difference == pytest.approx(b - a, abs=2e-4)
    assert first.endswith("worse")
    main(["compare", "good/scores.csv", "good/scores.csv"])
    assert "not distinguishable" in capsys.readouterr().out


def write_run(row: str, seed: int, psnr: float) -> None:
    folder = Path(row, f"seed_{seed}", "scores")
    folder.mkdir(parents=True)
    lines = [f"{name},morsr,{psnr + place},{name[0]}" for place, name in enumerate(("a1", "a2", "b1", "b2"))]
    (folder / "step_999999.csv").write_text("image,method,psnr,group\nx,morsr,1,x\n")
    for process in range(2):  # two processes, each with its share
        text = ["image,method,psnr,group", *lines[process::2]]
        (folder / f"step_1000000.{process}.csv").write_text("\n".join(text) + "\n")


def test_the_last_scores_of_all_seeds_are_paired(capsys):
    for seed in (0, 1, 2):
        write_run("lora", seed, 20.0)
        write_run("mor", seed, 21.0 + seed)
    write_run("mor", 7, 99.0)  # no partner
    found = compare_tables("lora", "mor")
    _, mean_a, mean_b, value, _ = found.rows[0]
    assert (mean_a, mean_b, value.mean) == pytest.approx((21.5, 23.5, 2.0))
    assert (found.seeds, found.images, value.count) == (3, 4, 2)
    assert value.low == pytest.approx(1.0, abs=0.35)
    assert value.high == pytest.approx(3.0, abs=0.35)
    assert main(["compare", "lora", "mor"]) == 0
    assert "3 seeds" in capsys.readouterr().out
    write_run("other", 5, 20.0)
    write_run("other", 6, 20.0)
    Path("empty").mkdir()
    for folder in ("other", "empty"):
        with pytest.raises(InputError):
            compare_tables("lora", folder)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", InputError),
        ("image,psnr\na.png,1\na.png,2\n", InputError),
        ("image,psnr\na,much\n", InputError),
        ("image,ssim\na,1\n", InputError),
        ("image,psnr\nz,1\n", InputError),
        ("image,method,psnr\na,x,1\na,y,2\n", ConfigError),
        (None, InputError),
    ],
)
def test_tables_that_cannot_be_compared(text, error):
    Path("other.csv").write_text("image,psnr\na,1\nb,2\n")
    if text is not None:
        Path("table.csv").write_text(text)
    with pytest.raises(error):
        compare_tables("table.csv", "other.csv")


def test_a_method_is_chosen_by_its_name_and_of_other_columns_the_direction_is_not_known():
    lines = ["a,m,21,0.5", "b,m,23,", "c,m,22,0.5", "a,n,20,1", "b,n,20,1", "c,n,20,1"]
    Path("ours.csv").write_text("\n".join(["image,method,psnr_y,beauty", *lines]))
    found = compare_tables("ours.csv", "ours.csv", method_a="n", method_b="m")
    assert {info.name: value.mean for info, *_, value, _ in found.rows} == {"psnr": 2, "beauty": -0.5}
    assert "lower" in found.to_text()
    assert "beauty (n=2)" in found.to_text()
    assert "3 images\n" in found.to_text()
    with pytest.raises(ConfigError):
        compare_tables("ours.csv", "ours.csv", method_a="m", method_b="z")


class Cheat(L.LightningModule):
    """Knows the answer: returns the reference of the LR image that it is given."""

    def __init__(self, answers: dict[float, torch.Tensor]) -> None:
        super().__init__()
        self.answers = answers
        self.generator = SimpleNamespace(base=torch.nn.Linear(1, 1), one_step=SimpleNamespace(scale=4))
        self.autocast: list[bool] = []
        self.scores = ScoreMeans(["psnr"])

    def forward(self, lr: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return self.answers[round(lr.double().mean().item(), 6)]

    def test_step(self, batch, batch_idx):
        return None

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, torch.Tensor]:
        self.scores.update(batch["hr"], batch["hr"])
        return {"sr": batch["hr"]}


class Pairs(L.LightningDataModule):
    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale, self.batches = scale, []
        for index in range(4):
            generator = torch.Generator().manual_seed(index)
            hr = (torch.rand(1, 3, 64, 64, generator=generator) * 255).round() / 255
            lr = (torch.nn.functional.avg_pool2d(hr, scale) * 255).round() / 255
            name = {"stem": [f"image{index % 2}"], "set": ["first" if index < 2 else "second"], "image": ["photo"]}
            self.batches.append({"lr": lr, "hr": hr, **name})

    def test_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = test_dataloader


def trained(callback: L.Callback, scale: int = 4, **settings: Any) -> tuple[L.Trainer, Cheat, Pairs]:
    data = Pairs(scale)
    answers = {round(batch["lr"].double().mean().item(), 6): batch["hr"] for batch in data.batches}
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False, enable_checkpointing=False,
        **settings,
    )  # fmt: skip
    return trainer, Cheat(answers), data


@pytest.mark.parametrize("scale", [2, 4])
def test_a_test_run_ends_with_one_table_per_set(monkeypatch, scale):
    monkeypatch.setattr(callback_module, "active_adapters", lambda *_: nullcontext())
    table = BenchmarkTable(metrics=["psnr", "ssim"], out="out")
    trainer, module, data = trained(table, scale)
    trainer.test(module, data, verbose=False)
    assert set(table.reports) == {"first", "second"}
    report = table.reports["first"]
    assert report.methods == ("bicubic", "base", "morsr")
    assert report.mean("morsr", "ssim") == pytest.approx(1.0, abs=1e-6)
    assert report.difference("morsr", "psnr", "bicubic").mean > 10
    text = report.to_text()
    assert "|" not in text
    assert table_of(text, "psnr")["morsr"][1].startswith("+")
    assert Path("out/first/side_by_side.png").is_file()


def test_pairs_of_a_plain_data_module_are_numbered_and_restored_in_the_precision_of_the_run(monkeypatch):
    monkeypatch.setattr(callback_module, "active_adapters", lambda *_: nullcontext())
    table = BenchmarkTable(metrics=["psnr"], out="out")
    trainer, module, data = trained(table, precision="bf16-mixed")
    trainer.callbacks.append(ScoreDump())
    plain = L.LightningDataModule()
    plain.test_dataloader = plain.val_dataloader = lambda: DataLoader(  # type: ignore[method-assign]
        [{side: batch[side] for side in ("lr", "hr")} for batch in data.batches], batch_size=None
    )
    trainer.test(module, plain, verbose=False)
    assert sorted(table.reports["test"].values("morsr", "psnr")) == ["00000", "00001", "00002", "00003"]
    assert module.autocast == [True] * 8
    trainer.validate(module, plain, verbose=False)
    assert [line["image"] for line in rows_of(Path("scores/step_000000.csv"))] == [f"val:0000{i}" for i in range(4)]


def test_several_devices_are_refused():
    with pytest.raises(ConfigError):
        BenchmarkTable().setup(SimpleNamespace(world_size=2), None, "test")  # type: ignore[arg-type]


def test_validation_scores_are_dumped_for_compare():
    trainer, module, data = trained(ScoreDump())
    trainer.validate(module, data, verbose=False)
    lines = rows_of(Path("scores/step_000000.csv"))
    assert {line["image"] for line in lines} == {f"{s}:image{i}" for s in ("first", "second") for i in (0, 1)}
    assert {line["group"] for line in lines} == {"first:photo", "second:photo"}
    assert [(line["method"], float(line["psnr"])) for line in lines] == [("morsr", pytest.approx(80))] * 4
