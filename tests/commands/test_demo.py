"""`morsr demo`: an image is dropped in a real browser, the result appears, and nothing asks the network."""

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import restorer_twins as twins
from PIL import Image
from restorer_twins import photo

from morsr.commands import demo
from morsr.errors import InputError
from morsr.restoring import Restorer

if importlib.util.find_spec("gradio") is None:  # importing it takes seconds, in every process that collects
    pytest.skip("needs the extra `demo`", allow_module_level=True)


def test_a_file_becomes_previews_a_file_scores_and_a_plot(restorer):
    (before, after), path, scores, figure = demo.restore_upload(
        restorer, photo("photo.png"), {"scale": 2.5, "strength": 0.5}, Path("made")
    )
    assert (before.size, after.size) == ((60, 40), (60, 40))
    assert Path(path).name == "photo-x2.5.png"
    assert set(scores) == {"mean", "deviation"}
    restorer.restore_file("photo.png", "alone.png", scale=2.5, strength=0.5)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(Image.open("alone.png")))
    figure.savefig("ranks.png")
    plain = demo.restore_upload(
        Restorer(twins.small_generator(adapters=False), device="cpu"), Path("photo.png"), {}, Path("plain")
    )
    assert plain[2:] == (None, None)


def test_large_previews_are_reduced(monkeypatch):
    monkeypatch.setattr(demo, "PREVIEW", 20)
    previews, *_ = demo.restore_upload(twins.fake(), photo("photo.png", (40, 10)), {}, Path("made"))
    assert [preview.size for preview in previews] == [(20, 5), (20, 5)]


def test_an_output_beyond_the_cap_is_refused(restorer, monkeypatch):
    monkeypatch.setattr(demo, "MAX_OUTPUT", 24 * 16 * 16)
    with pytest.raises(InputError, match=r"photo\.png"):
        demo.restore_upload(restorer, photo("photo.png"), {"scale": 4.5}, Path("made"))


HOST, JSON = (b"host", b"127.0.0.1:7860"), (b"content-type", b"application/json")


@pytest.mark.parametrize(
    ("headers", "path", "body", "answered"),
    [
        ([HOST], "/", b"", True),
        ([HOST, (b"origin", b"http://127.0.0.1:7860")], "/queue/join", b"", True),
        ([(b"host", b"evil.example")], "/", b"", False),
        ([HOST, (b"origin", b"http://evil.example")], "/queue/join", b"", False),
        ([HOST, (b"origin", b"null")], "/queue/join", b"", False),
        ([], "/", b"", False),
        ([HOST], "/gradio_api/file=http://10.0.0.1/", b"", False),
        ([HOST, JSON], "/queue/join", b'{"path": "/tmp/a.png", "url": "http://127.0.0.1:7860/file=/tmp/a.png"}', True),
        ([HOST, JSON], "/queue/join", b'{"data": [{"path": "http://10.0.0.1/secret"}]}', False),
        ([HOST, JSON], "/queue/join", b'{"data": [[{"path": "\\u0068ttp://10.0.0.1/secret"}]]}', False),
        ([HOST, JSON], "/queue/join", b"{forged", False),
        ([HOST, (b"content-type", b"text/plain; x=multipart/")], "/queue/join", b'{"path": "http://10.0.0.1/"}', False),
        ([HOST], "/queue/join", b'{"path": "http://10.0.0.1/"}', False),
    ],
)
def test_only_the_pages_own_requests_are_answered_and_no_file_is_fetched_by_its_address(headers, path, body, answered):
    seen: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        seen.append(message.get("status"))

    async def app(*rest: Any) -> None:
        seen.append("answered")

    scope = {"type": "http", "method": "POST" if body else "GET", "path": path, "headers": headers}
    names = ("127.0.0.1", "localhost", "::1")
    asyncio.run(demo.OwnPagesOnly(app, names)(scope, receive, send))
    assert seen[0] == ("answered" if answered else 403)


def test_foreign_requests_are_refused_by_the_server(served):
    import urllib.error
    import urllib.request

    assert urllib.request.urlopen(served, timeout=30).status == 200
    foreign = urllib.request.Request(served, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign, timeout=30)


@pytest.fixture
def handlers(restorer):
    """What the page calls: restore, for its buttons, and leave, when a visitor cancels or closes it."""
    return {
        made.fn.__name__: made.fn
        for made in demo.build_page({"model": lambda: restorer}, folder=Path("results")).fns.values()
    }


def test_a_job_that_its_visitor_has_left_ends_and_the_next_one_runs(handlers, monkeypatch):
    gone, here = SimpleNamespace(session_hash="gone"), SimpleNamespace(session_hash="here")
    tiles: list[Any] = []

    def leaves(done: Any) -> None:
        tiles.append(done)
        handlers["leave"](gone)

    whole = Restorer.restore_file
    monkeypatch.setattr(Restorer, "restore_file", lambda self, *a, **k: whole(self, *a, **{**k, "tile": 48}))
    image = str(photo("photo.png", (48, 32)))
    with pytest.raises(Exception, match="Cancelled"):
        handlers["restore"](image, "model", 4.0, 1.0, "none", gone, leaves)
    assert len(tiles) == 1, "it does not run to its end"
    assert not list(Path("results").iterdir())
    assert Path(handlers["restore"](image, "model", 1.0, 1.0, "none", here, lambda done: None)[1]).is_file()
    with pytest.raises(Exception, match="Cancelled"):  # a job that had waited since before
        handlers["restore"](image, "model", 1.0, 1.0, "none", gone, lambda done: None)
    handlers["arrive"](gone)  # the same visitor comes back
    assert Path(handlers["restore"](image, "model", 1.0, 1.0, "none", gone, lambda done: None)[1]).is_file()


def test_a_job_that_takes_too_long_is_ended(handlers: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    image, who = str(photo("photo.png")), SimpleNamespace(session_hash="slow")
    handlers["restore"](image, "model", 1.0, 1.0, "none", who, lambda done: None)
    monkeypatch.setattr(demo.time, "monotonic", iter([0.0, demo.MAX_SECONDS + 1.0]).__next__)
    with pytest.raises(Exception, match=f"more than {demo.MAX_SECONDS} s"):
        handlers["restore"](image, "model", 1.0, 1.0, "none", who, lambda done: None)
    assert not list(Path("results").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 0)])
def test_a_stopped_demo_leaves_nothing_behind(number, code, tmp_path):
    place = tmp_path / "temporary"
    place.mkdir()
    command = [sys.executable, "-m", "morsr", "demo", "--device", "cpu"]
    with subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(place)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        (folder,) = place.glob("morsr-demo-*")
        (folder / "upload.png").touch()
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    assert not list(place.glob("morsr-demo-*"))


@pytest.fixture
def outside(monkeypatch):
    """Where this process asks the network for anything beyond the machine."""
    asked: list[str] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(str(address))
            raise OSError("no network in this test")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return asked


@pytest.fixture
def served(restorer, outside):
    page = demo.build_page({"model": lambda: restorer}, folder=Path("results"), examples=demo.write_examples(Path()))
    yield demo.launch(page, max_mb=1)
    page.close(verbose=False)


@pytest.mark.slow
def test_an_image_is_dropped_and_the_result_appears(served, outside):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs chromium")
    assert served.startswith("http://127.0.0.1:")
    asked: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.set_default_timeout(90_000)
        page.on("request", lambda request: asked.append(request.url))
        answer = page.goto(served)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        page.set_input_files("#upload input[type=file]", photo("photo.png"))
        page.wait_for_selector("#result img")
        page.wait_for_selector("#download a")
        page.wait_for_selector("#ranks img")
        assert "deviation" in page.inner_text("#scores")
        assert "photo-x4" in page.inner_text("#download")
        page.screenshot(path="page.png", full_page=True)
        # The page is built of light and dark parts, and the slider shows noise: a blank page has neither.
        assert np.asarray(Image.open("page.png").convert("L")).std() > 10
        page.reload()
        page.click("#examples button:has(img)")
        page.wait_for_selector("#download a")
        assert "noisy-x4" in page.inner_text("#download")
        Path("large.png").write_bytes(b"\x89PNG" + bytes(2_000_000))
        page.reload()
        page.set_input_files("#upload input[type=file]", "large.png")
        page.wait_for_selector("text=/maximum|exceed|too large/i")
        browser.close()
    own = (served, "data:", "blob:", served.replace("http", "ws"))
    assert not [url for url in asked if not url.startswith(own)]
    assert not outside
