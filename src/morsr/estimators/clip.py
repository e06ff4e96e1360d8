"""Degradation scores by CLIP: is the image nearer to the negative or to the positive text of a pair?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from morsr.errors import ConfigError, MissingDependencyError, WeightsError
from morsr.estimators.base import DegradationEstimator
from morsr.estimators.prompts import PromptSet, load_prompts
from morsr.estimators.views import native_crops
from morsr.files import save_tensors

CLIP_SOURCES = ("openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14")
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class TextCache(NamedTuple):
    """What is left of the text tower: unit embeddings (D, 2, E), positive first; names; the learned scale; a key.

    `model` is the `model_key` of the model that it belongs to, empty in files written before there was one.
    """

    embeddings: Tensor
    names: tuple[str, ...]
    logit_scale: float
    key: str
    model: str = ""


def prompt_key(prompts: PromptSet) -> str:
    """A hash of names and texts, by which a cache knows that it was made for other prompts."""
    return hashlib.sha256(repr(prompts).encode()).hexdigest()[:16]


def model_key(vision: nn.Module) -> str:
    """A hash of the image half's projection, by which a cache knows its model; the same in half precision."""
    projection: Tensor = vision.visual_projection.weight  # type: ignore[assignment, union-attr]
    return hashlib.sha256(projection.detach().half().cpu().numpy().tobytes()).hexdigest()[:16]


def save_text_cache(path: str | Path, cache: TextCache) -> None:
    """Write a cache as one safetensors file; CLIP's text tower and tokenizer are not needed to read it."""
    metadata = {
        "names": json.dumps(cache.names), "logit_scale": repr(cache.logit_scale), "key": cache.key,
        "model": cache.model,
    }  # fmt: skip
    save_tensors(path, {"text_embeddings": cache.embeddings.detach().float().cpu().contiguous()}, metadata)


def load_text_cache(path: str | Path) -> TextCache:
    """Read what `save_text_cache` wrote.

    Raises:
        WeightsError: no such file, or not such a cache.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            embeddings = file.get_tensor("text_embeddings")
        names = tuple(json.loads(metadata["names"]))
        return TextCache(embeddings, names, float(metadata["logit_scale"]), metadata["key"], metadata.get("model", ""))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"text cache {path}: cannot be read ({error}); make it with save_text_cache") from error


class ClipEstimator(DegradationEstimator):
    """One score per pair of texts: softmax over (negative, positive) of temperature times cosine.

        s = exp(tau d_neg) / (exp(tau d_pos) + exp(tau d_neg))

    Without a temperature (tau = 1) the scores of all photographs lie within 0.01 of 0.5 and a router sees a constant;
    the default is CLIP's own learned scale. Open in the paper.

    An image is looked at as a whole, resized to CLIP's input with anti-aliasing, and, where it is larger than that
    input, also through crops at native resolution (at most 4), since down-scaling hides noise and blocks; the cosines
    of the whole and the mean of the crops' count half each. The text tower is dropped once its embeddings are known.

    Args:
        model: a local folder, a hub id, or several of them in the order to be tried.
        prompts: a shipped set ("pairs", "ensemble") or the path of a YAML file. Several texts on one side are an
            ensemble: their unit embeddings are averaged and normalised again.
        temperature: tau; None takes CLIP's learned logit scale (about 100).
        text_cache: file of `save_text_cache`; then neither text tower nor tokenizer is loaded. It must be of the same
            model; of a file of an earlier version, which does not name its model, only the width is checked.
        local_files_only: never ask the hub.

    Raises:
        WeightsError: no source could be loaded; the message says which would do.
        ConfigError: prompts or temperature that cannot be used, or a cache made for other prompts or by another model.

    Source: MoR-DASR, degradation estimation; the learned scale as in CLIP-IQA.
    """

    text_embeddings: Tensor
    temperature: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        model: str | Path | Sequence[str | Path] = CLIP_SOURCES[:1],
        *,
        prompts: str | Path = "pairs",
        temperature: float | None = None,
        text_cache: str | Path | None = None,
        local_files_only: bool = False,
        worst: bool = False,
    ) -> None:
        super().__init__(worst=worst)
        if temperature is not None and not (0 < temperature < float("inf")):
            raise ConfigError(f"temperature: expected a positive number or None, got {temperature!r}")
        chosen = load_prompts(prompts)
        cache = load_text_cache(text_cache) if text_cache is not None else None
        if cache is not None and cache.key != prompt_key(chosen):
            raise ConfigError(f"text_cache {text_cache} was made for other prompts than {prompts!r}; make it again")
        self.vision, made, statistics = _load(model, chosen, cache, local_files_only)
        if cache is not None:
            _check_model(cache, self.vision, f"text_cache {text_cache}")
        self.vision.requires_grad_(False).eval()
        self.text_key, self.model_key = made.key, made.model
        self.names = (*made.names, "worst") if worst else made.names
        self.logit_scale = made.logit_scale
        self.size = int(self.vision.config.image_size)  # type: ignore[arg-type]
        self.register_buffer("text_embeddings", made.embeddings.float())
        self.register_buffer("temperature", torch.tensor(float(temperature or made.logit_scale)))
        for name, value in zip(("pixel_mean", "pixel_std"), statistics, strict=False):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    @property
    def text_cache(self) -> TextCache:
        """The cached text side, for `save_text_cache`."""
        return TextCache(
            self.text_embeddings,
            self.names[: len(self.text_embeddings)],
            self.logit_scale,
            self.text_key,
            self.model_key,
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """Unit image embeddings (N, E) of normalised pixels (N, 3, size, size)."""
        return F.normalize(self.vision(pixel_values=pixels).image_embeds.float(), dim=-1)

    def cosines(self, images: Tensor) -> Tensor:
        """Cosines (B, D, 2), positive first, of images (B, 3, H, W) in [0, 1]."""
        whole = self._fit(images)
        cosines = self._compare(whole)
        if max(images.shape[-2:]) > self.size:
            crops = native_crops(images, crop=self.size, grid=2)
            inside = self._compare(self._fit(rearrange(crops, "b k c h w -> (b k) c h w")))
            cosines = (cosines + reduce(inside, "(b k) d s -> b d s", "mean", b=len(images))) / 2
        return cosines

    def estimate(self, lr: Tensor) -> Tensor:
        difference = self.cosines(lr) @ lr.new_tensor([-1.0, 1.0])
        return torch.sigmoid(self.temperature.float() * difference)

    def _fit(self, images: Tensor) -> Tensor:
        # the whole image, its aspect ratio given up: a centre crop would leave parts of it unseen
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return (images - self.pixel_mean) / self.pixel_std

    def _compare(self, pixels: Tensor) -> Tensor:
        parameter = next(self.vision.parameters())
        embeddings = self.embed(pixels.to(parameter.dtype))
        return torch.einsum("be,dse->bds", embeddings, self.text_embeddings.float())


def _check_model(cache: TextCache, vision: nn.Module, name: str) -> None:
    width = int(vision.config.projection_dim)  # type: ignore[arg-type, union-attr]
    if cache.embeddings.shape[-1] != width:
        raise ConfigError(
            f"{name} was made by another model: expected embeddings of {width} numbers, got "
            f"{cache.embeddings.shape[-1]}; make it again with this one"
        )
    if cache.model and cache.model != model_key(vision):
        raise ConfigError(f"{name} was made by another model than the one that was loaded; make it again with this one")


def _load(
    model: str | Path | Sequence[str | Path], prompts: PromptSet, cache: TextCache | None, local_files_only: bool
) -> tuple[nn.Module, TextCache, tuple[Sequence[float], Sequence[float]]]:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("the clip estimator needs transformers: pip install transformers") from error

    sources = [model] if isinstance(model, (str, Path)) else list(model)
    failures = []
    for source in sources:
        settings: dict[str, Any] = {"local_files_only": local_files_only or Path(source).is_dir()}
        try:
            if cache is None:
                made, vision = _embed_texts(transformers, str(source), prompts, settings)
            else:
                made, vision = cache, _image_half(transformers, str(source), settings)
            return vision, made, _pixel_statistics(Path(source))
        except (OSError, ValueError, RuntimeError) as error:
            failures.append(f"{source} ({str(error).strip().splitlines()[0]})")
    raise WeightsError(
        f"no CLIP weights: tried {'; '.join(failures) or 'nothing'}. Give `model` (`morsr severity`: --weights) a "
        f"folder with config.json, model.safetensors and the tokenizer's files, or a hub id such as "
        f"{' or '.join(CLIP_SOURCES)}; "
        'or choose estimator "learned" or "frequency", which need no download'
    )


def _strict(transformers: Any, kind: Any, source: str, **settings: Any) -> nn.Module:
    """Load all weights of a model, or fail: by itself transformers fills what is missing with random numbers."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        model, report = kind.from_pretrained(source, output_loading_info=True, **settings)
    finally:
        transformers.logging.set_verbosity(verbosity)
    lacking = sorted(str(key) for name in ("missing_keys", "mismatched_keys") for key in report.get(name, ()))
    if lacking:
        raise ValueError(f"its weights lack or misfit {len(lacking)} tensors of the configuration, {lacking[0]} first")
    return model.eval()


def _image_half(transformers: Any, source: str, settings: dict[str, Any]) -> nn.Module:
    config = transformers.CLIPConfig.from_pretrained(source, **settings)
    vision_config = config.vision_config
    vision_config.projection_dim = config.projection_dim  # the vision config's own entry is a default, not the truth
    return _strict(transformers, transformers.CLIPVisionModelWithProjection, source, config=vision_config, **settings)


def _pixel_statistics(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return PIXEL_MEAN, PIXEL_STD
    content = json.loads(file.read_text(encoding="utf-8"))
    return content.get("image_mean", PIXEL_MEAN), content.get("image_std", PIXEL_STD)


@torch.no_grad()
def _embed_texts(
    transformers: Any, source: str, prompts: PromptSet, settings: dict[str, Any]
) -> tuple[TextCache, nn.Module]:
    whole = _strict(transformers, transformers.CLIPModel, source, **settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **settings)

    def side(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        pooled = whole.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        unit = F.normalize(whole.text_projection(pooled).float(), dim=-1)
        return F.normalize(unit.mean(dim=0), dim=-1)

    rows = [torch.stack([side(pos), side(neg)]) for pos, neg in zip(prompts.positive, prompts.negative, strict=False)]
    scale = float(whole.logit_scale.detach().float().exp())
    # the image half of the same model: what CLIPVisionModelWithProjection would load, without reading the file again
    vision_config = whole.config.vision_config
    vision_config.projection_dim = whole.config.projection_dim
    with torch.device("meta"):
        vision = transformers.CLIPVisionModelWithProjection(vision_config)
    vision.vision_model, vision.visual_projection = whole.vision_model, whole.visual_projection
    return TextCache(torch.stack(rows), prompts.names, scale, prompt_key(prompts), model_key(vision)), vision
