"""ASGI middleware: counting and timing requests, limiting their bodies, and asking for a key."""

import secrets
import time
from collections.abc import Collection, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fp4dit_ao.serving.error_responses import answer
from fp4dit_ao.serving.metrics import Metrics
from fp4dit_ao.serving.schema import ApiError


class RequestCounter:
    """ASGI middleware that counts requests to some paths, and times them to the last byte, by status code.

    Args:
        app: the application behind it.
        metrics: its ``requests`` and ``request_seconds`` are updated.
        paths: paths of the counted requests.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Collection[str]):
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in self.paths:
            await self.app(scope, receive, send)
            return
        began, code = time.monotonic(), 500

        async def watched(message: Message) -> None:
            nonlocal code
            code = message.get("status", code)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            self.metrics.requests.labels(code).inc()
            self.metrics.request_seconds.labels(code).observe(time.monotonic() - began)


class BodyLimit:
    """ASGI middleware that answers 413 to a body of too many bytes, before the body is read completely.

    Args:
        app: the application behind it.
        limits: most bytes of a body, by path. Other paths do not read bodies, and answer 404 or 405 to whatever is sent.
    """

    def __init__(self, app: ASGIApp, limits: Mapping[str, int]):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self.limits.get(scope["path"]) if scope["type"] == "http" else None
        if limit is None:
            await self.app(scope, receive, send)
            return
        messages, size = [], 0
        while scope["method"] in ("POST", "PUT", "PATCH"):
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > limit:
                refusal = answer(ApiError(413, f"the body is larger than {limit} bytes", "too_large"))
                await refusal(scope, receive, send)
                return
            if not message.get("more_body"):
                break

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        await self.app(scope, replay, send)


class ApiKey:
    """ASGI middleware that answers 401 unless a request brings ``Authorization: Bearer KEY``.

    Health checks are open; so are pictures, whose addresses cannot be guessed, and a browser's questions before a request from
    another origin, which carry no key.

    Args:
        app: the application behind it.
        key: the key.
        open_paths: beginnings of paths that need no key.
    """

    def __init__(self, app: ASGIApp, key: str, open_paths: tuple[str, ...]):
        self.app, self.expected, self.open_paths = app, f"Bearer {key}".encode(), open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and not scope["path"].startswith(self.open_paths):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self.expected):  # takes as long wherever they differ
                refusal = answer(
                    ApiError(401, "the API key is missing or wrong; send Authorization: Bearer KEY", "invalid_api_key")
                )
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)
