"""Layers that are not torch's plain Linear and Conv2d, or are not used as such: adapted rightly, or refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from morsr.adapters import AdaptedLayer, MoRConfig, active_adapters, adapter_parameters, auto_merged, inject, merged
from morsr.errors import ConfigError
from morsr.models.precision import Float32Conv2d


class StandardizedConv2d(nn.Conv2d):
    """As timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias, self.stride, self.padding)


class ScaledLinear(nn.Linear):
    """As the layers of networks with an equalised learning rate."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.25, self.bias)


class SwappedConv2d(nn.Conv2d):
    """Computes what Conv2d does, in its own words."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Tensor:
        return F.conv2d(hidden_states, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class SamePadded(nn.Conv2d):
    """As timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        sizes = zip(x.shape[2:], self.stride, self.kernel_size, strict=True)
        pads = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in sizes]
        x = F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride)


class SamePaddedInside(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(F.pad(x, (1, 1, 1, 1)), weight, bias)


class TwoOutputs(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


def lora(*targets: str) -> MoRConfig:
    return MoRConfig.of_kind("lora", num_ranks=4, targets=targets)


def adapted(layer: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(layer).eval()
    inject(model, lora("0"))
    fill(model)
    return model


def fill(model: nn.Module, name: str = "generator") -> None:
    for parameter in adapter_parameters(model, name):
        nn.init.normal_(parameter, std=0.3)


def pruned(layer: nn.Linear) -> nn.Linear:
    import torch.nn.utils.prune

    return torch.nn.utils.prune.random_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-any-return]


COMPUTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), (3, 8)),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), (3, 8)),
    "weight_norm by a hook": (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), (3, 8)),
    "pruned": (lambda: pruned(nn.Linear(8, 8)), (3, 8)),
    "standardized": (lambda: StandardizedConv2d(4, 8, 3, padding=1), (2, 4, 6, 6)),
    "scaled": (lambda: ScaledLinear(8, 8), (3, 8)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
@torch.no_grad()
def test_weights_that_are_computed_are_gathered_and_never_merged(kind: str) -> None:
    build, shape = COMPUTED[kind]
    model, inputs = adapted(build()), torch.randn(*shape)
    with active_adapters(model, None):
        base = model(inputs)
    gathered = model(inputs)
    assert (gathered - base).abs().max() > 0.1
    with (
        pytest.raises(ConfigError, match=r"0: .* computes or changes its weight before use.*do not merge"),
        merged(model),
    ):
        pass
    with auto_merged(model, 1000) as merge:
        assert merge is None
        assert torch.equal(model(inputs), gathered)


@pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning")
@pytest.mark.parametrize("kind", ["diffusers linear", "diffusers conv", "float32", "same words", "no forward"])
@torch.no_grad()
def test_subclasses_that_compute_as_torch_does_are_adapted_and_merged(kind: str) -> None:
    from diffusers.models.lora import LoRACompatibleConv, LoRACompatibleLinear

    layer: nn.Module = {
        "diffusers linear": lambda: LoRACompatibleLinear(4, 8),
        "diffusers conv": lambda: LoRACompatibleConv(4, 8, 3, padding=1, padding_mode="reflect"),
        "float32": lambda: Float32Conv2d(4, 8, 3, stride=2, dilation=2),
        "same words": lambda: SwappedConv2d(4, 8, 3, groups=2, padding="same"),
        "no forward": lambda: type("Named", (nn.Conv2d,), {})(4, 8, 1),
    }[kind]()
    inputs = torch.randn(2, 4, 9, 9) if isinstance(layer, nn.Conv2d) else torch.randn(3, 4)
    weight = layer.weight.clone()
    model = adapted(layer)
    gathered = model(inputs)
    with merged(model):
        torch.testing.assert_close(model(inputs), gathered, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            lambda: SamePadded(4, 8, 3, stride=2),
            r"SamePadded has a forward of its own.*expected \(1, 8, 4, 4\).* got \(1, 8, 5, 5\)",
        ),
        (lambda: SamePadded(4, 8, 2, stride=2), "SamePadded has a forward of its own"),
        (lambda: SamePaddedInside(4, 8, 3), "SamePaddedInside has a forward of its own"),
        (lambda: TwoOutputs(4, 8), "TwoOutputs has a forward of its own.*got tuple"),
        (lambda: TwoInputs(4, 8), "TwoInputs has a forward of its own.*got TypeError"),
    ],
)
def test_layers_that_compute_another_thing_are_refused(layer: Callable[[], nn.Module], message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), layer())
    with pytest.raises(ConfigError, match=message):
        inject(model, lora(".*"))
    assert not any(isinstance(module, AdaptedLayer) for module in model)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("targets", [(".*",), ("0",)])
def test_lazy_models_are_refused_before_anything_is_changed(targets: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(8))
    with pytest.raises(ConfigError, match=r"1\.weight of this lazy model is not there yet; run the model once"):
        inject(model, lora(*targets))
    assert model[0].weight.requires_grad
    model(torch.ones(2, 4))
    assert len(inject(model, lora(".*")).matched) == 2


def test_layers_of_timm_are_refused_or_adapted() -> None:
    layers = pytest.importorskip("timm.layers")
    with pytest.raises(ConfigError, match="0: Conv2dSame has a forward of its own"):
        inject(nn.Sequential(layers.Conv2dSame(4, 8, 3, stride=2)), lora("0"))
    model = adapted(layers.StdConv2d(4, 8, 3))
    with pytest.raises(ConfigError, match="0: StdConv2d computes"), merged(model):
        pass


def encoder(**settings: object) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, **settings)  # type: ignore[arg-type]
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def effect(model: nn.Module) -> float:
    inputs = torch.randn(2, 5, 16)
    with torch.no_grad():
        output = model(inputs)
        with active_adapters(model, None):
            return float((output - model(inputs)).abs().max())


def test_linear_layers_that_torchs_encoder_skips_are_refused() -> None:
    model = encoder(batch_first=True)
    with pytest.raises(ConfigError, match=r"layers\.0\.linear1: .*set_fastpath_enabled\(False\)"):
        inject(model, lora("linear1", "linear2"))
    assert all(parameter.requires_grad for parameter in model.parameters())
    other = encoder()  # takes no fast path
    inject(other, lora("linear1", "linear2"))
    fill(other)
    assert effect(other) > 0.1
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inject(model, lora("linear1", "linear2"))
        fill(model)
        assert effect(model) > 0.1
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


class Reader(nn.Module):
    """As torchvision's Swin: one layer is called, of the others the weights are read."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(F.linear(x, self.qkv.weight, self.qkv.bias), self.proj.weight, self.proj.bias)
        return self.head(x.to(self.head.weight.dtype))


def test_weights_that_are_read_but_never_called_are_named_once() -> None:
    model = Reader()
    inject(model, lora("qkv", "proj", "head"))
    inputs = torch.randn(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with active_adapters(model, None):
            for _ in range(100):
                model(inputs)
        model.eval()
        with merged(model):  # the merged weight is the one that is read
            for _ in range(100):
                model(inputs)
        for _ in range(60):
            model(inputs)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(200):
            model(inputs)
    assert ["set 'generator' has no effect in qkv, proj. Leave" in str(warning.message) for warning in said] == [True]


@pytest.mark.parametrize("with_kwargs", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_hooks_that_change_the_input_change_it_for_the_ranks(grad: bool, with_kwargs: bool) -> None:
    layer = nn.Linear(4, 4)
    if with_kwargs:
        layer.register_forward_pre_hook(lambda _, args, kwargs: ((args[0] * 2,), kwargs), with_kwargs=True)
    else:
        layer.register_forward_pre_hook(lambda _, args: args[0] * 2)
    model, inputs = adapted(layer), torch.randn(3, 4)
    with torch.set_grad_enabled(grad):
        output = model(inputs)
    with merged(model):
        torch.testing.assert_close(output, model(inputs), rtol=1e-4, atol=1e-5)
    assert len(layer._forward_pre_hooks) == 1


@pytest.mark.parametrize("change", [{"padding_mode": "circular"}, {"stride": (2, 1)}, {"dilation": (2, 2)}])
def test_settings_of_a_convolution_count_as_they_are_when_it_runs(change: dict[str, object]) -> None:
    model = adapted(nn.Conv2d(3, 4, 3, padding=1))
    for key, value in change.items():
        setattr(model[0].base_layer, key, value)
    inputs = torch.randn(2, 3, 8, 8)
    output = model(inputs)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), output, rtol=1e-4, atol=1e-5)
        with merged(model):
            torch.testing.assert_close(model(inputs), output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", ["auto", "gathered", "masked"])
@pytest.mark.parametrize("groups", [1, 3])
def test_images_without_a_batch_dimension(compute: str, groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=groups)).eval()
    config = MoRConfig(num_ranks=6, num_shared=2, top_k=2, num_zero=1, targets=("0",))
    context = inject(model, config, condition_dim=2).context
    fill(model)
    context.compute = compute
    context.condition = torch.randn(1, 2)
    image = torch.randn(3, 6, 7)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            output = model(image)
            torch.testing.assert_close(output, model(image[None])[0])
    model(image).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model))


def test_input_may_be_named() -> None:
    model, inputs = adapted(nn.Linear(3, 4)), torch.randn(2, 3)
    assert torch.equal(model[0](input=inputs), model[0](inputs))


def test_a_child_that_holds_its_parent() -> None:
    model = nn.Module()
    model.first, model.child = nn.Linear(3, 3), nn.Module()
    model.child.parent, model.child.second = model, nn.Linear(3, 3)
    report = inject(model, lora("first", "second"))
    assert [entry.name for entry in report.matched] == ["first", "child.second"]
    assert isinstance(model.child.second, AdaptedLayer)


def test_a_plain_lora_leaves_the_number_of_scores_out_of_account() -> None:
    report = inject(nn.Sequential(nn.Linear(3, 3)), lora("0"), condition_dim=5)
    assert report.context.condition_dim == 0
