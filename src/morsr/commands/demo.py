"""`morsr demo`: a local web page to try a model on one's own images. Nothing leaves the machine."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morsr.commands._model import add_model_arguments, model_arguments
from morsr.errors import ConfigError, MissingDependencyError, MorsrError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from morsr.restoring import Restorer

HELP = (
    "Open a page in which an image is dropped and restored. It is reached from this machine alone unless --host says "
    "otherwise, and neither the page nor the server asks anything of the network."
)

PREVIEW = 2048
"""Longest side in pixels of what the slider shows; the file to download has the full size."""

# Only what the page itself serves may be loaded, whatever a version of gradio asks for.
CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'self'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_model_arguments(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, …")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--max-mb", type=int, default=20, help="largest upload in megabytes (default: 20)")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def run(options: argparse.Namespace) -> int:
    """Serve the page until it is stopped.

    Raises:
        MorsrError: a model that cannot be loaded, gradio missing, or an address that cannot be used.
    """
    if options.max_mb < 1:
        raise ConfigError(f"--max-mb: expected at least 1, got {options.max_mb}")
    if options.port is not None and not 1 <= options.port <= 65535:
        raise ConfigError(f"--port: expected 1 to 65535, got {options.port}")
    import_gradio()

    from morsr.restoring import Restorer

    restorer = Restorer.from_pretrained(**model_arguments(options), device=options.device, dtype=options.dtype)
    page = build_page(restorer, title=f"morsr: {options.model}")
    url = launch(page, host=options.host, port=options.port, max_mb=options.max_mb, browser=options.open)
    print(f"{url}    (stop with Ctrl-C)", flush=True)
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
    return 0


def import_gradio() -> Any:
    """Import gradio with its questions to the network switched off.

    Raises:
        MissingDependencyError: it is not installed.
    """
    for name, value in (("GRADIO_ANALYTICS_ENABLED", "False"), ("HF_HUB_DISABLE_TELEMETRY", "1")):
        os.environ[name] = value
    try:
        import gradio
    except ImportError as error:
        raise MissingDependencyError("the page needs gradio: pip install 'morsr[demo]'") from error
    return gradio


def launch(
    page: Any, *, host: str = "127.0.0.1", port: int | None = None, max_mb: int = 20, browser: bool = False
) -> str:
    """Start serving a page in the background and return its address.

    Raises:
        ConfigError: the address cannot be used.
    """
    gr = import_gradio()
    from starlette.middleware import Middleware

    # gradio's own fonts come from the network in some versions; a machine has its own.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = page.queue(max_size=16).launch(
            server_name=host, server_port=port, inbrowser=browser, share=False, quiet=True, prevent_thread_lock=True,
            max_file_size=max_mb * 10**6, footer_links=[], enable_monitoring=False, ssr_mode=False, pwa=False,
            theme=theme, css=CSS, app_kwargs={"middleware": [Middleware(_OwnContentOnly)]},
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{host}:{port or 7860}: cannot listen there ({error})") from error
    return url


class _OwnContentOnly:
    """Adds the content policy to every answer; plain ASGI, so that streamed answers stay streamed."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto}
footer {display: none !important}
"""


def build_page(restorer: Restorer, *, title: str = "morsr") -> Any:
    """The page, not yet served."""
    gr = import_gradio()
    context = restorer.generator.adapters
    routed = context is not None and context.config.is_routed
    results = tempfile.TemporaryDirectory(prefix="morsr-demo-", ignore_cleanup_errors=True)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("## Restore an image\nDrop a photograph: it is enlarged and restored on this machine.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                upload = gr.File(label="Image", file_types=["image"], height=140, elem_id="upload")
                scale = gr.Slider(1, 8, value=4, step=0.5, label="Scale", elem_id="scale")
                strength = gr.Slider(
                    0, 1, value=1, step=0.05, label="Strength",
                    info="0 keeps the shared ranks only, nearer to the input; 1 is as trained", visible=routed,
                )  # fmt: skip
                color = gr.Dropdown(["wavelet", "adain", "none"], value="wavelet", label="Colour correction")
                again = gr.Button("Restore", variant="primary", elem_id="restore")
            with gr.Column(scale=3):
                slider = gr.ImageSlider(
                    label="Bicubic | restored", format="png", interactive=False, elem_id="result", max_height=640
                )
                download = gr.File(label="Restored file, full size", interactive=False, elem_id="download", height=80)
        with gr.Row(visible=routed):
            scores = gr.Label(label="Degradation scores (100 % is worst)", elem_id="scores")
            ranks = gr.Plot(label="Which ranks ran", elem_id="ranks")

        bar = gr.Progress()  # gradio knows a bar by its being a default

        def restore(
            path: str | None, scale: float, strength: float, color: str, progress: Any = bar
        ) -> tuple[Any, ...]:
            if path is None:
                raise gr.Error("Drop an image first.", print_exception=False)
            settings: dict[str, Any] = {"scale": scale, "color": color}
            if routed:
                settings["strength"] = strength
            # gradio has copied the last result to where it serves files from; its copies are deleted after an hour.
            shutil.rmtree(results.name, ignore_errors=True)
            os.makedirs(results.name)
            try:
                return restore_upload(
                    restorer, Path(path), settings, Path(results.name), lambda done, total: progress((done, total))
                )
            except MorsrError as error:
                raise gr.Error(str(error).replace(str(path), Path(path).name), print_exception=False) from error

        inputs, outputs = [upload, scale, strength, color], [slider, download, scores, ranks]
        shared = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        for event in (upload.upload, again.click):
            event(restore, inputs, outputs, **shared)
    return page


def restore_upload(
    restorer: Restorer, source: Path, settings: dict[str, Any], folder: Path, progress: Any = None
) -> tuple[tuple[Image.Image, Image.Image], str, dict[str, float] | None, Figure | None]:
    """Restore an uploaded file.

    Args:
        source: the file.
        settings: see `Restorer.restore_file`.
        folder: where the full file goes.
        progress: called with (tiles done, tiles in all).

    Returns:
        Previews of the bicubic and the restored image, the path of the full file, the scores by name, and the plot of
        the ranks (both None for a model without routing).

    Raises:
        MorsrError: not an image, or what else the restorer refuses.
    """
    from morsr.imaging.files import thumbnail
    from morsr.imaging.listing import FORMATS
    from morsr.restoring import Settings

    checked = Settings(**settings)
    suffix = source.suffix.lower() if source.suffix.lower() in FORMATS else ".png"
    target = folder / f"{source.stem}-x{checked.scale:g}{suffix}"
    restorer.restore_file(source, target, progress=progress, **vars(checked))
    after = thumbnail(target, PREVIEW)
    before = thumbnail(source, PREVIEW).resize(after.size)
    routed = restorer.generator.adapters is not None and restorer.generator.adapters.config.is_routed
    if not routed:
        return (before, after), str(target), None, None
    scores, figure = routing_of(restorer, source, strength=checked.strength)
    return (before, after), str(target), scores, figure


def routing_of(restorer: Restorer, source: Path, *, strength: float) -> tuple[dict[str, float], Figure]:
    """The degradation scores of a file, and a plot of the ranks that run for it at this strength."""
    from morsr.evaluation.routing import RoutingTable

    table = RoutingTable.from_images(restorer, [source])
    chosen, selected = table.chosen.transpose(0, 1), table.gates.transpose(0, 1)
    gates = selected.new_zeros(*chosen.shape[:2], table.num_slots).scatter(-1, chosen, selected)
    scores = dict(zip(table.score_names, table.scores[0].tolist(), strict=True))
    figure = ranks_figure(
        gates[:, 0] * strength, num_shared=table.num_shared, num_zero=table.num_zero, expert_rank=table.expert_rank
    )
    return scores, figure


def ranks_figure(gates_LN: Any, *, num_shared: int, num_zero: int, expert_rank: int = 1) -> Figure:
    """Draw one image's gates: layers from top to bottom, shared ranks, routed experts and zero experts beside.

    Args:
        gates_LN: (L, N) factor of each slot, zero experts last.
        num_shared: ranks that always run.
        num_zero: slots that run nothing.
        expert_rank: ranks of each routed expert.
    """
    import numpy as np
    from matplotlib.figure import Figure

    gates = gates_LN.numpy()
    layers, slots = gates.shape
    real = slots - num_zero
    figure = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    axis = figure.add_subplot()
    ran = np.where(gates[:, :real] > 0, gates[:, :real], np.nan)
    shown = np.concatenate([np.ones((layers, num_shared)), ran, np.full((layers, num_zero), np.nan)], axis=1)
    axis.set_facecolor("0.93")
    image = axis.imshow(shown, aspect="auto", cmap="viridis_r", vmin=0, interpolation="nearest")
    zero = np.where(gates[:, real:] > 0, 1.0, np.nan)
    if num_zero:
        extent = (num_shared + real - 0.5, num_shared + slots - 0.5, layers - 0.5, -0.5)
        axis.imshow(zero, aspect="auto", cmap="Oranges", vmin=0, vmax=1.4, extent=extent, interpolation="nearest")
    for edge in (num_shared, num_shared + real):
        axis.axvline(edge - 0.5, color="0.4", linewidth=1)
    places = [(num_shared - 1) / 2, num_shared + (real - 1) / 2, num_shared + real + (num_zero - 1) / 2]
    names = [
        f"{num_shared} shared",
        f"{real} routed" + f", {expert_rank} ranks each" * (expert_rank > 1),
        f"{num_zero} zero",
    ]
    shown_names = [(place, name) for place, name in zip(places, names, strict=True) if not name.startswith("0 ")]
    axis.set_xticks([place for place, _ in shown_names], [name for _, name in shown_names])
    axis.set_xlim(-0.5, num_shared + slots - 0.5)
    axis.set_ylim(layers - 0.5, -0.5)
    axis.set_ylabel("adapted layer")
    count = num_shared + expert_rank * np.isfinite(ran).sum(axis=1).mean()
    axis.set_title(
        f"{count:.1f} of {num_shared + expert_rank * real} ranks ran per layer on average", fontsize=10, loc="right"
    )
    figure.colorbar(image, ax=axis, label="gate")
    return figure
