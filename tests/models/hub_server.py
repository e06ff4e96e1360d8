"""A small hub: it serves folders as repositories; organisations of some names refuse or break off."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

COMMIT = "a" * 40
REFUSED = {"gated": (403, "GatedRepo"), "broken": (500, "")}
REVISIONS = {"main", "v1", COMMIT, "refs/pr/1"}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does: the list of a repository's files, and the files."""

    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[str]

    def log_message(self, *args: Any) -> None:
        """Not on the error stream."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.asked.append("/".join(parts))
        listed = parts[:2] == ["api", "models"]
        (organisation, name), rest = (parts[2:4], parts[4:]) if listed else (parts[:2], parts[2:])
        folder = self.root / organisation / name
        if organisation in REFUSED:
            self.send(b"{}", *REFUSED[organisation])
        elif not folder.is_dir():
            self.send(b"{}", 404, "RepoNotFound")
        elif listed:
            revision = rest[1] if len(rest) > 1 else "main"
            if revision not in REVISIONS:
                self.send(b"{}", 404, "RevisionNotFound")
                return
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if rest and rest[0] == "tree":
                found: Any = [{"type": "file", "oid": self.tag(path), "size": path.stat().st_size,
                               "path": path.relative_to(folder).as_posix()} for path in files]  # fmt: skip
            else:
                names = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
                found = {"id": f"{organisation}/{name}", "sha": COMMIT, "siblings": names}
            self.send(json.dumps(found).encode())
        elif (path := folder.joinpath(*rest[2:])).is_file():
            data = path.read_bytes()
            start = int((self.headers.get("range") or "=0").split("=")[1].split("-")[0])
            cut = organisation == "cut" and path.suffix == ".safetensors"
            self.send(data[start:], 206 if start else 200, tag=self.tag(path), whole=not cut)
        else:
            self.send(b"{}", 404, "EntryNotFound")

    @staticmethod
    def tag(path: Path) -> str:
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def send(self, body: bytes, code: int = 200, error: str = "", *, tag: str = "", whole: bool = True) -> None:
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", "a long explanation " * 15 + "with the remedy at its end")
        if tag:
            self.send_header("ETag", f'"{tag}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body if whole else body[: len(body) // 3])
        if not whole:
            self.wfile.flush()
            self.close_connection = True


def cached(cache: Path, repository: str, model: Path, revision: str = "main") -> None:
    """A repository in the layout of the hub's local cache, as a download would leave it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    commit = "0" * 39 + str(len(list(folder.glob("refs/*"))))
    shutil.copytree(model, folder / "snapshots" / commit)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / revision).write_text(commit)


@contextmanager
def served(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let huggingface_hub ask this hub; gives the paths that were asked for."""
    asked: list[str] = []
    handler = type("OneHub", (Hub,), {"root": root, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        constants = huggingface_hub.constants
        for name, value in {
            "ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        yield asked
        server.shutdown()
