"""The restorer: kinds, sizes, scales, tiles, routing, the nets under them, and files."""

from pathlib import Path
from typing import Any

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

import morsr
from morsr.errors import ConfigError, InputError, MorsrError, WeightsError
from morsr.imaging import read, write
from morsr.models.generator import OneStepConfig
from morsr.restoring import Restorer, Settings
from morsr.restoring import restorer as restorer_module
from morsr.restoring.tiles import tiling


def bicubic(images: Tensor, scale: float = 4.0) -> Tensor:
    size = [round(side * scale) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bicubic").clamp(0, 1)


def weights(restorer: Restorer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in restorer.generator.state_dict().items()}


@settings(max_examples=30)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    scale=st.sampled_from([1, 1.0, 1.5, 2.3, 4, 8]),
    tile=st.sampled_from(["auto", None, 1, 32, 50]),
    color=st.sampled_from(["wavelet", "adain", "none"]),
)
def test_a_network_that_does_nothing_gives_the_exact_enlargement(height, width, scale, tile, color):
    images, shrink = torch.rand(1, 3, height, width), OneStepConfig(scale=4).shrink(scale)
    before = images.clone()
    restored = twins.fake()(images, scale, tile=tile, color=color if shrink == 1 else "none")
    fine = [round(side * scale) * shrink for side in (height, width)]
    enlarged = F.interpolate(images, size=fine, mode="bicubic").clamp(0, 1)
    assert_close(restored, F.avg_pool2d(enlarged, shrink), atol=2e-5, rtol=0)
    assert_close(images, before, atol=0, rtol=0)


@pytest.mark.parametrize("tile", [None, 128])
def test_a_sharp_photograph_is_hardly_changed_at_scale_1(tile):
    from skimage import data

    photo = torch.from_numpy(data.chelsea()[100:164, 150:214]).permute(2, 0, 1)[None] / 255
    restored = Restorer.from_pretrained("tiny", device="cpu")(photo, scale=1, tile=tile)
    assert -10 * (restored - photo).square().mean().log10() > 34


@pytest.mark.parametrize(("size", "scale"), [((9, 13), 4), ((1, 1), 4), ((5, 40), 4.5), ((16, 24), 4)])
def test_one_pass_equals_the_generator(restorer, size, scale):
    """Padding included: no size of the first three fits the grid, and networks look beyond the image's border."""
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = restorer.generator(images, scale=scale).sr.clamp(0, 1)
    assert expected.shape == (2, 3, round(size[0] * scale), round(size[1] * scale))
    assert_close(restorer(images, scale, tile=None, color="none"), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_come_back_with_alpha_beside_the_colours(dtype):
    top = 1 if dtype is np.float32 else np.iinfo(dtype).max
    array = (np.random.default_rng(0).random((12, 17, 4)) * top).astype(dtype)
    restored = twins.fake(lambda images: images * 0)(array, color="none")
    assert (restored.shape, restored.dtype) == ((48, 68, 4), dtype)
    alpha = bicubic(torch.from_numpy(array[..., 3].astype(np.float32) / top)[None, None])
    assert_close(torch.from_numpy(restored[..., 3].astype(np.float32) / top), alpha[0, 0], atol=0.003, rtol=0)
    assert restored[..., :3].max() == 0


def test_a_list_gives_a_list_and_a_batch_a_batch(restorer):
    images = torch.rand(3, 3, 16, 16) * torch.tensor([1.0, 0.5, 0.1]).view(3, 1, 1, 1)
    together, routing = restorer(images, return_routing=True)
    one_by_one, routings = restorer(list(images.split(1)), return_routing=True)
    assert routing.batch == len(one_by_one) == len(routings) == 3
    for index in range(3):
        assert_close(one_by_one[index], together[index : index + 1], atol=1e-4, rtol=0)
        assert_close(routings[index].gates, routing.image(index).gates)
    assert [type(one) for one in restorer([images, Image.new("L", (4, 4))])] == [Tensor, Image.Image]
    assert restorer([]) == []


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "16 bits", "JPEG", "rows"])
@pytest.mark.parametrize("red", [0, 3, 40])
def test_a_pale_image_gets_no_tint(kind, red, monkeypatch):
    """Gray or almost gray pictures keep their own chroma; others get the network's."""
    factors = torch.tensor([1.0, 0.8, 0.9]).view(3, 1, 1)
    restorer = twins.fake(lambda part: part * factors)
    array = np.repeat(np.linspace(40, 160, 12 * 12).reshape(12, 12, 1), 3, axis=2).round().astype(np.uint8)
    array[..., 0] += red
    if kind == "RGBA":
        array = np.dstack([array, np.full((12, 12), 90, np.uint8)])
    if kind == "16 bits":
        array = array.astype(np.uint16) * 257
    if kind == "rows":
        monkeypatch.setattr(restorer_module, "STREAM_PIXELS", 0)
    source = "in.jpg" if kind == "JPEG" else "in.png"
    write(read(array), source)
    restorer.restore_file(source, "out.png", color="none")
    made, white = read("out.png").rgb, bicubic(read(source).rgb)
    levels = 255 * (made[:, 0] - made[:, 1:])
    if red == 40:
        assert_close(made, white * factors, atol=1 / 255, rtol=0)
    elif red == 0:
        assert (levels == 0).all()
    else:
        assert (levels - red).abs().max() <= (2 if kind == "JPEG" else 1)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"scale": 0.5}, ConfigError),
        ({"scale": float("nan")}, ConfigError),
        ({"strength": -1}, ConfigError),
        ({"strength": 0.5}, ConfigError),  # no routed adapters
        ({"tile": 0}, ConfigError),
        ({"color": "histogram"}, ConfigError),
        ({"color_strength": 2}, ConfigError),
        ({"color": "none", "color_strength": 0.5}, ConfigError),
        ({"routing": "pixel"}, ConfigError),
        ({"routing": "tile"}, ConfigError),  # no routed adapters
        ({"routing": "tile", "tile": None}, ConfigError),
        ({"scal": 2}, TypeError),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_done(wrong, error):
    restorer = twins.fake()
    with pytest.raises(error, match=next(iter(wrong))):
        restorer(torch.rand(1, 3, 4, 4), **wrong)
    Image.new("RGB", (4, 4)).save("in.png")
    with pytest.raises(error, match=next(iter(wrong))):
        restorer.restore_file("in.png", "out.png", **wrong)
    assert not restorer.generator.sizes


@pytest.mark.parametrize(
    "bad", [torch.full((1, 3, 4, 4), float("nan")), torch.rand(1, 3, 4, 4) * 255, "no.png", None, 3, [None], {}]
)
def test_bad_images_are_refused(bad):
    with pytest.raises(InputError if isinstance(bad, (Tensor, str)) else TypeError):
        twins.fake()(bad)


@pytest.mark.parametrize(("height", "width"), [(128, 512), (16, 512), (512, 16), (300, 40)])
def test_a_tile_size_is_honoured_on_any_proportions(height, width):
    restorer = twins.fake()
    restorer(torch.rand(1, 3, height // 4, width // 4), tile=64)
    assert {max(size) for size in restorer.generator.sizes} == {64}
    assert {min(size) for size in restorer.generator.sizes} == {min(64, -(-height // 16) * 16, -(-width // 16) * 16)}
    restorer.generator.sizes.clear()
    restorer(torch.rand(1, 3, height // 4, width // 4), tile=70)
    assert max(max(size) for size in restorer.generator.sizes) == 80, "rounded up to what the networks take"


def test_tiles_show_no_seam_and_have_the_colours_of_the_whole():
    """A network that sees beyond a tile's border and shifts its colours."""
    images = torch.rand(1, 3, 128, 128)
    restorer = twins.fake(lambda part: twins.smoothing(part) * 0.8 + 0.1)
    whole, tiled = (restorer(images, tile=tile, color="none") for tile in (None, 128))
    plan = tiling((512, 512), 128, 16)
    edges = sorted(({w.left for w in plan} | {w.left + w.width for w in plan}) - {0, 512})
    steps = [
        made.diff(dim=-1).abs().mean(dim=(0, 1, 2))[[edge - 1 for edge in edges]].mean() for made in (tiled, whole)
    ]
    assert len(edges) >= 6
    assert abs(steps[0] / steps[1] - 1) < 0.02
    assert -10 * (tiled - whole).square().mean().log10() > 50
    for color in ("wavelet", "adain"):
        whole, tiled = (restorer(images, tile=tile, color=color) for tile in (None, 128))
        assert_close(whole.mean(dim=(-2, -1)), tiled.mean(dim=(-2, -1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_leads_to_smaller_tiles(error):
    def small_only(images: Tensor) -> Tensor:
        if max(images.shape[-2:]) > 100:
            raise error
        return images

    images = torch.rand(1, 3, 50, 90)
    restorer = twins.fake(small_only)
    with pytest.warns(UserWarning, match="memory ran out"):
        restored = restorer(images)
    assert_close(restored, bicubic(images), atol=2e-5, rtol=0)
    tried = [max(size) for size in restorer.generator.sizes]
    assert sum(side > 100 for side in tried) <= 2, "what did not fit once is not tried again"


def failing(error: Exception) -> Any:
    def fail(images: Tensor) -> Tensor:
        raise error

    return fail


@pytest.mark.filterwarnings("ignore:memory ran out")
@pytest.mark.parametrize(
    ("function", "error"),
    [
        (failing(torch.OutOfMemoryError("out of memory")), InputError),
        (failing(RuntimeError("shapes do not fit")), RuntimeError),
        (lambda images: images * float("nan"), WeightsError),
        (lambda images: images * float("inf"), WeightsError),
    ],
)
def test_what_cannot_be_helped_is_an_error(function, error):
    with pytest.raises(error):
        twins.fake(function)(torch.rand(1, 3, 50, 50))


def test_nan_in_half_precision_is_computed_again_in_float32(restorer, monkeypatch):
    images = torch.rand(1, 3, 16, 16)
    expected = restorer(images)
    half = Restorer(restorer.generator, device="cpu", dtype="bfloat16")
    assert_close(half(images), expected, atol=0.05, rtol=0)
    denoise = restorer.generator.denoise
    monkeypatch.setattr(
        restorer.generator,
        "denoise",
        lambda latents: denoise(latents) * (float("nan") if torch.is_autocast_enabled("cpu") else 1),
    )
    assert_close(half(images), expected, atol=1e-6, rtol=0)


def test_an_output_larger_than_the_memory_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(restorer_module, "free_memory", lambda device: 2**20)
    restorer = twins.fake()
    with pytest.raises(InputError, match="400 x 400"):
        restorer(torch.rand(1, 3, 100, 100))
    assert not restorer.generator.sizes


def test_strength_scales_the_gates_and_leaves_the_model_as_it_was(restorer):
    images, before = torch.rand(1, 3, 16, 16), weights(restorer)
    plain, none = restorer(images), restorer(images, strength=0.0)
    assert (none - plain).abs().max() > 1e-4
    assert_close(restorer(images), plain, atol=0, rtol=0)
    assert_close(weights(restorer), before, atol=0, rtol=0)
    assert restorer.generator.adapters.routing is None


def test_all_tiles_of_an_image_share_one_routing_merged_or_not(restorer, monkeypatch):
    images, calls, before = torch.full((1, 3, 16, 64), 0.1), [], weights(restorer)
    images[..., 32:] = 0.5 + 0.5 * torch.rand(1, 3, 16, 32)  # half of it would be routed otherwise
    condition = restorer.generator.route
    monkeypatch.setattr(restorer.generator, "route", lambda lr: (calls.append(tuple(lr.shape)), condition(lr))[1])
    merged, routing = restorer(images, tile=64, return_routing=True)
    assert calls == [(1, 3, 16, 64)]
    assert routing.batch == 1
    assert_close(weights(restorer), before, atol=0, rtol=0)
    monkeypatch.setattr(restorer_module, "SMALL_NETWORK", 0)
    monkeypatch.setattr(restorer_module, "MERGE_PASSES", 1000)
    assert_close(restorer(images, tile=64), merged, atol=1e-4, rtol=0)


def test_a_routing_can_be_given(restorer):
    dark, bright = torch.rand(1, 3, 16, 16) * 0.2, torch.rand(1, 3, 16, 16)
    alone, own = restorer(bright, return_routing=True)
    _, first = restorer(dark, return_routing=True)
    assert_close(restorer(bright, routing=own), alone, atol=1e-6, rtol=0)
    given, used = restorer(torch.cat([bright, bright]), routing=first, return_routing=True)
    assert_close(used.image(1).gates, first.gates, atol=0, rtol=0)
    assert (given[:1] - alone).abs().max() > 1e-4
    with pytest.raises(ConfigError, match="routing"):
        restorer(bright, routing=restorer(torch.cat([dark, bright]), return_routing=True)[1])


def test_a_model_without_adapters_restores():
    restorer = Restorer(twins.small_generator(adapters=False), device="cpu")
    restored, routing = restorer(torch.rand(1, 3, 16, 16), return_routing=True)
    assert (routing, restored.shape) == (None, (1, 3, 64, 64))
    assert "no adapters" in repr(restorer)


@pytest.mark.parametrize(
    ("name", "channels", "top", "color"),
    [("out.png", 1, 255, "wavelet"), ("out.tif", 3, 255, "adain"), ("out.png", 4, 255, "adain"),
     ("out.tif", 3, 65535, "wavelet"), ("out.png", 3, 65535, "adain")],
)  # fmt: skip
def test_large_files_are_written_by_rows_and_equal_those_made_in_memory(name, channels, top, color, monkeypatch):
    kind = np.uint8 if top == 255 else np.uint16
    array = (np.random.default_rng(0).random((150, 24, channels)) * top).astype(kind)
    write(read(array), "in.png")
    restorer = twins.fake(twins.smoothing)
    restorer.restore_file("in.png", f"memory-{name}", tile=48, color=color)
    monkeypatch.setattr(restorer_module, "STREAM_PIXELS", 0)
    done: list[tuple[int, int]] = []
    restorer.restore_file(
        "in.png", f"stream-{name}", tile=48, color=color, progress=lambda now, total: done.append((now, total))
    )
    memory, stream = read(f"memory-{name}"), read(f"stream-{name}")
    assert stream.samples.dtype == memory.samples.dtype == kind
    assert stream.samples.shape == memory.samples.shape == (600, 96, channels)
    assert_close(stream.rgb, memory.rgb, atol=1.01 / top, rtol=0)
    assert done[-1][0] == done[-1][1] > 4


def test_a_failure_while_writing_leaves_no_file_and_no_merged_weights(restorer, monkeypatch):
    Image.fromarray((np.random.default_rng(0).random((32, 64, 3)) * 255).astype(np.uint8)).save("in.png")
    monkeypatch.setattr(restorer_module, "STREAM_PIXELS", 0)
    before = weights(restorer)

    def full(done: int, total: int) -> None:
        if done == 3:
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        restorer.restore_file("in.png", "out.png", tile=64, progress=full)
    assert [path.name for path in Path().iterdir()] == ["in.png"]
    assert_close(weights(restorer), before, atol=0, rtol=0)
    restorer.restore_file("in.png", "out.png", tile=64)
    assert Image.open("out.png").size == (256, 128)


@pytest.mark.parametrize("target", ["in.png", "./in.png", "link.png", "out.jpg", "out.docx", "in.png/out.png"])
def test_targets_that_cannot_be_written_are_refused_before_the_work(target):
    """The input itself by three names, a format without transparency, one that is unknown, and no folder."""
    Image.new("RGBA", (4, 4), (1, 2, 3, 4)).save("in.png")
    before = Path("in.png").read_bytes()
    Path("link.png").symlink_to("in.png")
    restorer = twins.fake()
    with pytest.raises(InputError):
        restorer.restore_file("in.png", target)
    assert Path("in.png").read_bytes() == before
    assert not restorer.generator.sizes


def test_every_odd_image_is_restored(shared_data):
    restorer = twins.fake()
    for path in sorted((shared_data / "odd_images").iterdir()):
        restorer.restore_file(path, path.name, scale=1.5)
        before, after = read(path), read(path.name)
        assert after.size == tuple(round(side * 1.5) for side in before.size)
        assert after.samples.dtype == before.samples.dtype
        assert after.samples.shape[2] == before.samples.shape[2]
        assert after.notes.get("icc-profile-data") == before.notes.get("icc-profile-data")
        shown = 1.0 if after.alpha_plane is None else after.alpha_plane  # what is hidden is filled when it is read
        assert ((after.rgb - bicubic(before.rgb, 1.5)) * shown).abs().mean() < 0.01


def test_a_model_by_name():
    with pytest.raises(MorsrError):
        Restorer.from_pretrained("nowhere.safetensors")
    with pytest.raises(ConfigError, match="dtype"):
        Restorer.from_pretrained("nowhere.safetensors", dtype="float8")
    restorer = morsr.Restorer.from_pretrained("tiny", device="cpu")
    assert "28 ranks" in repr(restorer)
    assert "morsr/tiny" in repr(restorer)


def test_settings_of_the_call_are_those_of_the_class():
    import inspect
    from dataclasses import fields

    parameters = inspect.signature(Restorer.__call__).parameters
    assert {field.name: field.default for field in fields(Settings)} == {
        name: parameter.default for name, parameter in parameters.items() if name in Settings.__dataclass_fields__
    }
