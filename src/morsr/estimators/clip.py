"""Degradation scores by CLIP: is the image nearer to the negative or to the positive text of a pair?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from morsr.errors import ConfigError, WeightsError
from morsr.estimators.base import DegradationEstimator
from morsr.estimators.views import mean_over_crops
from morsr.files import expanded
from morsr.hub import half_precision, repository_of, say_fetching

CLIP_SOURCE = "openai/clip-vit-base-patch32"
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


Prompts = dict[str, list[list[str]]]
"""By dimension: the texts of the positive and of the negative side."""


class ClipEstimator(DegradationEstimator):
    """One score per pair of texts: softmax over (negative, positive) of temperature times cosine.

        s = exp(tau d_neg) / (exp(tau d_pos) + exp(tau d_neg))

    Without a temperature (tau = 1) the scores of all photographs lie within 0.01 of 0.5 and a router sees a constant;
    the default is CLIP's own learned scale. Open in the paper.

    An image is seen as a whole, resized to CLIP's input with anti-aliasing, and, where it is larger than that input,
    also through crops at native resolution (at most 4), since down-scaling hides noise and blocks; the cosines of the
    whole and the mean of the crops' count half each. The text tower is dropped once its embeddings are known.

    Args:
        model: a local folder or a hub id (org/name or org/name@revision); safetensors only. A file of adapters stores
            the hub id that the folder's config.json names, else the folder's name.
        prompts: a shipped set ("pairs", "ensemble"), the path of a YAML file, or its content. Several texts on one
            side are an ensemble: their unit embeddings are averaged and normalised again.
        temperature: tau; None takes CLIP's learned logit scale (about 100).
        digest: of the weights that a router was trained with; other weights are refused.
        worst: see `DegradationEstimator`.

    Source: MoR-DASR, degradation estimation; the learned scale as in CLIP-IQA.
    """

    text_embeddings: Tensor
    temperature: Tensor
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        model: str | Path = CLIP_SOURCE,
        *,
        prompts: str | Path | Mapping[str, Any] = "pairs",
        temperature: float | None = None,
        digest: str | None = None,
        worst: bool = False,
    ) -> None:
        if temperature is not None and not (0 < temperature < float("inf")):
            raise ConfigError(f"temperature: expected a positive number or None, got {temperature!r}")
        self_described = prompts if isinstance(prompts, str) and prompts in prompt_set_names() else _content(prompts)
        chosen = load_prompts(prompts)
        super().__init__(list(chosen), worst=worst)
        whole, embeddings = _load(str(model), chosen, digest)
        self.vision, self.projection = whole.vision_model, whole.visual_projection
        self.requires_grad_(False)
        given = {} if temperature is None else {"temperature": temperature}
        self._settings = {
            "model": _hub_id(str(model)), "prompts": self_described, "digest": weights_digest(whole), **given,
        }  # fmt: skip
        self.size = int(whole.config.vision_config.image_size)
        self.register_buffer("text_embeddings", embeddings)
        self.register_buffer("temperature", torch.tensor(float(temperature or whole.logit_scale.exp())))
        for name, value in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def settings(self) -> dict[str, Any]:
        return {**self._settings, **super().settings()}

    def estimate(self, lr: Tensor) -> Tensor:
        difference = self.cosines(lr) @ lr.new_tensor([-1.0, 1.0])
        return torch.sigmoid(self.temperature.float() * difference)

    def cosines(self, images: Tensor) -> Tensor:
        """Cosines (B, D, 2), positive first, of images (B, 3, H, W) in [0, 1]."""
        cosines = self._compare(images)
        if max(images.shape[-2:]) > self.size:
            cosines = (cosines + mean_over_crops(self._compare, images, crop=self.size, grid=2)) / 2
        return cosines

    def _compare(self, images: Tensor) -> Tensor:
        # the whole image, its aspect ratio given up: a centre crop would leave parts of it unseen
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (images - self.pixel_mean) / self.pixel_std
        embeddings = F.normalize(self.projection(self.vision(pixel_values=pixels).pooler_output).float(), dim=-1)
        return torch.einsum("be,dse->bds", embeddings, self.text_embeddings.float())


# texts


def prompt_set_names() -> tuple[str, ...]:
    """The prompt sets that come with the package."""
    folder = resources.files("morsr.estimators") / "prompts"
    return tuple(sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_prompts(source: str | Path | Mapping[str, Any] = "pairs") -> Prompts:
    """A prompt set: the name of a shipped one, the path of a YAML file of the same form, or its content.

    Raises:
        ConfigError: no such set or file, or not of that form.
    """
    content = _content(source)
    try:
        templates = _texts(content.get("templates", "{}"))
        prompts = {
            str(name): [
                [template.format(text) for template in templates for text in _texts(sides[side])]
                for side in ("positive", "negative")
            ]
            for name, sides in content["dimensions"].items()
        }
        unknown = set(content) - {"dimensions", "templates"} or any(len(s) > 2 for s in content["dimensions"].values())
        if not prompts or unknown or any(template.count("{}") != 1 for template in templates):
            raise ValueError
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        where = "" if isinstance(source, Mapping) else f" {source}"
        raise ConfigError(
            f"prompts{where}: expected `dimensions` with texts for `positive` and `negative` each, and at most "
            "`templates` with one {} each"
        ) from error
    return prompts


def _content(source: str | Path | Mapping[str, Any]) -> Any:
    import yaml

    if isinstance(source, Mapping):
        return source
    shipped = str(source) in prompt_set_names()
    path = resources.files("morsr.estimators") / "prompts" / f"{source}.yaml" if shipped else expanded(source)
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        known, text = " or ".join(prompt_set_names()), str(error).splitlines()[0]
        raise ConfigError(f"prompts: expected {known} or a YAML file, got {source} ({text})") from error


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError
    return texts


# weights


def weights_digest(model: Any) -> str:
    """A hash of the image tower's projection, which names the weights of a CLIPModel; the same in half precision."""
    return hashlib.sha256(model.visual_projection.weight.detach().half().cpu().numpy().tobytes()).hexdigest()[:16]


def _hub_id(source: str) -> str:
    """What to call the weights on another machine: a hub id itself, or the one that a folder's config.json names."""
    folder = expanded(source)
    if not folder.is_dir():
        return source
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_name_or_path", "")
    return stored if repository_of(stored) is not None else folder.name


def _load(source: str, prompts: Prompts, digest: str | None) -> tuple[Any, Tensor]:
    """A CLIPModel in evaluation mode, and the unit text embeddings (D, 2, E)."""
    import transformers

    folder = expanded(source)
    place, revision = (None if folder.is_dir() else repository_of(source)) or (str(folder), None)
    if not folder.is_dir():
        say_fetching(source)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, revision=revision)
        # never a pickle: .bin files are not read
        model, report = transformers.CLIPModel.from_pretrained(
            place, revision=revision, variant=half_precision(folder, "model"), output_loading_info=True,
            use_safetensors=True, dtype=torch.float32,
        )  # fmt: skip
        # by itself transformers fills what is missing with random numbers
        if lacking := [str(key) for name in ("missing_keys", "mismatched_keys") for key in report.get(name, ())]:
            raise ValueError(f"its weights lack or misfit {len(lacking)} tensors, {min(lacking)} first")
        if digest not in (None, weights_digest(model)):
            raise ValueError("other weights than the router was trained with")
        return model, _embed(model.eval(), tokenizer, prompts)
    except Exception as error:  # transformers, safetensors, tokenizers and the hub's client each raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"no CLIP weights: {source} ({reason}). Give `model` a folder with config.json, model.safetensors and the "
            f'tokenizer\'s files, or a hub id such as {CLIP_SOURCE}; or choose the estimator "learned" or "frequency", '
            "which need no download"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


@torch.no_grad()
def _embed(model: Any, tokenizer: Any, prompts: Prompts) -> Tensor:
    def side(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        unit = F.normalize(model.text_projection(pooled).float(), dim=-1)
        return F.normalize(unit.mean(dim=0), dim=-1)

    return torch.stack([torch.stack([side(texts) for texts in sides]) for sides in prompts.values()])
