"""The server's app: OpenAI's chat completions for one model, a preview of images, metrics, and a page.

Gate (limits, one line in the log) -> route -> a thread decodes the images -> Batcher -> reply, whole or streamed
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_mm.inference.answering import Answer, Model, Prompt
from lit_mm.inference.batching import Batcher, ClosedError, Job, NotFiniteError, Piece
from lit_mm.inference.chat_completions import BadRequestError, ChatRequest, Reply, Strict, ask_of
from lit_mm.inference.decoding import settings
from lit_mm.inference.preview import preview
from lit_mm.inference.urls import MediaURLs

PAGE = Path(__file__).with_name("page.html")
HUNG_UP = 499
"""nginx's status for a client that hung up; no client sees it."""
QUIET = {"/health", "/metrics"}
"""Paths without a line in the log."""
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
class Told:
    """What the log says about a request.

    Args:
        deadline: When it must be answered, in the loop's time.
        status: Of the reply, or of what ended a stream.
        words: About the answers.
    """

    deadline: float
    status: int = HUNG_UP
    words: list[str] = field(default_factory=list)


class Metrics:
    """What /metrics tells."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("lit_mm_requests", "Requests by status", ["path", "status"], registry=registry)
        self.waiting = Gauge("lit_mm_waiting_requests", "Requests that wait for a batch", registry=registry)
        sizes = [1, 2, 4, 8, 16, 32, 64, 128]
        self.batch = Histogram("lit_mm_batch_size", "Answers in a batch", buckets=sizes, registry=registry)
        self.first = Histogram("lit_mm_first_token_seconds", "From a request to its first token", registry=registry)
        self.generated = Counter("lit_mm_generated_tokens", "Tokens of answers", registry=registry)
        self.visual = Counter("lit_mm_visual_tokens", "Visual tokens of prompts", registry=registry)


class PreviewRequest(Strict):
    """The body of POST /preview."""

    image: str


class Server:
    """Answers requests with one model.

    Args:
        model: The model.
        name: What requests call it.
        limits: What requests may ask.
        urls: Which URLs are opened.
    """

    def __init__(self, model: Model, name: str, limits: Limits, urls: MediaURLs) -> None:
        self.model, self.name, self.limits, self.urls = model, name, limits, urls
        self.metrics, self.started = Metrics(), int(time.time())
        self.batcher = Batcher(model, limits.max_batch, self.metrics.batch.observe)
        self.metrics.waiting.set_function(lambda: len(self.batcher.waiting))
        most = getattr(model.vlm.llm.config, "max_position_embeddings", None)
        self.max_tokens = min(filter(None, (most, limits.max_tokens)), default=None)
        self.threads = anyio.CapacityLimiter(os.cpu_count() or 1)

    def app(self) -> FastAPI:
        """The routes."""
        app = FastAPI(title="lit_mm", docs_url=None, redoc_url=None)
        app.add_middleware(Gate, server=self)
        app.exception_handler(BadRequestError)(lambda _, error: _refused(error))
        app.exception_handler(RequestValidationError)(lambda _, error: _refused(_first(error)))
        app.exception_handler(AnyHTTPException)(lambda _, error: _http_error(error))
        app.exception_handler(Exception)(lambda _, error: error_reply(500, f"{type(error).__name__}: see the log"))
        app.get("/")(lambda: FileResponse(PAGE))
        app.get("/health")(self.health)
        app.get("/metrics")(lambda: Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST))
        app.get("/v1/models")(lambda: {"object": "list", "data": [self.card()]})
        app.get("/v1/models/{name:path}")(self.one_model)
        app.post("/v1/chat/completions")(self.completions)
        app.post("/preview")(self.preview)
        return app

    def health(self) -> Response:
        """Whether answers can be made."""
        alive = self.batcher.thread.is_alive() and not self.batcher.closed
        return JSONResponse({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    def card(self) -> dict[str, Any]:
        """The model, as OpenAI describes one, with its scales, finest first."""
        scales = [str(scale) for scale in self.model.scales]
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "lit_mm", "scales": scales}

    def one_model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        self.check_name(name)
        return self.card()

    def check_name(self, name: str | None) -> None:
        """Whether a model is the one that is served.

        Raises:
            BadRequestError: It is another.
        """
        if name not in (None, self.name):
            raise BadRequestError(f"no model {name!r}, there is {self.name!r}", "model", "model_not_found", 404)

    async def preview(self, asked: PreviewRequest) -> dict[str, Any]:
        """POST /preview: see `preview.preview`."""
        return await self._in_thread(lambda: preview(self.model, self.urls.read(asked.image, "image", "image")))

    async def completions(self, asked: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self.check_name(asked.model)
        if asked.stream_options and not asked.stream:
            raise BadRequestError("stream_options without stream", "stream_options")
        completion = Completion(self, asked, request.scope["told"])
        reply = await _unless_hung_up(request, completion.begin())
        if reply is None:
            completion.drop()
            return Response(status_code=HUNG_UP)
        return reply

    def prompt_of(self, asked: ChatRequest) -> tuple[Prompt, dict[str, Any]]:
        """A request's question with its images decoded, and its settings.

        Raises:
            BadRequestError: Anything in it is wrong.
        """
        chosen, named = asked.settings(), asked.scale()
        try:
            scales = self.model.scales[-1:] if named == "low" else self.model.scales_of(named)
        except ValueError as error:
            raise BadRequestError(f"num_visual_{error}", "mm_processor_kwargs.num_visual_tokens") from None
        config = settings(
            self.model.vlm.llm, self.model.decoding, **{"max_new_tokens": self.model.max_new_tokens, **chosen}
        )
        ask = ask_of(asked, self.urls.read, self.limits.max_images)
        drawn = secrets.randbits(63) if config.do_sample else 0
        prompt = self.model.prompt(ask, scales, drawn if asked.seed is None else asked.seed, "messages")
        for scale in scales:
            length = self.model.length(prompt, scale)[0]
            if self.max_tokens and length + config.max_new_tokens > self.max_tokens:
                found = f"{length} tokens of the prompt at scale {scale} and max_tokens {config.max_new_tokens}"
                raise BadRequestError(
                    f"{found}: the limit is {self.max_tokens} together", "messages", "context_length_exceeded"
                )
        return prompt, chosen

    async def _in_thread(self, work: Any) -> Any:
        """Run what takes time beside the loop; what it finds wrong is the request's fault."""
        try:
            return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self.threads)
        except BadRequestError:
            raise
        except ValueError as error:
            raise BadRequestError(str(error)) from None


class Completion:
    """One request for an answer.

    Args:
        server: Answers.
        asked: The request.
        told: For the log.
    """

    def __init__(self, server: Server, asked: ChatRequest, told: Told) -> None:
        self.server, self.asked, self.told = server, asked, told
        self.arrived = time.perf_counter()
        self.job: Job | None = None
        self.events: asyncio.Queue[Piece | list[Answer] | Exception] = asyncio.Queue()

    async def begin(self) -> Response:
        """The whole reply, or a stream once there is a first token.

        Raises:
            BadRequestError: Anything in the request is wrong, or it cannot be answered.
        """
        server, asked, loop = self.server, self.asked, asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(self.told.deadline):
                prompt, chosen = await server._in_thread(lambda: server.prompt_of(asked))

                def tell(event: Piece | list[Answer] | Exception) -> None:
                    loop.call_soon_threadsafe(self.events.put_nowait, event)

                self.job = Job(prompt, chosen, tell, self.arrived, asked.stream)
                usage = bool(asked.stream_options and asked.stream_options.include_usage)
                stops = chosen.get("stop_strings", [])
                id = f"chatcmpl-{secrets.token_hex(12)}"
                self.reply = Reply(id, server.name, server.model, prompt, bool(asked.logprobs), usage, stops)
                self._note_prompt()
                self.server.batcher.submit(self.job)
                event = await self._event()
        except TimeoutError:
            self.drop()
            raise self._too_late() from None
        if isinstance(event, Piece):
            return StreamingResponse(self._stream(event), media_type="text/event-stream")
        self._note_answers(event)
        return JSONResponse(self.reply.whole(event))

    async def _event(self) -> Piece | list[Answer]:
        """What the batcher says next.

        Raises:
            BadRequestError: It failed.
        """
        event = await self.events.get()
        if isinstance(event, NotFiniteError):
            raise BadRequestError("the model's logits for this request are not finite", status=500)
        if isinstance(event, ClosedError):
            raise BadRequestError("the server is ending", status=503)
        if isinstance(event, Exception):
            raise BadRequestError(f"{type(event).__name__} in the model: see the log", status=500)
        return event

    async def _stream(self, event: Piece | list[Answer]) -> AsyncIterator[str]:
        """Server-sent events; an error after the first one is an event, too."""
        try:
            async with asyncio.timeout_at(self.told.deadline):
                while isinstance(event, Piece):
                    if chunk := self.reply.chunk(event):
                        yield _event_of(chunk)
                    event = await self._event()
        except TimeoutError:
            yield self._failed(self._too_late())
        except BadRequestError as error:
            yield self._failed(error)
        else:
            self._note_answers(event)
            if self.reply.with_usage:
                yield _event_of(self.reply.usage_chunk())
            yield "data: [DONE]\n\n"
        finally:
            self.drop()

    def _failed(self, error: BadRequestError) -> str:
        self.told.status = error.status
        self.told.words.append(error.message)
        return _event_of(_error_body(error.status, error.message, error.param, error.code))

    def drop(self) -> None:
        """Nobody waits for the answer anymore."""
        if self.job:
            self.server.batcher.drop(self.job)

    def _too_late(self) -> BadRequestError:
        return BadRequestError(f"not answered within {self.server.limits.timeout:g} seconds", status=504)

    def _note_prompt(self) -> None:
        scales = ", ".join(str(scale) for scale in self.reply.prompt.scales)
        usage = self.reply.usage(0)
        visual = usage["prompt_tokens_details"]["image_tokens"]
        self.server.metrics.visual.inc(visual)
        self.told.words.append(f"scale {scales}, {usage['prompt_tokens']} tokens in ({visual} visual)")

    def _note_answers(self, answers: list[Answer]) -> None:
        made = sum(len(answer.logprobs) for answer in answers)
        self.server.metrics.generated.inc(made)
        self.server.metrics.first.observe(min(answer.first_token_seconds for answer in answers))
        self.told.words.append(f"{made} out")


class Gate:
    """Around every request: how many there are at once, how long their bodies may be, and a line in the log.

    Args:
        app: What answers.
        server: Its limits and metrics.
    """

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server, self.inside = app, server, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, limits = time.perf_counter(), self.server.limits
        told = scope["told"] = Told(asyncio.get_running_loop().time() + limits.timeout)

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                told.status = message["status"]
            await send(message)

        self.inside += (counts := scope["method"] == "POST")
        try:
            if counts and self.inside > limits.max_requests:
                message = f"{limits.max_requests} requests are in progress, the limit: try again later"
                await error_reply(503, message, headers={"Retry-After": "1"})(scope, receive, noting)
            else:
                await self.app(scope, _limited(receive, told.deadline, limits.max_bytes), noting)
        finally:
            self.inside -= counts
            self._note(scope, told, time.perf_counter() - began)

    def _note(self, scope: Scope, told: Told, seconds: float) -> None:
        path = scope["raw_path"].decode("ascii", "backslashreplace")
        known = path if path in {getattr(route, "path", None) for route in scope["app"].routes} else "other"
        self.server.metrics.requests.labels(known, str(told.status)).inc()
        words = ", ".join([f"{seconds:.2f} s", *told.words])
        if path not in QUIET:
            log.info("%s %s %s %d: %s", (scope["client"] or ["?"])[0], scope["method"], path[:100], told.status, words)


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
    try:
        async with asyncio.timeout(seconds):
            while not is_all:
                is_all = not (await receive()).get("more_body", False)
    except TimeoutError:
        pass


async def _unless_hung_up(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
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


def error_reply(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """An error in OpenAI's format."""
    return JSONResponse(_error_body(status, message, param, code), status, headers)


def _error_body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _refused(error: BadRequestError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return error_reply(error.status, error.message, error.param, error.code, headers)


def _http_error(error: AnyHTTPException) -> JSONResponse:
    return error_reply(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _first(error: RequestValidationError) -> BadRequestError:
    """The first thing that pydantic found wrong."""
    found = error.errors()[0]
    steps = [step for step in found["loc"][1:] if step not in ("text", "image_url", "video_url") or False]
    if name := found.get("ctx", {}).get("name"):
        steps = [*steps, name]
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
    return BadRequestError(f"{param}: {found['msg']}" if param else found["msg"], param or None)


def _event_of(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
