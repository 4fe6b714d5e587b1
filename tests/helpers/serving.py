"""A small trained run, and `python -m lit_mm serve` with it in a process that has imported everything already."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.command_line import CONFIG, begun, lit_mm
from tests.helpers.records import write_instruction_set


def trained_run(folder: Path, **overrides: int) -> Path:
    """An instruction set in the folder, and the run that was trained on it by the command line.

    Args:
        folder: Where.
        overrides: Fields of the LLM's config.
    """
    folder = write_instruction_set(folder.resolve())
    config = yaml.safe_load(CONFIG)
    config["trainer"]["default_root_dir"] = str(folder / "runs")
    config["model"]["llm"]["config_overrides"] |= overrides
    files = {split: str(folder / f"{split}.json") for split in ("train", "val")}
    config["data"]["init_args"] |= {**files, "predict": str(folder / "ask.jsonl"), "image_root": str(folder)}
    (folder / "exp.yaml").write_text(yaml.safe_dump(config))
    lit_mm("fit", "--config", str(folder / "exp.yaml"))
    return folder / "runs/version_0"


class Serving:
    """A server on a free port, which is ended when the block ends.

    Args:
        run: The run's folder.
        log: A file for what the server prints.
        options: Further options.
    """

    def __init__(self, run: Path, log: Path, *options: str) -> None:
        self.run, self.log = run, log
        log.touch()
        self.process = begun(["serve", "--ckpt_path", str(run), "--port", "0", *options], log, {})

    def __enter__(self) -> Serving:
        self.port = int(self.logged(r"http://127\.0\.0\.1:(\d+)", 120)[1])
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        os.kill(self.process.pid, number)

    def status(self) -> int | None:
        """Its exit status, once it has ended; waits for that."""
        self.process.join(30)
        return self.process.exitcode

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def logged(self, pattern: str, seconds: float = 20, after: int = 0) -> re.Match[str]:
        """What the log says; waits for it.

        Raises:
            TimeoutError: It does not say so.
        """
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(text := self.log.read_text(), after)):
            if time.monotonic() > end or not self.process.is_alive():
                raise TimeoutError(f"{pattern} is not in the log:\n{text}")
            time.sleep(0.05)
        return found

    def get(self, path: str) -> tuple[int, bytes]:
        """A page."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read()

    def post(self, body: Any, path: str = "/v1/chat/completions", kind: str = "application/json") -> Any:
        """Post JSON, or bytes as they are: status and parsed reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, data, {"Content-Type": kind})
        reply = connection.getresponse()
        self.headers = dict(reply.getheaders())
        return reply.status, json.loads(reply.read())

    def begin(self, body: Any) -> socket.socket:
        """Send a request and do not wait for the reply."""
        data = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection = socket.create_connection(("127.0.0.1", self.port), 30)
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return connection

    def metric(self, name: str) -> float:
        """A figure of /metrics, with its labels."""
        lines = self.get("/metrics")[1].decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


def data_url(encoded: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"


def image_part(url: str, **further: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **further}}


def user(*parts: Any) -> dict[str, Any]:
    """A message of texts and other parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def asked(*parts: Any, **fields: Any) -> dict[str, Any]:
    """The body of a request with one message."""
    return {"messages": [user(*parts)], **fields}


def tokens(number: int | str) -> dict[str, Any]:
    """The field that chooses the scale."""
    return {"mm_processor_kwargs": {"num_visual_tokens": number}}
