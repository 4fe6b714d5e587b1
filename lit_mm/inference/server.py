"""The server's app: OpenAI's chat completions for one model, a preview of images, metrics, and a page.

Gate (limits, a line in the log) -> route -> a thread decodes the images -> Batcher -> the reply, whole or streamed
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import anyio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from lit_mm.inference.answering import Answer, Ask, Model, Prompt
from lit_mm.inference.batching import Batcher, ClosedError, Job, NotFiniteError, Piece
from lit_mm.inference.chat_completions import ChatRequest, RefusedError, Reply, Strict, Text, ask_of, short
from lit_mm.inference.decoding import settings
from lit_mm.inference.gate import HUNG_UP, SPARE, Gate, Limits, LogLine, error_reply, unless_hung_up
from lit_mm.inference.preview import preview
from lit_mm.inference.urls import MediaURLs
from lit_mm.model.llm import positions_of
from lit_mm.model.scales import Scale

PAGE = Path(__file__).with_name("page.html")
T = TypeVar("T")
log = logging.getLogger(__name__)


class Metrics:
    """The figures of GET /metrics."""

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
        known = positions_of(model.vlm.llm.config)
        most = known.most if known else None
        self.max_tokens = min(filter(None, (most, limits.max_tokens)), default=None)
        self.longest = max(map(len, model.tokenizer.get_vocab()))
        self.decoders = anyio.CapacityLimiter(os.cpu_count() or 1)

    def app(self) -> FastAPI:
        """The routes."""
        app = FastAPI(title="lit_mm", docs_url=None, redoc_url=None)
        app.add_middleware(Gate, limits=self.limits, count=self.metrics.requests)
        app.exception_handler(RefusedError)(_refuse)
        app.exception_handler(RequestValidationError)(lambda request, error: _refuse(request, _first(error)))
        app.exception_handler(HTTPException)(_http_error)
        app.exception_handler(Exception)(_unexpected)
        app.get("/")(self.page)
        app.get("/health")(self.health)
        app.get("/metrics")(self.figures)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.one_model)
        app.post("/v1/chat/completions")(self.completions)
        app.post("/preview")(self.preview)
        return app

    async def page(self) -> Response:
        """GET /: a page to ask on."""
        return FileResponse(PAGE)

    async def figures(self) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def health(self) -> Response:
        """GET /health: whether answers can be made."""
        alive = self.batcher.thread.is_alive() and not self.batcher.closed
        return JSONResponse({"status": "ok" if alive else "ending"}, 200 if alive else 503)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models: the one that is served."""
        return {"object": "list", "data": [self.card()]}

    def card(self) -> dict[str, Any]:
        """The model, as OpenAI describes one, with its scales, finest first, and whether it has a chooser."""
        own = {"scales": [str(scale) for scale in self.model.scales], "auto": self.model.chooser is not None}
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "lit_mm"} | own

    async def one_model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        self.check_name(name)
        return self.card()

    def check_name(self, name: str | None) -> None:
        """Check that a request names the model that is served, or none.

        Raises:
            RefusedError: It names another.
        """
        if name not in (None, self.name):
            raise RefusedError(f"no model {name!r:.80}, there is {self.name!r}", "model", "model_not_found", 404)

    async def preview(self, asked: PreviewRequest) -> dict[str, Any]:
        """POST /preview: see `preview.preview`."""
        encoded = await self.in_thread(lambda: self.urls.read(asked.image, "image", "image"), "image")
        return await self.in_thread(lambda: preview(self.model, encoded), "image", self.decoders)

    async def completions(self, asked: ChatRequest, request: Request) -> Response:
        """POST /v1/chat/completions."""
        completion = Completion(self, asked, request.scope["told"])
        return await unless_hung_up(request, completion.begin()) or Response(status_code=HUNG_UP)

    async def prompt_of(self, asked: ChatRequest) -> tuple[Prompt, dict[str, Any]]:
        """A request's question with its images decoded, and its settings.

        Raises:
            RefusedError: Anything in it is wrong.
        """
        self.check_name(asked.model)
        chosen, named = asked.settings(), asked.scale(self.model.chooser is not None)
        try:
            scales = self.model.chooser_of(named) or (
                self.model.scales[-1:] if named == "low" else self.model.scales_of(named)
            )
        except ValueError as error:
            raise RefusedError(f"num_visual_{error}", "mm_processor_kwargs.num_visual_tokens") from None
        self._check_length(asked)
        ask = await self.in_thread(partial(ask_of, asked, self.urls.read, self.limits.max_images), "messages")
        make = partial(self._prompt, ask, scales, chosen, asked.seed)
        return await self.in_thread(make, "messages", self.decoders), chosen

    def _check_length(self, asked: ChatRequest) -> None:
        """Refuse by its characters what would take long to encode, only to be refused by its tokens."""
        length = sum(len(part.text) for message in asked.messages for part in message.content if isinstance(part, Text))
        if self.max_tokens and length > self.max_tokens * self.longest:
            message = f"{length} characters of text are more than {self.max_tokens} tokens, the limit"
            raise RefusedError(message, "messages", "context_length_exceeded")

    def _prompt(self, ask: Ask, scales: Any, chosen: dict[str, Any], seed: int | None) -> Prompt:
        new_tokens = chosen.get("max_new_tokens", self.model.max_new_tokens)
        config = settings(self.model.vlm.llm, self.model.decoding, **chosen)
        drawn = secrets.randbits(63) if config.do_sample else 0
        prompt = self.model.prompt(ask, scales, drawn if seed is None else seed, "messages")
        for scale in prompt.scales:
            length, visual = self.model.length(prompt, scale)
            if self.max_tokens and length + new_tokens > self.max_tokens:
                found = f"{length} tokens of the prompt ({visual} visual) and {new_tokens} of the answer"
                message = f"{found}: the limit is {self.max_tokens} together"
                raise RefusedError(message, "messages", "context_length_exceeded")
        return prompt

    async def in_thread(self, work: Callable[[], T], param: str, limiter: anyio.CapacityLimiter | None = None) -> T:
        """Run what takes time beside the loop.

        Args:
            work: What to run.
            param: The field that is wrong if it raises ValueError.
            limiter: Of how many threads at once; None: of many.

        Raises:
            RefusedError: It raised RefusedError or ValueError.
        """
        try:
            return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
        except RefusedError:
            raise
        except ValueError as error:
            raise RefusedError(str(error), param) from None


class Completion:
    """One request for an answer.

    Args:
        server: Answers.
        asked: The request.
        told: For the log.
    """

    def __init__(self, server: Server, asked: ChatRequest, told: LogLine) -> None:
        self.server, self.asked, self.told = server, asked, told
        self.arrived, self.loop = time.perf_counter(), asyncio.get_running_loop()
        self.events: asyncio.Queue[Piece | list[Answer] | Exception] = asyncio.Queue()

    async def begin(self) -> Response:
        """The whole reply; of a stream, its beginning once there is a first token.

        Raises:
            RefusedError: Anything in the request is wrong, or it cannot be answered.
        """
        prompt, chosen = await self._in_time(self.server.prompt_of(self.asked))
        self._note_prompt(prompt, chosen)
        self.job = Job(prompt, chosen, self._tell, self.arrived, self.asked.stream)
        try:
            self.server.batcher.submit(self.job)
            event = await self._event()
        except BaseException:
            self.server.batcher.drop(self.job)
            raise
        if isinstance(event, Piece):
            # a client that hangs up this moment ends a stream that has not begun, which then cannot drop the job
            drop, headers = BackgroundTask(self.server.batcher.drop, self.job), {"Cache-Control": "no-cache"}
            return StreamingResponse(self._stream(event), 200, headers, "text/event-stream", drop)
        self._note_answers(event)
        return JSONResponse(self.reply.whole(event))

    def _tell(self, event: Piece | list[Answer] | Exception) -> None:
        with suppress(RuntimeError):  # a second Ctrl-C closes the loop while answers are made
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def _in_time(self, work: Any) -> Any:
        try:
            async with asyncio.timeout_at(self.told.deadline):
                return await work
        except TimeoutError:
            message = f"not answered within {self.server.limits.timeout:g} seconds, the limit"
            raise RefusedError(message, status=504) from None

    async def _event(self) -> Piece | list[Answer]:
        """What the batcher says next.

        Raises:
            RefusedError: It failed, or says nothing in time.
        """
        event = await self._in_time(self.events.get())
        if isinstance(event, NotFiniteError):
            raise RefusedError("the model's logits for this request are not finite", status=500)
        if isinstance(event, ClosedError):
            raise RefusedError("the server is ending", status=503)
        if isinstance(event, Exception):
            raise RefusedError(f"{type(event).__name__} in the model: see the server's log", status=500)
        return event

    async def _stream(self, event: Piece | list[Answer]) -> AsyncIterator[str]:
        """Server-sent events; an error after the first one is an event, too."""
        try:
            while isinstance(event, Piece):
                if chunk := self.reply.chunk(event):
                    yield _sent(chunk)
                event = await self._event()
            self._note_answers(event)
            if self.reply.with_usage:
                yield _sent(self.reply.usage_chunk())
            yield "data: [DONE]\n\n"
        except RefusedError as error:
            self.told.status = error.status
            self.told.words.append(error.message)
            yield _sent(error.body())
        except BaseException:
            self.told.status = HUNG_UP
            raise
        finally:
            self.server.batcher.drop(self.job)

    def _note_prompt(self, prompt: Prompt, chosen: dict[str, Any]) -> None:
        server, asked, id = self.server, self.asked, f"chatcmpl-{secrets.token_hex(12)}"
        stops, usage = chosen.get("stop_strings", []), asked.stream_options and asked.stream_options.include_usage
        self.reply = Reply(id, server.name, server.model, prompt, bool(asked.logprobs), bool(usage), stops)
        if not prompt.chooser:
            self._note_scales(prompt.scales)

    def _note_scales(self, scales: list[Scale]) -> None:
        tokens = self.reply.usage(0)
        visual = tokens["prompt_tokens_details"]["image_tokens"]
        self.server.metrics.visual.inc(visual)
        names = ", ".join(map(str, scales))
        self.told.words.append(f"scale {names}, {tokens['prompt_tokens']} tokens in ({visual} visual)")

    def _note_answers(self, answers: list[Answer]) -> None:
        if self.job.prompt.chooser:
            self.reply.tried = [answer.tried for answer in answers]
            self._note_scales(answers[0].tried)
        made = sum(len(answer.logprobs) for answer in answers)
        self.server.metrics.generated.inc(made)
        self.server.metrics.first.observe(min(answer.first_token_seconds for answer in answers))
        self.told.words.append(f"{made} out")


def _sent(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _refuse(request: Request, error: RefusedError) -> JSONResponse:
    request.scope["told"].words.append(error.message)
    return error_reply(error)


def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    return _refuse(request, RefusedError(str(error.detail), status=error.status_code))


def _unexpected(request: Request, error: Exception) -> JSONResponse:
    return _refuse(request, RefusedError(f"{type(error).__name__}: see the server's log", status=500))


def _first(error: RequestValidationError) -> RefusedError:
    """The first thing that pydantic found wrong."""
    found = error.errors()[0]
    steps, context = [*found["loc"][1:]], found.get("ctx", {})
    if found["type"] == "json_invalid":
        return RefusedError(f"the body is not JSON: {context['error']} at character {steps[0]}")
    if not steps and "name" not in context:
        return RefusedError("expected a JSON object as the body, with Content-Type: application/json")
    if "content" in steps:  # messages, number, content, number, type: the type is pydantic's
        del steps[4:5]
    steps += [context["name"]] if "name" in context else []  # of Strict
    param = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
    told = f", found {short(found['input'])}" if found["msg"].startswith("Input should be") else ""
    return RefusedError(f"{param}: {found['msg']}{told}", param)


class Uvicorn(uvicorn.Server):
    """Says where it listens, and ends requests that take longer than the grace time.

    Args:
        server: What it serves.
        grace: Seconds for requests in progress when a signal ends the server.
    """

    def __init__(self, server: Server, grace: float) -> None:
        options: dict[str, Any] = {"http": "h11", "ws": "none", "lifespan": "off", "log_config": None}
        wait = int(grace + SPARE)
        super().__init__(uvicorn.Config(server.app(), **options, access_log=False, timeout_graceful_shutdown=wait))
        self.server, self.grace = server, grace
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        scales = ", ".join(str(scale) for scale in self.server.model.scales)
        for host, port, *_ in (each.getsockname() for each in sockets or []):
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            log.info("%s at scales %s: http://%s", self.server.name, scales, address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second Ctrl-C cuts off the requests in progress, which uvicorn would log as errors."""
        if self.should_exit and sig == signal.SIGINT:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more requests, and end those in progress."""
        log.info("ending, requests in progress have %g s", self.grace)
        asyncio.get_running_loop().call_later(self.grace, self.server.batcher.close)
        await super().shutdown(sockets)


def run(server: Server, listener: socket.socket, grace: float) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn handles them, and raises them again in the end
    with server.batcher:
        Uvicorn(server, grace).run([listener])
    log.info("ended")
