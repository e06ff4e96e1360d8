"""`morsr demo`: a local web page to try a model on one's own images. Nothing leaves the machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from jsonargparse.typing import PositiveInt, restricted_number_type

from morsr.commands._common import Dtype
from morsr.commands.upscale import sample
from morsr.errors import ConfigError, InputError, MissingDependencyError, MorsrError
from morsr.files import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from morsr.evaluation.routing import RoutingTable
    from morsr.restoring import Restorer

Port = restricted_number_type("Port", int, [(">=", 1), ("<=", 65535)], docstring="A port.")

PREVIEW = 2048  # longest side in pixels of what the slider shows; the file to download has the full size
MAX_OUTPUT = 64_000_000  # pixels
MAX_SECONDS = 600  # for one image

# Only what the page itself serves may be loaded, whatever a version of gradio asks for.
CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'self'"
)

BARS = {
    "blur": "blur",
    "noise": "noise",
    "jpeg": "JPEG",
    "compression": "JPEG",
    "resize": "resolution",
    "overall": "overall",
}
"""Degradation scores that the page shows, by the names people know; an estimator with other names shows all."""


def run(
    *,
    model: str = "tiny",
    base: str | None = None,
    prompt: str | None = None,
    estimator: str | None = None,
    router: str | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    host: str = "127.0.0.1",
    port: Port | None = None,  # type: ignore[valid-type]
    max_mb: PositiveInt = 20,
    open: bool = False,
) -> int:
    """Open a page in which an image is dropped and restored.

    It is reached from this machine alone unless --host says otherwise, and neither the page nor the server asks
    anything of the network.

    Args:
        model: shipped preset, adapters file, saved folder or checkpoint
        base: folder or hub id of the base model, if the adapters do not bring it, or class path of your own
        prompt: text instead of the model's own; the base must have its text encoder
        estimator: class path of an estimator of your own, or where CLIP's or the learned one's weights are
        router: class path of a router of your own
        device: auto, cpu, cuda, cuda:1, mps, …
        dtype: precision
        host: address to listen at
        port: default: the first free one from 7860
        max_mb: largest upload in megabytes
        open: open the page in a browser
    """
    import_gradio()

    from morsr.restoring import Restorer

    restorer = Restorer.from_pretrained(
        model, base=base, prompt=prompt, estimator=estimator, router=router, device=device, dtype=dtype
    )
    with tempfile.TemporaryDirectory(prefix="morsr-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads and results leave with the page
        models = {printable(model): lambda: restorer}
        if base is prompt is None:
            models.setdefault("tiny", cache(partial(Restorer.from_pretrained, "tiny", device=device, dtype=dtype)))
        page = build_page(models, folder=Path(folder, "results"), examples=write_examples(Path(folder)))
        try:
            url = launch(page, host=host, port=port, max_mb=max_mb, browser=open)
            with contextlib.suppress(KeyboardInterrupt):  # the page's usual end, from this line on
                print(f"{url}    (stop with Ctrl-C)", flush=True)
                page.block_thread()
        finally:
            page.close(verbose=False)
    return 0


def import_gradio() -> Any:
    """Import gradio with its questions to the network switched off."""
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
    """Start serving a page in the background and return its address."""
    gr = import_gradio()
    from starlette.middleware import Middleware

    local = host in ("127.0.0.1", "localhost", "::1")
    hosts = ("127.0.0.1", "localhost", "::1") if local else ("*", host, "localhost", socket.gethostname())
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # twenty lines for every forged request
    # gradio's own fonts come from the network in some versions; a machine has its own.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, url, _ = page.queue(max_size=16).launch(
            server_name=host, server_port=port, inbrowser=browser, share=False, quiet=True, prevent_thread_lock=True,
            max_file_size=max_mb * 10**6, footer_links=[], enable_monitoring=False, ssr_mode=False, pwa=False,
            theme=theme, css=CSS, app_kwargs={"middleware": [Middleware(OwnPagesOnly, hosts=hosts)]},
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"{host}:{port or 7860}: cannot listen there ({error})") from error
    return url


CSS = """
.gradio-container {max-width: 1200px !important; width: 100% !important; margin: 0 auto}
footer {display: none !important}
#examples img {height: 72px; width: auto}
#download .empty {min-height: 0; height: 60px}
"""


def build_page(models: Mapping[str, Callable[[], Restorer]], *, folder: Path, examples: Sequence[Path] = ()) -> Any:
    """The page, not yet served.

    Args:
        models: by the names that the page offers, functions that load one; the first one is loaded now.
        folder: holds the results of the last image.
        examples: image files to try.
    """
    gr = import_gradio()
    first, routed = next(iter(models)), is_routed(next(iter(models.values()))())
    left: set[str] = set()  # sessions whose page was closed, or that cancelled
    with gr.Blocks(title=f"morsr: {first}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("## Restore an image\nDrop a photograph or take an example: it is restored on this machine.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                upload = gr.File(label="Image", file_types=["image"], height=140, elem_id="upload")
                thumbnails = gr.Dataset(
                    components=[gr.Image(visible=False)], samples=[[str(path)] for path in examples], type="index",
                    label="Examples", elem_id="examples", visible=bool(examples),
                )  # fmt: skip
                chosen = gr.Dropdown(list(models), value=first, label="Model", visible=len(models) > 1)
                with gr.Accordion("Settings", open=False):
                    scale = gr.Slider(1, 8, value=4, step=0.5, label="Scale", elem_id="scale")
                    strength = gr.Slider(
                        0, 1, value=1, step=0.05, label="Strength",
                        info="0 keeps the shared ranks only, nearer to the input; 1 is as trained",
                        visible=routed,
                    )  # fmt: skip
                    color = gr.Dropdown(["wavelet", "adain", "none"], value="wavelet", label="Colour correction")
                with gr.Row():
                    again = gr.Button("Restore", variant="primary", elem_id="restore", min_width=100)
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=100)
            with gr.Column(scale=3, min_width=320):
                slider = gr.ImageSlider(
                    label="Bicubic | restored", format="png", interactive=False, elem_id="result", max_height=640
                )
                download = gr.File(label="Restored file, full size", interactive=False, elem_id="download", height=80)
        with gr.Row(visible=routed):
            with gr.Column(scale=1, min_width=280):
                scores = gr.Label(label="Degradation (100 % is worst)", elem_id="scores", num_top_classes=12)
            with gr.Column(scale=3, min_width=320):
                ranks = gr.Plot(label="Which ranks ran", show_label=False, elem_id="ranks")

        bar = gr.Progress()  # gradio knows a bar by its being a default

        def restore(
            path: str | None, name: str, scale: float, strength: float, color: str, request: Any = None,
            progress: Any = bar,
        ) -> tuple[Any, ...]:  # fmt: skip
            session, started = getattr(request, "session_hash", None), time.monotonic()

            def stop_if_left() -> None:
                if session in left:
                    raise MorsrError("Cancelled.")  # or the page was closed: the next visitor need not wait

            def watched(done: int, total: int) -> None:
                stop_if_left()
                if time.monotonic() - started > MAX_SECONDS:
                    raise MorsrError(f"This takes more than {MAX_SECONDS} s; lower the scale, or use morsr upscale.")
                progress((done, total))

            try:
                stop_if_left()
                if path is None:
                    raise InputError("Drop an image first.")
                model = models[name]()
                settings = {"scale": scale, "color": color, "strength": strength if is_routed(model) else 1.0}
                # gradio has copied the last result to where it serves files from; its copies are deleted after an hour.
                shutil.rmtree(folder, ignore_errors=True)
                os.makedirs(folder)
                return restore_upload(model, Path(path), settings, folder, watched)
            except MorsrError as error:
                raise gr.Error(str(error).replace(str(path), Path(path or "").name), print_exception=False) from error

        def arrive(request: Any) -> None:
            left.discard(request.session_hash)

        def leave(request: Any) -> None:
            left.add(request.session_hash)

        for function in (restore, arrive, leave):  # gradio hands in the request where the annotation says so
            function.__annotations__["request"] = gr.Request
        page.unload(leave)
        at_once = {"queue": False, "api_visibility": "private"}
        cancel.click(leave, **at_once)
        inputs, outputs = [upload, chosen, scale, strength, color], [slider, download, scores, ranks]
        shared = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        taken = thumbnails.click(lambda index: str(examples[index]), thumbnails, upload, **at_once)
        for event in (upload.upload, again.click, taken.then):
            event(arrive, **at_once).then(restore, inputs, outputs, **shared)
    return page


def write_examples(folder: Path) -> list[Path]:
    """Write one small photograph in three conditions: noisy, blurred, and as a JPEG."""
    import numpy as np
    from PIL import Image, ImageFilter

    photo = Image.open(sample("sample:chelsea"), formats=["PNG"]).convert("RGB")
    photo = photo.resize((225, 150), Image.Resampling.BOX)
    noise = np.random.default_rng(0).normal(0, 20, (150, 225, 3))
    noisy = Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8))
    made = {"noisy.png": noisy, "blurred.png": photo.filter(ImageFilter.GaussianBlur(1.5)), "compressed.jpg": photo}
    for name, image in made.items():
        image.save(folder / name, quality=20)  # of the JPEG; PNG has none
    return [folder / name for name in made]


def is_routed(restorer: Restorer) -> bool:
    """Whether a model has routed adapters."""
    return restorer.generator.adapters is not None and restorer.generator.adapters.is_routed


def restore_upload(
    restorer: Restorer, source: Path, settings: dict[str, Any], folder: Path, progress: Any = None
) -> tuple[tuple[Image.Image, Image.Image], str, dict[str, float] | None, Figure | None]:
    """Restore an uploaded file into a folder by the settings of `Restorer.restore_file`.

    Returns:
        Previews of the bicubic and the restored image, the path of the full file, the scores by name, and the plot of
        the ranks (both None for a model without routing).

    Raises:
        MorsrError: not an image, an output of more than MAX_OUTPUT pixels, or what else the restorer refuses.
    """
    from PIL import Image

    from morsr.evaluation.routing import RoutingTable
    from morsr.imaging import read
    from morsr.imaging.listing import FORMATS
    from morsr.restoring import Settings

    checked, picture = Settings(**settings), read(source)
    if (pixels := picture.size[0] * picture.size[1] * checked.scale**2) > MAX_OUTPUT:
        raise InputError(
            f"{source.name}: the output would have {pixels / 1e6:.0f} megapixels, at most {MAX_OUTPUT / 1e6:.0f} are "
            "made here; lower the scale, or use morsr upscale"
        )
    suffix = source.suffix.lower() if source.suffix.lower() in FORMATS else ".png"
    target = folder / f"{source.stem}-x{checked.scale:g}{suffix}"
    restorer.restore_file(source, target, progress=progress, **vars(checked))
    after = Image.fromarray(read(target).rgb8)
    after.thumbnail((PREVIEW, PREVIEW))
    before = Image.fromarray(picture.rgb8).resize(after.size)
    if not is_routed(restorer):
        return (before, after), str(target), None, None
    table = RoutingTable.from_images(restorer, [source])
    found = dict(zip(table.score_names, table.scores[0].tolist(), strict=True))
    scores = {BARS[name]: value for name, value in found.items() if name in BARS} or found
    table = replace(table, gates=table.gates * checked.strength, update=table.update * checked.strength)
    return (before, after), str(target), scores, ranks_figure(table)


def ranks_figure(table: RoutingTable) -> Figure:
    """Draw one image's gates, layers by slots; a zero slot that was chosen counts as 1."""
    from morsr.imaging.figures import load_figure

    shown = table.gates[0].where(table.chosen[0] < table.num_real, 1.0)
    gates = shown.new_zeros(len(shown), table.num_slots).scatter(-1, table.chosen[0], shown)
    title = (
        f"{table.active_ranks().mean():.1f} active ranks, {table.num_shared} of them shared\n"
        f"gate mass {table.gate_mass().mean():.2f}, effective ranks {table.effective_ranks().mean():.1f}\n"
        f"routed update {table.update.nanmean():.2f} × the shared one"
    )
    return load_figure({title: gates}, table.layer_names, table.num_zero, label="gate", middle=None)


class OwnPagesOnly:
    """Refuses what other pages send, and adds the content policy to every answer; plain ASGI, so streams stay streams.

    A foreign Host or Origin is another site's page that reaches this machine through the visitor's browser. A file
    named by a URL would be fetched by gradio from this machine.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", CONTENT_POLICY.encode())
                message = {**message, "headers": [*message.get("headers", ()), policy]}
            await send(message)

        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers, waiting = dict(scope["headers"]), []
        answered = allowed(headers, unquote(scope["path"]), self.hosts)
        is_upload = headers.get(b"content-type", b"").startswith(b"multipart/")
        if answered and scope.get("method") == "POST" and not is_upload:
            body, more = b"", True
            while more and len(body) < 10**6:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
            answered = not more and local_files_only(body)
            waiting.append({"type": "http.request", "body": body, "more_body": False})

        async def again() -> Any:
            return waiting.pop() if waiting else await receive()

        if answered:
            await self.app(scope, again, with_policy)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"only this page's own requests are answered"})


def allowed(headers: dict[bytes, bytes], path: str, hosts: tuple[str, ...]) -> bool:
    """Whether a request, its path without escapes, comes from the page itself, which is reached by these hosts.

    With "*" among the hosts, numeric addresses are too.
    """
    host = urlsplit("//" + headers.get(b"host", b"").decode("latin-1")).hostname or ""
    origin = headers.get(b"origin")
    numeric = host.replace(".", "").isdigit() or ":" in host
    same = origin is None or urlsplit(origin.decode("latin-1")).hostname == host
    return (host in hosts or (numeric and "*" in hosts)) and same and "://" not in path and "=http" not in path


def local_files_only(body: bytes) -> bool:
    """Whether a request's JSON can be read and names no file by a URL."""
    try:
        plain = json.dumps(json.loads(body or b"null"))  # no letter that could be written plainly is escaped
    except (ValueError, RecursionError):
        return False
    return not re.search(r'"path": "(//|[^"]*://)', plain)
