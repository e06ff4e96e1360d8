"""What the demo's server answers: requests of its page alone, and nothing that the page may load from elsewhere."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import unquote, urlsplit

# Only what the page itself serves may be loaded, whatever a version of gradio asks for.
CONTENT_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; frame-ancestors 'self'"
)


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
