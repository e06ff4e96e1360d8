"""The restorer: kinds, sizes, scales, tiles, routing, colour, and the nets under them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import restorer_twins as twins
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from morsr.errors import ConfigError, InputError, MorsrError, WeightsError
from morsr.models import passes, streaming
from morsr.models import restorer as restorer_module
from morsr.models.passes import tile_plan
from morsr.models.picture_files import read_file
from morsr.models.restorer import Restorer
from morsr.models.settings import Settings, resolve_device, resolve_dtype


def bicubic(images: Tensor, scale: float = 4.0) -> Tensor:
    size = [round(side * scale) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bicubic").clamp(0, 1)


# Sizes and kinds


@settings(max_examples=30)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    scale=st.sampled_from([1, 1.0, 1.5, 2.3, 4, 8]),
    tile=st.sampled_from(["auto", None, 1, 32, 50]),
    color=st.sampled_from(["wavelet", "adain", "none"]),
)
def test_a_network_that_does_nothing_gives_the_exact_enlargement(
    height: int, width: int, scale: float, tile: int | str | None, color: str
):
    images = torch.rand(1, 3, height, width)
    restored = twins.fake()(images, scale=scale, tile=tile, color=color)
    assert_close(restored, bicubic(images, scale), atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [(9, 13), (1, 1), (5, 40)])
def test_padding_is_that_of_training(restorer: Restorer, size: tuple[int, int]):
    """No size of these fits the grid, and what the networks see beyond the image changes what is inside."""
    lr = torch.rand(1, 3, *size)
    with torch.no_grad():
        trained = restorer.generator(lr).sr.clamp(0, 1)
    assert_close(restorer(lr, tile=None, color="none"), trained, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pil_images_come_back_larger_in_their_mode(mode: str):
    image = Image.radial_gradient("L").resize((30, 20)).convert(mode)
    restored = twins.fake()(image, scale=2.5)
    assert (restored.mode, restored.size) == (mode, (75, 50))
    if mode != "1":
        expected = np.asarray(image.convert("RGB").resize((75, 50), Image.Resampling.BILINEAR), int)
        assert np.abs(np.asarray(restored.convert("RGB"), int) - expected).mean() < 6


def test_alpha_is_enlarged_beside_the_colours():
    array = np.random.default_rng(0).random((12, 17, 4)).astype(np.float32)
    restored = twins.fake(lambda images: images * 0)(array, color="none")
    alpha = bicubic(torch.from_numpy(array[..., 3])[None, None])
    assert_close(torch.from_numpy(restored[..., 3]), alpha[0, 0], atol=1e-5, rtol=0)
    assert restored[..., :3].max() == 0


def test_arrays_of_every_depth_come_back():
    for dtype in (np.uint8, np.uint16, np.float32):
        array = np.full((5, 6, 3), 1 if dtype is np.float32 else np.iinfo(dtype).max, dtype)
        restored = twins.fake()(array)
        assert (restored.shape, restored.dtype) == ((20, 24, 3), dtype)
        np.testing.assert_allclose(restored, array[:1, :1].repeat(20, 0).repeat(24, 1), rtol=1e-5)


def test_the_input_is_left_alone():
    images = torch.rand(1, 3, 9, 9)
    before = images.clone()
    array = (np.random.default_rng(0).random((9, 9, 3)) * 255).astype(np.uint8)
    kept = array.copy()
    twins.fake()(images, scale=1)
    twins.fake()(array, scale=1)
    assert_close(images, before, atol=0, rtol=0)
    np.testing.assert_array_equal(array, kept)


# Settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"scale": 0.5}, "scale: expected 1 to 8"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": "4"}, "scale: expected a number, got '4'"),
        ({"generative": "a"}, "generative: expected a number, got 'a'"),
        ({"color_strength": "1"}, "color_strength: expected a number, got '1'"),
        ({"tile": 0}, "tile"),
        ({"tile": "big"}, "tile"),
        ({"tile": True}, "tile"),
        ({"color": "histogram"}, "wavelet, adain, none"),
        ({"color_strength": 2}, "color strength"),
        ({"color": "none", "color_strength": 0.5}, "no effect"),
        ({"routing": "pixel"}, "image, tile or sequence"),
        ({"budget": -1}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"generative": -1}, "generative"),
        ({"generative": 0.5}, "routed adapters"),
        ({"budget": 4}, "routed adapters"),
        ({"routing": "tile"}, "routed adapters"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_done(setting: dict, words: str):
    restorer = twins.fake()
    with pytest.raises(ConfigError, match=words):
        restorer(torch.rand(1, 3, 4, 4), **setting)
    with pytest.raises(ConfigError, match=words):
        restorer.settings(**setting)
    assert not restorer.generator.sizes


def test_defaults_of_the_call_and_of_the_check_agree():
    import inspect
    from dataclasses import asdict

    defaults = asdict(Settings())
    for function in (Restorer.__call__, Restorer.restore_file):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in defaults} == defaults


def test_devices_and_dtypes_by_name():
    assert resolve_device("cpu") == torch.device("cpu")
    for wrong in ("cuda:77", "toaster", None):
        with pytest.raises(ConfigError, match="cannot be used"):
            resolve_device(wrong)
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    for other in ("float8", torch.int32):
        with pytest.raises(ConfigError, match="float32, bfloat16, float16"):
            resolve_dtype(other, torch.device("cpu"))


@pytest.mark.parametrize("bad", [torch.full((1, 3, 4, 4), float("nan")), torch.rand(1, 3, 4, 4) * 255, "no.png", None])
def test_bad_images_are_refused(bad: object):
    with pytest.raises(InputError):
        twins.fake()(bad)


# Tiles


@pytest.mark.parametrize(("height", "width"), [(128, 512), (16, 512), (512, 16), (300, 40)])
def test_a_tile_size_is_honoured_on_any_proportions(height: int, width: int):
    restorer = twins.fake()
    restorer(torch.rand(1, 3, height // 4, width // 4), tile=64)
    assert {max(size) for size in restorer.generator.sizes} == {64}
    assert {min(size) for size in restorer.generator.sizes} == {min(64, -(-height // 16) * 16, -(-width // 16) * 16)}
    restorer.generator.sizes.clear()
    restorer(torch.rand(1, 3, height // 4, width // 4), tile=70)
    assert max(max(size) for size in restorer.generator.sizes) == 80, "rounded up to what the networks take"


def test_large_images_are_tiled_by_themselves_and_small_ones_are_not(monkeypatch: pytest.MonkeyPatch):
    generator = twins.FakeGenerator()
    device = torch.device("cpu")
    monkeypatch.setattr(passes, "free_memory", lambda device: 2**40)
    assert tile_plan(generator, (512, 512), "auto", device).single
    assert tile_plan(generator, (700, 800), "auto", device).single
    plan = tile_plan(generator, (4096, 4096), "auto", device)
    assert max(plan.windows[0].height, plan.windows[0].width) == 512
    monkeypatch.setattr(passes, "free_memory", lambda device: 2 * 200 * 200 * passes.bytes_per_pixel(generator))
    assert tile_plan(generator, (512, 512), "auto", device).windows[0].height == 192
    assert tile_plan(generator, (512, 512), None, device).single


def test_no_seam_between_tiles():
    """Gradients across the lines where tiles begin and end are as elsewhere, though tiles see nothing of each other."""
    images = torch.rand(1, 3, 128, 128)
    restorer = twins.fake(twins.smoothing)
    whole = restorer(images, tile=None, color="none")
    tiled = restorer(images, tile=128, color="none")
    plan = tile_plan(restorer.generator, (512, 512), 128, torch.device("cpu"))
    edges = sorted({w.left for w in plan.windows} | {w.left + w.width for w in plan.windows} - {0, 512})[1:-1]
    step = tiled.diff(dim=-1).abs().mean(dim=(0, 1, 2))
    reference = whole.diff(dim=-1).abs().mean(dim=(0, 1, 2))
    ratio = step[[edge - 1 for edge in edges]].mean() / reference[[edge - 1 for edge in edges]].mean()
    assert len(edges) >= 6
    assert abs(ratio - 1) < 0.02
    assert -10 * (tiled - whole).square().mean().log10() > 50


@pytest.mark.parametrize("color", ["wavelet", "adain", "none"])
def test_tiles_have_the_colours_of_the_whole(color: str):
    """A network that shifts the colours of a tile by its mean: the correction is made on the whole, not per tile."""
    images = bicubic(torch.rand(1, 3, 6, 6), 8)
    restorer = twins.fake(lambda part: (part * 0.8 + 0.1).clamp(0, 1))
    whole = restorer(images, tile=None, color=color)
    assert_close(restorer(images, tile=64, color=color), whole, atol=1e-5, rtol=0)


def test_batches_go_through_together_or_one_by_one():
    images = torch.rand(3, 3, 20, 28)
    restorer = twins.fake(twins.smoothing)
    together = restorer(images)
    assert len(restorer.generator.sizes) == 1
    for index in range(3):
        assert_close(restorer(images[index : index + 1]), together[index : index + 1], atol=1e-6, rtol=0)
    assert_close(restorer(images, tile=64, color="none"), restorer(images, color="none"), atol=0.05, rtol=0)


# The two nets


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_leads_to_smaller_tiles(error: Exception):
    def small_only(images: Tensor) -> Tensor:
        if max(images.shape[-2:]) > 100:
            raise error
        return images

    images = torch.rand(1, 3, 50, 90)
    restorer = twins.fake(small_only)
    with pytest.warns(UserWarning, match="going on with tiles of"):
        restored = restorer(images)
    assert_close(restored, bicubic(images), atol=2e-5, rtol=0)
    tried = [max(size) for size in restorer.generator.sizes]
    assert sum(side > 100 for side in tried) <= 2, "what did not fit once is not tried again"


def test_memory_that_cannot_suffice_is_told():
    def never(images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with (
        pytest.warns(UserWarning, match="memory"),
        pytest.raises(InputError, match="memory ran out even with tiles of"),
    ):
        twins.fake(never)(torch.rand(1, 3, 50, 50))


def test_other_errors_are_not_taken_for_memory():
    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        twins.fake(broken)(torch.rand(1, 3, 5, 5))


def test_nan_in_half_precision_is_made_again_in_float32():
    seen = []

    def overflowing(images: Tensor) -> Tensor:
        half = torch.is_autocast_enabled("cpu")
        seen.append(half)
        return images * float("nan") if half else images

    restorer = Restorer(twins.FakeGenerator(overflowing), device="cpu", dtype="bfloat16")  # type: ignore[arg-type]
    images = torch.rand(1, 3, 8, 8)
    assert_close(restorer(images), bicubic(images), atol=2e-5, rtol=0)
    assert seen == [True, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_float32_is_told(value: float):
    with pytest.raises(WeightsError, match="NaN or infinity"):
        twins.fake(lambda images: images * value)(torch.rand(1, 3, 8, 8))


# A real generator with adapters


def test_one_pass_equals_the_generator(restorer: Restorer):
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        expected = restorer.generator(images).sr.clamp(0, 1)
    assert_close(restorer(images, color="none"), expected, atol=1e-5, rtol=0)


def test_images_do_not_depend_on_their_batch_mates(restorer: Restorer):
    images = torch.rand(3, 3, 16, 16) * torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1, 1)
    together, routing = restorer(images, return_routing=True)
    assert routing.batch == 3
    for index in range(3):
        alone, own = restorer(images[index : index + 1], return_routing=True)
        assert_close(alone, together[index : index + 1], atol=1e-4, rtol=0)
        assert_close(own.gates, routing.image(index).gates)


def test_the_knobs_work_and_leave_the_model_as_it_was(restorer: Restorer):
    images, context = torch.rand(1, 3, 16, 16), restorer.generator.context
    before = {name: value.clone() for name, value in restorer.generator.state_dict().items()}
    plain = restorer(images)
    assert (restorer(images, generative=0.0) - plain).abs().max() > 1e-4
    assert (restorer(images, budget=1) - plain).abs().max() > 1e-4
    assert_close(restorer(images, budget=100), plain)
    assert_close(restorer(images, budget=0), restorer(images, generative=0.0), atol=1e-5, rtol=0)
    assert_close(restorer(images), plain, atol=0, rtol=0)
    assert (context.budget, context.generative, context.routing) == (None, 1.0, None)
    for name, value in restorer.generator.state_dict().items():
        assert_close(value, before[name], atol=0, rtol=0)


def uneven() -> Tensor:
    """Dark and flat on the left, bright and noisy on the right: the router sees two different images."""
    images = torch.full((1, 3, 16, 96), 0.1)
    images[..., 48:] = 0.5 + 0.5 * torch.rand(1, 3, 16, 48)
    return images


def test_all_tiles_of_an_image_share_one_routing_by_merged_weights(restorer: Restorer, monkeypatch: pytest.MonkeyPatch):
    images = uneven()
    calls = []
    condition = restorer.generator.condition
    monkeypatch.setattr(restorer.generator, "condition", lambda lr: (calls.append(tuple(lr.shape)), condition(lr))[1])
    before = {name: value.clone() for name, value in restorer.generator.state_dict().items()}
    merged, routing = restorer(images, tile=64, return_routing=True)
    assert calls == [(1, 3, 16, 96)]
    assert routing.batch == 1
    for name, value in restorer.generator.state_dict().items():
        assert_close(value, before[name], atol=0, rtol=0)
    monkeypatch.setattr(restorer_module, "auto_merged", lambda model, passes: __import__("contextlib").nullcontext())
    assert_close(restorer(images, tile=64), merged, atol=1e-4, rtol=0)


def test_routing_by_tile_differs_between_tiles(restorer: Restorer):
    images = uneven()
    by_tile, routings = restorer(images, tile=64, routing="tile", return_routing=True)
    plan = tile_plan(restorer.generator, (64, 384), 64, torch.device("cpu"))
    assert len(routings) == len(plan.windows) > 4
    assert not torch.equal(routings[0].chosen, routings[-1].chosen)
    left = restorer(images[..., :16], tile=None, return_routing=True)[1]
    assert_close(routings[0].gates, left.gates)
    assert (by_tile - restorer(images, tile=64)).abs().max() > 1e-4


def test_a_sequence_keeps_the_routing_of_its_first_frame(restorer: Restorer):
    dark, bright = torch.rand(1, 3, 16, 16) * 0.2, torch.rand(1, 3, 16, 16)
    _, first = restorer(dark, routing="sequence", return_routing=True)
    held, second = restorer(bright, routing="sequence", return_routing=True)
    alone, own = restorer(bright, return_routing=True)
    assert_close(first.gates, second.gates, atol=0, rtol=0)
    assert not torch.equal(own.chosen, second.chosen)
    assert (held - alone).abs().max() > 1e-4
    restorer.reset_sequence()
    _, anew = restorer(bright, routing="sequence", return_routing=True)
    assert_close(anew.gates, own.gates)


def test_an_image_of_one_pixel_works(restorer: Restorer):
    for scale in (1.0, 4.0, 7.5):
        assert restorer(torch.full((1, 3, 1, 1), 0.5), scale=scale).shape[-1] == round(scale)


def test_the_result_is_the_same_every_time(restorer: Restorer):
    images = torch.rand(1, 3, 20, 33)
    assert_close(restorer(images, tile=64), restorer(images, tile=64), atol=0, rtol=0)


def test_a_model_without_adapters_restores():
    restorer = Restorer(twins.small_generator(adapters=False), device="cpu")
    restored, routing = restorer(torch.rand(1, 3, 16, 16), return_routing=True)
    assert routing is None
    assert restored.shape == (1, 3, 64, 64)


def test_half_precision_stays_close(restorer: Restorer):
    images = torch.rand(1, 3, 16, 16)
    half = Restorer(restorer.generator, device="cpu", dtype="bfloat16")(images)
    assert half.dtype == torch.float32
    assert_close(half, restorer(images), atol=0.05, rtol=0)


# Files


@pytest.mark.parametrize("name", ["out.png", "out.tif"])
@pytest.mark.parametrize(("channels", "top"), [(1, 255), (3, 255), (4, 255), (3, 65535), (4, 65535)])
@pytest.mark.parametrize("color", ["wavelet", "adain"])
def test_streamed_files_equal_those_made_in_memory(
    name: str, channels: int, top: int, color: str, monkeypatch: pytest.MonkeyPatch
):
    from morsr.models.picture import read_picture
    from morsr.models.picture_files import write_picture

    kind = np.uint8 if top == 255 else np.uint16
    array = (np.random.default_rng(0).random((40, 24, channels)) * top).astype(kind)
    write_picture(read_picture(array), "in.png")
    restorer = twins.fake(twins.smoothing)
    restorer.restore_file("in.png", f"memory-{name}", tile=48, color=color)
    monkeypatch.setattr(streaming, "STREAM_PIXELS", 0)
    done: list[tuple[int, int]] = []
    restorer.restore_file(
        "in.png", f"stream-{name}", tile=48, color=color, progress=lambda now, total: done.append((now, total))
    )
    memory, stream = read_file(f"memory-{name}"), read_file(f"stream-{name}")
    assert (stream.form.mode, stream.form.depth, stream.size) == (memory.form.mode, memory.form.depth, (160, 96))
    assert_close(stream.rgb, memory.rgb, atol=1.01 / top, rtol=0)
    assert done[-1][0] == done[-1][1] > 4


def test_a_turned_photograph_is_streamed_upright(monkeypatch: pytest.MonkeyPatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((np.random.default_rng(0).random((12, 20, 3)) * 255).astype(np.uint8)).save("in.png", exif=exif)
    restorer = twins.fake()
    restorer.restore_file("in.png", "memory.png")
    monkeypatch.setattr(streaming, "STREAM_PIXELS", 0)
    restorer.restore_file("in.png", "stream.png")
    assert (Image.open("memory.png").size, Image.open("stream.png").size) == ((80, 48), (48, 80))
    assert_close(read_file("stream.png").rgb, read_file("memory.png").rgb, atol=1.01 / 255, rtol=0)


def test_a_failure_while_streaming_leaves_no_file_and_no_merged_weights(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch
):
    Image.fromarray((np.random.default_rng(0).random((32, 64, 3)) * 255).astype(np.uint8)).save("in.png")
    monkeypatch.setattr(streaming, "STREAM_PIXELS", 0)
    before = {name: value.clone() for name, value in restorer.generator.state_dict().items()}

    class Full:
        def write(self, rows: object) -> None:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "row_writer", lambda *arguments: Full())
        with pytest.raises(InputError, match="No space left"):
            restorer.restore_file("in.png", "out.png", tile=64)
    assert [path.name for path in Path().iterdir()] == ["in.png"]
    for name, value in restorer.generator.state_dict().items():
        assert_close(value, before[name], atol=0, rtol=0)
    restorer.restore_file("in.png", "out.png", tile=64)
    assert Image.open("out.png").size == (256, 128)


def test_the_input_is_never_overwritten():
    Image.new("RGB", (4, 4)).save("in.png")
    Path("link.png").symlink_to("in.png")
    for target in ("in.png", "./in.png", "link.png"):
        with pytest.raises(InputError, match="overwrite the input"):
            twins.fake().restore_file("in.png", target)


def test_a_target_that_cannot_hold_the_image_is_told_before_the_work():
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save("in.png")
    restorer = twins.fake()
    with pytest.raises(InputError, match="no transparency"):
        restorer.restore_file("in.png", "out.jpg")
    with pytest.raises(InputError, match="output format"):
        restorer.restore_file("in.png", "out.docx")
    assert not restorer.generator.sizes


def test_an_opaque_alpha_channel_may_go():
    Image.new("RGBA", (7, 5), (1, 200, 3, 255)).save("in.png")
    twins.fake().restore_file("in.png", "out.jpg", scale=3.3)
    assert Image.open("out.jpg").mode == "RGB"


def test_an_output_larger_than_the_memory_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(passes, "free_memory", lambda device: 2**20)
    restorer = twins.fake()
    with pytest.raises(InputError, match="400 x 400 needs about"):
        restorer(torch.rand(1, 3, 100, 100))
    assert not restorer.generator.sizes


def test_every_odd_image_is_restored(shared_data: Path):
    restorer = twins.fake()
    for path in sorted((shared_data / "odd_images").iterdir()):
        restorer.restore_file(path, path.name, scale=1.5)
        before, after = read_file(path), read_file(path.name)
        assert after.size == tuple(round(side * 1.5) for side in before.size)
        assert (after.form.mode, after.form.depth, after.form.icc) == (
            before.form.mode,
            before.form.depth,
            before.form.icc,
        )
        assert (after.rgb - bicubic(before.rgb, 1.5)).abs().mean() < 0.01
        if before.alpha is not None:
            assert (after.alpha - bicubic(before.alpha, 1.5)).abs().max() < 0.01


def test_a_very_wide_image_works():
    wide = np.zeros((3, 20_000, 3), np.uint8)
    assert twins.fake()(wide, scale=1.0, tile=512).shape == wide.shape


def test_memory_is_asked_of_the_machine():
    from morsr.models.memory import free_memory

    assert 2**20 < free_memory(torch.device("cpu")) < 2**50


def test_files_in_the_cache_of_a_container_are_free_memory(tmp_path: Path):
    from morsr.models.memory import _container_free

    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    assert _container_free(tmp_path) == 100, "where nothing more is said"
    stat = "anon 200\nfile 700\ninactive_file 400\nactive_file 200\nslab_reclaimable 50\nslab_unreclaimable 10\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert _container_free(tmp_path) == 750
    (tmp_path / "memory.stat").write_text("inactive_file 2000\n")
    assert _container_free(tmp_path) == 1000, "no more than the limit"


def test_a_model_that_is_not_there_is_told():
    with pytest.raises(MorsrError, match=r"nowhere|tiny"):
        Restorer.from_pretrained("nowhere.safetensors")
    with pytest.raises(ConfigError, match="dtype"):
        Restorer.from_pretrained("nowhere.safetensors", dtype="float8")
