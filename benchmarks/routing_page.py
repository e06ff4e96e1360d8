"""`morsr routing` over 200 images: seconds, megabytes, and how soon a browser has the page ready for a click.

    python benchmarks/routing_page.py [--images 200] [--out report.html] [--browser chromium] [--json FILE]

The images are crops of scikit-image's photographs, degraded by Real-ESRGAN's recipe. The page is opened in a headless
browser, where a script waits until it has loaded and been painted and then changes the first plot, as a click would;
the time from the start of the page to the end of that change is what is stated.
"""

from __future__ import annotations

import argparse
import http.server
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

PROBE = """<script>
addEventListener("load", () => requestAnimationFrame(() => requestAnimationFrame(async () => {
  await Plotly.restyle(document.querySelector(".js-plotly-plot"), {zmax: [2.5]});
  fetch("http://localhost:PORT/" + Math.round(performance.now()), {mode: "no-cors"});
})));
</script></body>"""


def write_photographs(folder: Path) -> int:
    """Eight crops of 256x256 of scikit-image's photographs as PNG; returns how many."""
    import skimage.data
    from PIL import Image

    crops = [
        image[top : top + 256, left : left + 256]
        for image in (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.chelsea())
        for top, left in ((0, 0), (30, 150))
    ]
    for index, crop in enumerate(crops):
        Image.fromarray(crop).save(folder / f"photo{index}.png")
    return len(crops)


def milliseconds_until_ready(page: Path, browser: str, *, patience: float = 120.0) -> float | None:
    """What the page itself measures in a headless browser, or None without one."""
    executable = shutil.which(browser)
    if executable is None:
        return None
    told: list[float] = []
    arrived = threading.Event()

    class Listener(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(float(self.path.strip("/")))
            self.send_response(204)
            self.end_headers()
            arrived.set()

        def log_message(self, *_: object) -> None:
            """Nothing: the result is enough."""

    server = http.server.HTTPServer(("localhost", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder) / "probed.html"
        text = page.read_text(encoding="utf-8")
        probed.write_text(text.replace("</body>", PROBE.replace("PORT", str(server.server_port))), encoding="utf-8")
        options = ["--headless=new", "--disable-gpu", "--window-size=1280,900", f"--user-data-dir={folder}/profile"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--no-sandbox")  # the browser refuses to run as root with it
        # A debugging port keeps the headless browser open until it is ended below.
        command = [executable, *options, "--remote-debugging-port=0", probed.as_uri()]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            arrived.wait(patience)
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
    return told[0] if told else None


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--out", type=Path, help="keep the page here")
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    from morsr.cli import main as morsr

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        copies = -(-options.images // write_photographs(folder / "photos"))
        page = folder / "report.html"
        started = time.perf_counter(), os.times()
        words = ["routing", str(folder / "photos"), "--degrade", "realesrgan", "--copies", str(copies)]
        if morsr([*words, "--out", str(page)]) != 0:
            raise SystemExit("morsr routing failed")
        used = os.times()
        result = {
            "images": copies * len(list((folder / "photos").iterdir())),
            "seconds": time.perf_counter() - started[0],
            "cpu_seconds": used.user + used.system - started[1].user - started[1].system,
            "megabytes": page.stat().st_size / 1e6,
            "ready_ms": milliseconds_until_ready(page, options.browser),
        }
        if options.out:
            shutil.copy(page, options.out)
    ready = "no browser found" if result["ready_ms"] is None else f"ready after {result['ready_ms']:.0f} ms"
    print(
        f"{result['images']} images in {result['seconds']:.1f} s ({result['cpu_seconds']:.1f} s of CPU time), page of "
        f"{result['megabytes']:.1f} MB, {ready}"
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
