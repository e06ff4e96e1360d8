"""`morsr routing`: which ranks run for which image, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from morsr.commands._common import existing, output_file, say
from morsr.errors import ConfigError, InputError
from morsr.files import printable

if TYPE_CHECKING:
    from morsr.degradation import DegradationParameters, DegradationRecipe


def run(
    input: Path,
    *,
    out: Path,
    model: str = "tiny",
    base: str | None = None,
    estimator: str | None = None,
    router: str | None = None,
    table: Path | None = None,
    degrade: str | None = None,
    copies: PositiveInt = 1,
    seed: int | None = None,
    device: str = "auto",
) -> int:
    """Write one HTML page, which works offline, on the ranks that are active for each image.

    Images are routed with the degradation estimator and the router, which takes no UNet. The page shows the load of
    every slot, what each slot is for, zero slots against severity, and a light, a medium and a severe image with their
    routed ranks switched off. Returns 1 if some files could not be read.

    Args:
        input: image, folder of images, or a table that --table wrote
        out: the page, .html
        model: shipped preset, adapters file, saved folder or checkpoint
        base: folder or hub id of the base model, if the adapters do not bring it, or class path of your own
        estimator: class path of an estimator of your own, or where CLIP's or the learned one's weights are
        router: class path of a router of your own
        table: also write the routing as one .safetensors
        degrade: the images are sharp: degrade them by this recipe first, so that the true degradations are known
        copies: with --degrade: degradations per image
        seed: with --degrade: seed of the degradations (default: 0)
        device: auto, cpu, cuda, cuda:1, mps, …
    """
    existing(input)
    output_file(out, "--out", ".html", ".htm")
    if table is not None:
        output_file(table, "--table", ".safetensors")
    if degrade is None and (seed is not None or copies > 1):
        raise ConfigError("--seed and --copies go with --degrade: an image as it is has one routing")
    if input.suffix == ".safetensors" and (degrade or table or base or estimator or router or model != "tiny"):
        raise ConfigError("a table is routed already: --degrade, --table and the model's options go with images")

    from morsr.data.sources import distinct_names
    from morsr.degradation import DegradationRecipe
    from morsr.degradation.keys import check_seed
    from morsr.evaluation.report import examine, write_report
    from morsr.evaluation.routing import RoutingTable
    from morsr.imaging import list_images
    from morsr.imaging.files import read_planes

    check_seed(seed or 0)
    recipe = DegradationRecipe.load(degrade) if degrade else None
    if input.suffix == ".safetensors":
        write_report(RoutingTable.load(input), out, title=printable(f"Which ranks run: {input.name}"))
        print(printable(str(out)))
        return 0

    from morsr.restoring import Restorer

    paths = list_images(input)
    names = [printable(name) for name in distinct_names(dict.fromkeys(map(str, paths), input)).values()]
    restorer = Restorer.from_pretrained(
        model, base=base, estimator=estimator, router=router, device=device, dtype="float32"
    )
    pictures, routed_names, drawn, failed = _lr_images(
        paths, names, recipe, copies=copies, seed=seed or 0, scale=restorer.generator.one_step.scale
    )
    if not pictures:
        raise InputError(f"{input}: none of the {len(paths)} images can be read; the first: {failed[0]}")
    routed = RoutingTable.from_images(restorer, pictures, drawn, recipe=recipe or "realesrgan", names=routed_names)
    if table is not None:
        routed.save(table)
    order = routed.severity.argsort().tolist()
    examples = [  # a light, a medium and a severe image
        examine(restorer.generator, read_planes(pictures[row]).to(restorer.device), name=routed.names[row])
        for row in dict.fromkeys((order[0], order[len(order) // 2], order[-1]))
    ]
    kinds = {kind: read_planes(pictures[row])[0] for kind, row in routed.typical().items()}
    notes = [printable(f"{len(failed)} of {len(paths)} images could not be read: {failed[0]}")] if failed else []
    title = printable(f"Which ranks run: {model} on {input.name}")
    write_report(routed, out, examples=examples, kinds=kinds, notes=notes, title=title)
    for line in failed:
        say(line)
    print(printable(str(out)))
    return 1 if failed else 0


def _lr_images(
    paths: list[Path], names: list[str], recipe: DegradationRecipe | None, *, copies: int, seed: int, scale: int
) -> tuple[list[Any], list[str], DegradationParameters | None, list[str]]:
    """LR images that can be read, their names and parameters if degraded here, and complaints about the others."""
    import torch
    from tqdm import tqdm

    from morsr.degradation import DegradationParameters, apply, sample_keys
    from morsr.evaluation.report import centre
    from morsr.imaging.files import read_planes

    pictures: list[Any] = []
    kept: list[str] = []
    drawn: list[DegradationParameters] = []
    failed: list[str] = []
    for index, (path, name) in enumerate(zip(tqdm(paths, unit="image", disable=None), names, strict=True)):
        try:
            image = read_planes(path)
            if recipe is None:
                pictures.append(path)
                kept.append(name)
                continue
            hr = centre(image, 512)
            hr = hr[..., : hr.shape[-2] // scale * scale, : hr.shape[-1] // scale * scale]  # as the recipes need it
            if min(hr.shape[-2:]) < 64:
                raise InputError(f"{path}: expected at least 64 pixels each way to degrade")
        except InputError as error:
            failed.append(str(error) if str(path) in str(error) else f"{path}: {error}")
            continue
        drawn.append(recipe.sample(sample_keys(seed, 0, index * copies + torch.arange(copies))))
        pictures += apply(hr.expand(copies, -1, -1, -1), drawn[-1], scale=scale).split(1)
        kept += [f"{name}-{copy}" if copies > 1 else name for copy in range(copies)]
    return pictures, kept, DegradationParameters.concatenate(drawn) if drawn else None, failed
