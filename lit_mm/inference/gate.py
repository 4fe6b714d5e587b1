"""What surrounds every request of the server: limits of what is read, errors in OpenAI's format, a line in the log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse
from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_mm.inference.chat_completions import RefusedError

HUNG_UP = 499
"""nginx's status for a client that hung up; no client sees it."""
QUIET = {"/health", "/metrics"}
"""Paths without a line in the log."""
SPARE = 5.0
"""Seconds beyond the timeout until a client must have read its reply."""
T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class Limits:
    """What a request may ask.

    Args:
        max_requests: Requests at once, those that wait included; more get 503.
        max_batch: Answers in one batch.
        max_bytes: Of a request's body.
        max_images: Images and videos in a request.
        max_tokens: Of a prompt and its answer; None: as many as the LLM has positions.
        timeout: Seconds until a request must be answered.
    """

    max_requests: int = 256
    max_batch: int = 16
    max_bytes: int = 2**25
    max_images: int = 16
    max_tokens: int | None = None
    timeout: float = 120.0


@dataclass
class LogLine:
    """What the log says about a request.

    Args:
        deadline: When it must be answered, in the loop's time.
        status: Of the reply, or of what ended a stream.
        words: About the answers, or what was wrong.
    """

    deadline: float
    status: int = HUNG_UP
    words: list[str] = field(default_factory=list)


class Gate:
    """Around every request: how many there are at once, how long their bodies may be, and a line in the log.

    Args:
        app: What answers.
        limits: Of requests.
        count: Counts replies by path and status.
    """

    def __init__(self, app: ASGIApp, limits: Limits, count: Counter) -> None:
        self.app, self.limits, self.count, self.inside = app, limits, count, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        began = time.perf_counter()
        told = scope["told"] = LogLine(asyncio.get_running_loop().time() + self.limits.timeout)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.status = message["status"]
            await send(message)

        try:
            async with asyncio.timeout_at(told.deadline + SPARE):
                await self._pass(scope, _limited(receive, told.deadline, self.limits.max_bytes), noting)
        except TimeoutError:
            told.words.append("the client did not read the reply")
        finally:
            self._note(scope, told, time.perf_counter() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        counts = scope["method"] == "POST"
        if not counts or self.inside < self.limits.max_requests:
            self.inside += counts
            try:
                await self.app(scope, receive, send)
            finally:
                self.inside -= counts
            return
        message = f"{self.limits.max_requests} requests are in progress, the limit: try again later"
        scope["told"].words.append(message)
        await _thrown_away(receive, False)
        await error_reply(RefusedError(message, status=503))(scope, receive, send)

    def _note(self, scope: Scope, told: LogLine, seconds: float) -> None:
        path = scope["raw_path"].decode("ascii", "backslashreplace")
        known = path if path in {getattr(route, "path", None) for route in scope["app"].routes} else "other"
        self.count.labels(known, str(told.status)).inc()
        words = ", ".join([f"{seconds:.2f} s", *told.words])
        if path not in QUIET:
            client, words = (scope["client"] or ["?"])[0], "".join(c if c.isprintable() else "?" for c in words)
            log.info("%s %s %s %d: %.500s", client, scope["method"], path[:100], told.status, words)


def _limited(receive: Receive, deadline: float, most: int) -> Receive:
    """Receive a body of at most `most` bytes until the deadline. What is too long is read to its end and thrown away,
    as long as that takes few seconds: a client that is still sending does not read the reply."""
    size, is_all = 0, False

    async def limited() -> Message:
        nonlocal size, is_all
        if is_all:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, "the request's body did not arrive in time") from None
        size, is_all = size + len(message.get("body", b"")), not message.get("more_body", False)
        if size > most:
            await _thrown_away(receive, is_all)
            raise HTTPException(413, f"the request's body has more than {most} bytes, the limit")
        return message

    return limited


async def _thrown_away(receive: Receive, is_all: bool, seconds: float = 5) -> None:
    with suppress(TimeoutError, HTTPException):
        async with asyncio.timeout(seconds):
            while not is_all:
                is_all = not (await receive()).get("more_body", False)


async def unless_hung_up(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of some work; None if the client hangs up before."""

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.create_task(work), asyncio.create_task(hung_up())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        working.cancel()
        gone.cancel()


def error_reply(error: RefusedError) -> JSONResponse:
    """An error in OpenAI's format."""
    return JSONResponse(error.body(), error.status, {"Retry-After": "1"} if error.status == 503 else None)
