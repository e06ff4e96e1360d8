"""The report and its command, on a small random model from the classes that the real ones use."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from morsr.adapters import MoRConfig, adapter_parameters
from morsr.commands import routing as command
from morsr.degradation.recipe import DegradationRecipe
from morsr.degradation.severity import true_severity
from morsr.errors import ConfigError, InputError
from morsr.estimators import build_estimator
from morsr.evaluation.callback import RoutingDump
from morsr.evaluation.example import examine, switch_off
from morsr.evaluation.report import write_report
from morsr.evaluation.routing import RoutingTable
from morsr.models.backbone import build_backbone
from morsr.models.generator import OneStepConfig, OneStepGenerator
from morsr.restoring import Restorer

plotly = pytest.importorskip("plotly")

UNET = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 8, "attention_head_dim": 2,
    "norm_num_groups": 4, "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "latent_channels": 4, "encoder_block_out_channels": [8, 8, 8], "decoder_block_out_channels": [8, 8, 8],
    "num_encoder_blocks": [0, 1, 1], "num_decoder_blocks": [1, 1, 0], "upsampling_scaling_factor": 2,
}  # fmt: skip
SETTINGS = MoRConfig(num_ranks=12, num_shared=2, top_k=3, num_zero=2, targets=(r"unet\..*(to_q|to_v|conv1|conv2)",))


@pytest.fixture(scope="module")
def generator() -> OneStepGenerator:
    torch.manual_seed(0)
    made = OneStepGenerator(
        build_backbone(UNET, VAE),
        build_estimator("frequency"),
        adapters=SETTINGS,
        one_step=OneStepConfig(timestep=1, parametrization="residual"),
    ).eval()
    with torch.no_grad():
        for parameter in adapter_parameters(made.backbone):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.fixture
def restorer(generator: OneStepGenerator, monkeypatch: pytest.MonkeyPatch) -> Restorer:
    made = Restorer(generator, device="cpu", dtype="float32")
    monkeypatch.setattr(Restorer, "from_pretrained", lambda *_, **__: made)
    return made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(9):
        noise = torch.rand(3, 96, 96) * (index / 8) + 0.5 * (1 - index / 8)
        Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy()).save(folder / f"photo{index}.png")
    return folder


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_table_needs_no_network_but_estimator_and_router(generator: OneStepGenerator, monkeypatch: Any):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a UNet or autoencoder ran")

    images = torch.rand(5, 3, 24, 24)
    expected = generator(images).routing
    monkeypatch.setattr(generator.backbone, "forward", refuse)
    for name in ("encode", "decode", "predict_noise"):
        monkeypatch.setattr(generator.backbone, name, refuse)
    before = generator.adapters.routing
    table = RoutingTable.from_images(generator, images)
    torch.testing.assert_close(table.chosen.transpose(0, 1), expected.chosen)
    torch.testing.assert_close(table.gates.transpose(0, 1), expected.selected)
    assert generator.adapters.routing is before, "the model's own routing is left alone"
    assert table.num_slots == SETTINGS.num_slots


def test_switched_off_slots_work_no_more(generator: OneStepGenerator):
    routing = generator.adapters.router(torch.rand(2, generator.estimator.dim))
    off = torch.zeros(routing.gates.shape[0], SETTINGS.num_slots, dtype=torch.bool)
    off[0, routing.chosen[0, 1, 0]] = True
    changed = switch_off(routing, off)
    assert changed.gates[0, 1, routing.chosen[0, 1, 0]] == 0
    assert changed.selected[0, 1, 0] == 0
    assert (changed.gates != routing.gates).sum() <= 2
    torch.testing.assert_close(changed.gates[1:], routing.gates[1:])


def test_one_image_in_depth(generator: OneStepGenerator):
    lr = torch.rand(1, 3, 20, 26)
    found = examine(generator, lr, name="x", max_side=24)
    assert found.restored.shape == (3, 80, 96)
    everything, single = found.without
    assert everything.name == "all routed ranks"
    assert everything.count == int(found.ranks.sum()) - SETTINGS.num_shared * len(found.ranks)
    assert everything.difference > single.difference > 0
    generator.adapters.strength = 0.0
    try:
        shared = generator(lr[..., 1:25]).sr[0].clamp(0, 1)
    finally:
        generator.adapters.strength = 1.0
    # The crop is scored by itself there, so only shapes that do not depend on scores may be compared.
    torch.testing.assert_close(everything.image, shared)
    assert 0 < found.adapter_flops < found.network_flops
    full = found.adapter_flops + found.saved_flops
    assert full > found.adapter_flops


def test_work_of_a_linear_rank_is_counted_right(generator: OneStepGenerator):
    from morsr.evaluation.example import _count_positions

    generator.route(torch.rand(1, 3, 8, 8))
    work = _count_positions(generator, lambda: generator(torch.rand(1, 3, 8, 8)))
    name = next(name for name in work if name.endswith("attentions.0.transformer_blocks.0.attn1.to_q"))
    # 32 x 32 pixels are 8 x 8 latents, 4 x 4 after the one downsampling; 16 features in and out, 2 operations each.
    assert work[name] == 2 * 16 * (16 + 16)


def test_the_page_of_a_folder(restorer: Restorer, photos: Path, tmp_path: Path, capsys: Any):
    out, table = tmp_path / "report.html", tmp_path / "table.safetensors"
    code = command.run(options(str(photos), "--out", str(out), "--degrade", "realesrgan", "--table", str(table)))
    assert code == 0
    page = out.read_text()
    assert 4_000_000 < len(page) < 15_000_000
    assert "http-equiv" not in page
    assert "<script src" not in page
    for title in ("Load of every slot", "What each slot is for", "Zero slots against severity", "Active ranks",
                  "One image: photo", "without all routed ranks"):  # fmt: skip
        assert title in page
    assert "True degradations" not in page
    loaded = RoutingTable.load(table)
    assert set(loaded.truth) == {"blur", "noise", "jpeg", "resize"}
    assert command.run(options(str(table), "--out", str(tmp_path / "again.html"))) == 0
    assert "no image was restored" in (tmp_path / "again.html").read_text()


def test_images_that_share_a_stem_keep_apart(restorer: Restorer, tmp_path: Path, monkeypatch: Any):
    folder = tmp_path / "photos"
    for place, level in (("day/1.png", 40), ("night/1.png", 80), ("night/1.bmp", 120), ("2.png", 160)):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (level,) * 3).save(folder / place)
    shown: list[tuple[str, int]] = []
    monkeypatch.setattr("morsr.evaluation.report.write_report", lambda *_, **__: None)
    monkeypatch.setattr(
        "morsr.evaluation.example.examine",
        lambda _, lr, *, name, **__: shown.append((name, round(float(lr.mean()) * 255))),
    )
    out, table = str(tmp_path / "report.html"), str(tmp_path / "table.safetensors")
    for name in ("day/1", "night/1_png", "night/1_bmp", "2"):
        assert command.run(options(str(folder), "--out", out, "--table", table, "--example", name)) == 0
    assert shown == [("day/1", 40), ("night/1_png", 80), ("night/1_bmp", 120), ("2", 160)]
    assert RoutingTable.load(table).names == ("2", "day/1", "night/1_bmp", "night/1_png")
    Path(table).unlink()
    with pytest.raises(InputError, match="there are day/1, night/1"):
        command.run(options(str(folder), "--out", out, "--table", table, "--example", "1"))
    assert not Path(table).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_that_are_no_utf_8_are_written_with_escapes(restorer: Restorer, photos: Path, tmp_path: Path):
    for path in sorted(photos.iterdir())[2:]:
        path.unlink()
    name = os.fsdecode(b"caf\xe9")
    (photos / "photo0.png").rename(photos / f"{name}.png")
    out, table = tmp_path / "report.html", tmp_path / "table.safetensors"
    arguments = options(str(photos), "--out", str(out), "--table", str(table), "--example", name)
    assert command.run(arguments) == 0
    assert "One image: caf\\udce9" in out.read_text()
    assert RoutingTable.load(table).names == ("caf\\udce9", "photo1")


def test_a_single_image_says_what_cannot_be_shown(restorer: Restorer, photos: Path, tmp_path: Path):
    out = tmp_path / "one.html"
    assert command.run(options(str(photos / "photo3.png"), "--out", str(out))) == 0
    page = out.read_text()
    assert "The true degradations are not known" in page
    assert "needs at least 8 images" in page
    assert "at least three images" in page
    assert "Load of every slot" in page


def test_an_unreadable_file_does_not_stop_the_rest(restorer: Restorer, photos: Path, tmp_path: Path, capsys: Any):
    (photos / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "report.html"
    assert command.run(options(str(photos), "--out", str(out), "--example", "none")) == 1
    assert "1 of 10 images could not be read" in out.read_text()
    assert "broken.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing", "--out", "a.html"), "no such file or folder"),
        (("empty", "--out", "a.html"), "no images"),
        (("empty", "--out", "a.pdf"), "ends in .html"),
        (("empty", "--out", "a.html", "--copies", "2"), "goes with --degrade"),
        (("empty", "--out", "a.html", "--degrade", "none-such"), "expected one of"),
        (("empty", "--out", "a.html", "--seed", "5"), "--seed goes with --degrade"),
        (("empty", "--out", "a.html", "--degrade", "realesrgan", "--seed", str(2**63)), "a number of 64 bits"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(arguments: tuple[str, ...], message: str, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((InputError, ConfigError), match=message):
        command.run(options(*arguments))
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_plain_lora_has_no_report(tmp_path: Path):
    made = OneStepGenerator(
        build_backbone(UNET, VAE),
        build_estimator("frequency"),
        adapters=MoRConfig.of_kind("lora", num_ranks=4, targets=("to_q",)),
    )
    with pytest.raises(ConfigError, match="no routing"):
        RoutingTable.from_images(made, torch.rand(1, 3, 16, 16))
    with pytest.raises(ConfigError, match="no ranks to switch off"):
        examine(made, torch.rand(1, 3, 16, 16))


def test_validation_writes_its_routings(generator: OneStepGenerator, tmp_path: Path):
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.generator = generator

        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            return None

    images = torch.rand(5, 3, 16, 16)
    drawn = DegradationRecipe.load("light").sample(torch.arange(5))
    batches = [
        {"lr": images[part], "stem": [f"i{index}" for index in range(5)[part]], "parameters": drawn[part]}
        for part in (slice(0, 3), slice(3, 5))
    ]
    dump = RoutingDump(max_images=4)
    trainer = L.Trainer(
        default_root_dir=tmp_path, logger=False, accelerator="cpu", callbacks=[dump], enable_progress_bar=False
    )
    data = L.LightningDataModule()
    data.recipe, data.val_recipe = "realesrgan", "light"
    data.val_dataloader = lambda: DataLoader(batches, batch_size=None)
    trainer.validate(Module(), datamodule=data, verbose=False)
    table = RoutingTable.load(tmp_path / "routing" / "step_000000.safetensors")
    assert table.names == ("i0", "i1", "i2", "i3")
    torch.testing.assert_close(table.truth["noise"], true_severity(drawn[:4], "light").noise)
    torch.testing.assert_close(table.chosen, RoutingTable.from_images(generator, images[:4]).chosen)
    assert [json.loads(line) for line in table.parameters] == [
        json.loads(line) for line in drawn[:4].to_jsonl().splitlines()
    ]


def test_a_model_without_routing_gets_a_page_of_its_scores(photos: Path, tmp_path: Path, monkeypatch: Any):
    made = OneStepGenerator(
        build_backbone(UNET, VAE),
        build_estimator("frequency"),
        adapters=MoRConfig.of_kind("lora", num_ranks=4, targets=("to_q",)),
    ).eval()
    monkeypatch.setattr(Restorer, "from_pretrained", lambda *_, **__: Restorer(made, device="cpu", dtype="float32"))
    out, table = tmp_path / "lora.html", tmp_path / "lora.safetensors"
    assert command.run(options(str(photos), "--out", str(out), "--table", str(table))) == 0
    for page in (out, tmp_path / "again.html"):
        if page != out:
            assert command.run(options(str(table), "--out", str(page))) == 0
        text = page.read_text()
        assert "this model has no routing" in text
        assert "Degradation scores of the images" in text
        assert "Load of every slot" not in text
    assert len(RoutingTable.load(table)) == 9


def test_a_collapsed_router_is_named_on_the_page(generator: OneStepGenerator, tmp_path: Path):
    images = torch.rand(60, 3, 16, 16)
    healthy = RoutingTable.from_images(generator, images)
    chosen = torch.stack(
        [torch.randperm(SETTINGS.num_slots)[: SETTINGS.top_k] for _ in range(60 * healthy.chosen.shape[1])]
    )
    even = replace(healthy, chosen=chosen.view_as(healthy.chosen))
    collapsed = even.chosen.clone()
    collapsed[:, 1] = torch.arange(SETTINGS.top_k)
    pages = [
        write_report(table, tmp_path / f"{name}.html").read_text()
        for name, table in (("even", even), ("collapsed", replace(even, chosen=collapsed)))
    ]
    assert "experts have collapsed" not in pages[0]
    assert f"In 1 of {len(even.layer_names)} layers" in pages[1]
    assert f"<td>{even.layer_names[1]}</td>" in pages[1]
