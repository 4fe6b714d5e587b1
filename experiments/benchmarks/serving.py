"""A load test of `python -m lit_mm serve`: many requests at once, at all scales, some of them wrong, some that hang up.

    python experiments/benchmarks/serving.py --ckpt_path runs/quickstart --json serving.json

Every tenth request is wrong (half of them name a scale that there is not, half send an image that is none), and every
tenth hangs up after a moment. The others ask about images of their own, at one of the model's scales or at all of
them. Then as many questions as `--alone` says are asked one after another, for comparison.

`lost` is the number of requests that did not get what they deserve: an answer at every scale they asked for, or
status 400. Latencies are those of the answers, from the connection to the last byte; all requests begin at once, so
half of them is the time in which half of the answers are made. The script fails if anything is lost, or if the server
does not end well.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from nested_step import hardware
from PIL import Image
from rich.console import Console
from rich.table import Table

Kind = Literal["answer", "wrong", "hangs up"]
Address = tuple[str, int]


@dataclass
class Request:
    """A request, and what became of it.

    Args:
        kind: What it deserves.
        body: Its JSON.
        choices: Number of answers that it asks for.
        seconds: Until its reply was there.
        fault: What is wrong with the reply; empty if nothing.
    """

    kind: Kind
    body: dict[str, Any]
    choices: int = 1
    seconds: float = 0.0
    fault: str = ""


@dataclass
class Row:
    """One load, as the JSON holds it.

    Args:
        case: How requests came.
        requests: Number of them.
        answered: Number of those that got an answer.
        refused: Number of those that were wrong.
        hung_up: Number of those that hung up.
        lost: Number of those that did not get what they deserve.
        seconds: Until the last reply.
        per_second: Requests that got an answer, per second.
        p50: Median latency of answers in seconds.
        p95: 95th percentile of it.
        batch: Mean number of answers in a batch.
    """

    case: str
    requests: int
    answered: int
    refused: int
    hung_up: int
    lost: int
    seconds: float
    per_second: float
    p50: float
    p95: float
    batch: float


def requests_of(scales: Sequence[str], number: int, side: int, new_tokens: int) -> list[Request]:
    """Requests about images of their own; the first of ten is wrong, the sixth hangs up."""
    made = []
    for n in range(number):
        kind: Kind = "wrong" if n % 10 == 0 else "hangs up" if n % 10 == 5 else "answer"
        scale = [*scales, "all"][n % (len(scales) + 1)]
        named = "7777" if n % 20 == 0 else scale
        image = b"no image" if n % 20 == 10 else noise(n, side)
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"What is it, {n}?"}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": new_tokens}
        body["mm_processor_kwargs"] = {"num_visual_tokens": named}
        made.append(Request(kind, body, len(scales) if scale == "all" else 1))
    return made


def noise(seed: int, side: int) -> bytes:
    """A PNG of side × side pixels."""
    pixels, file = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8), BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


async def send(address: Address, request: Request) -> None:
    """Send a request and note what became of it."""
    start, body = time.perf_counter(), json.dumps(request.body).encode()
    try:
        reader, writer = await asyncio.open_connection(*address)
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        )
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        if request.kind == "hangs up":
            await asyncio.sleep(0.2)
        else:
            request.fault = fault_of(await reader.read(), request)
        writer.close()
    except OSError as error:
        request.fault = f"{type(error).__name__}: {error}"
    request.seconds = time.perf_counter() - start


def fault_of(reply: bytes, request: Request) -> str:
    """What is wrong with a reply."""
    head, _, body = reply.partition(b"\r\n\r\n")
    status, expected = head[9:12].decode(), "400" if request.kind == "wrong" else "200"
    if status != expected:
        return f"expected status {expected}, found {status or 'nothing'}: {body.decode()[:200]}"
    ends = [choice["finish_reason"] for choice in json.loads(body).get("choices", [])]
    if request.kind == "answer" and (len(ends) != request.choices or set(ends) - {"stop", "length"}):
        return f"expected {request.choices} answers, found {body.decode()[:200]}"
    return ""


async def get(address: Address, path: str) -> str:
    """A page's text."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    reply = (await reader.read()).partition(b"\r\n\r\n")[2].decode()
    writer.close()
    return reply


async def batches(address: Address) -> np.ndarray:
    """[number of batches, of answers in them] so far."""
    found = await get(address, "/metrics")
    names = "lit_mm_batch_size_count", "lit_mm_batch_size_sum"
    return np.array([float(re.search(rf"^{name} (\S+)", found, re.MULTILINE)[1]) for name in names])  # type: ignore[index]


async def load(address: Address, case: str, requests: Sequence[Request], at_once: bool) -> Row:
    """Send requests, all at once or one after another."""
    before, start = await batches(address), time.perf_counter()
    if at_once:
        await asyncio.gather(*(send(address, request) for request in requests))
    else:
        for request in requests:
            await send(address, request)
    seconds = time.perf_counter() - start
    count, answers = await batches(address) - before
    kinds = [request.kind for request in requests]
    times = sorted(request.seconds for request in requests if request.kind == "answer")
    lost = [request.fault for request in requests if request.fault]
    for fault in lost[:5]:
        print(f"lost: {fault}", file=sys.stderr)
    numbers = [len(kinds), *(kinds.count(kind) for kind in ("answer", "wrong", "hangs up")), len(lost)]
    p95 = times[min(len(times) - 1, round(0.95 * len(times)))]
    speed = len(times) / seconds
    return Row(case, *numbers, seconds, speed, statistics.median(times), p95, answers / max(1, count))


async def measure(arguments: argparse.Namespace, address: Address) -> list[Row]:
    """Both loads, after a request that warms up."""
    scales = json.loads(await get(address, "/v1/models"))["data"][0]["scales"]
    mixed = requests_of(scales, arguments.requests, arguments.side, arguments.new_tokens)
    alone = requests_of(scales, 2 * arguments.alone, arguments.side, arguments.new_tokens)
    alone = [request for request in alone if request.kind == "answer"][: arguments.alone]
    await load(address, "warm-up", alone[:1], False)
    rows = [await load(address, "one after another", alone, False), await load(address, "at once", mixed, True)]
    if "ok" not in await get(address, "/health"):
        raise RuntimeError("the server is not healthy afterwards")
    return rows


def run(arguments: argparse.Namespace) -> list[Row]:
    """Start a server, measure, end it.

    Raises:
        RuntimeError: The server does not start, is not healthy afterwards, or does not end well.
    """
    command = [sys.executable, "-m", "lit_mm", "serve", "--ckpt_path", arguments.ckpt_path, "--port", "0"]
    command += ["--max_requests", str(arguments.requests), "--max_batch", str(arguments.max_batch), "--timeout", "600"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        lines = iter(server.stderr.readline, "")  # type: ignore[union-attr]
        address = next((found for line in lines if (found := re.search(r"http://([\d.]+):(\d+)", line))), None)
        if address is None:
            raise RuntimeError("the server did not start, see above")
        drain = asyncio.to_thread(lambda: [None for _ in lines])

        async def all_of() -> list[Row]:
            reading = asyncio.create_task(drain)
            try:
                return await measure(arguments, (address[1], int(address[2])))
            finally:
                server.send_signal(signal.SIGTERM)
                await reading

        rows = asyncio.run(all_of())
    if server.returncode:
        raise RuntimeError(f"the server ended with status {server.returncode}, expected 0")
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table(title="serving", title_justify="left")
    for name in ("case", "requests", "answered", "refused", "hung up", "lost", "answered/s", "p50 s", "p95 s", "batch"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for row in rows:
        counts = row.requests, row.answered, row.refused, row.hung_up, row.lost
        speeds = f"{row.per_second:.1f}", f"{row.p50:.2f}", f"{row.p95:.2f}", f"{row.batch:.1f}"
        table.add_row(row.case, *map(str, counts), *speeds)
    console.print(table)


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", required=True, help="a checkpoint or a run's folder")
    parser.add_argument("--requests", type=int, default=200, help="at once (200)")
    parser.add_argument("--alone", type=int, default=40, help="one after another (40)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of the longest answer (16)")
    parser.add_argument("--max-batch", type=int, default=16, help="as serve's --max_batch (16)")
    parser.add_argument("--side", type=int, default=64, help="pixels of an image's sides (64)")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments, console = parsed(words), Console(width=120)
    versions: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console.print(f"{hardware(device)}; {versions}")
    rows = run(arguments)
    show(rows, console)
    if arguments.json:
        command = shlex.join(["serving.py", *(sys.argv[1:] if words is None else words)])
        result = {"hardware": hardware(device), "versions": versions, "command": command}
        arguments.json.write_text(json.dumps(result | {"rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    if lost := sum(row.lost for row in rows):
        sys.exit(f"{lost} requests were lost")


if __name__ == "__main__":
    main()
