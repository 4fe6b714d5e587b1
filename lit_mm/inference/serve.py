"""python -m lit_mm serve: a server that OpenAI's clients speak to, and a page to ask on."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

PROGRAM = "python -m lit_mm serve"
USAGE = f"""{PROGRAM} --ckpt_path last [--port 8000]
       then open http://127.0.0.1:8000, or point an OpenAI client to http://127.0.0.1:8000/v1"""
NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "pydantic": "pydantic", "prometheus_client": "prometheus-client"}
"""Module -> package."""


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        ImportError: A package of the group `serve` is not installed.
        ValueError: The checkpoint does not describe its model.
        FileNotFoundError: No such checkpoint or folder.
        OSError: The port is taken.
    """
    options = _parser().parse_args(arguments)
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise ImportError(f"serve needs {', '.join(missing)}: pip install '.[serve]' in lit_mm's folder")
    if options.allow_files is not None and not options.allow_files.is_dir():
        raise FileNotFoundError(f"--allow_files: no folder {options.allow_files}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with _listener(options.host, options.port) as listener:
        _serve(options, listener)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, USAGE, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--ckpt_path",
        default="last",
        help="a checkpoint, a folder of a run or of export, a hub name, or last: the newest in runs",
    )
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: for this machine only)")
    add("--port", type=int, default=8000, help="8000 by default; 0 picks a free port")
    add("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    add("--model_name", help="what requests call the model (default: the folder of its run)")
    add("--allow_files", type=Path, metavar="FOLDER", help="open file:// URLs below this folder")
    add("--allow_urls", nargs="*", metavar="HOST", help="fetch http and https URLs; if hosts are named, only from them")
    add("--max_batch", type=_positive, default=16, help="answers in one batch (16)")
    add("--max_requests", type=_positive, default=256, help="requests at once, those that wait included (256)")
    add("--max_bytes", type=_positive, default=2**25, help="bytes of a request's body (33554432)")
    add("--max_pixels", type=_positive, help="pixels of an image or a frame (default: as in training)")
    add("--max_images", type=_positive, default=16, help="images and videos in a request (16)")
    add("--max_tokens", type=_positive, help="tokens of a prompt and its answer (default: the LLM's positions)")
    add("--timeout", type=_seconds, default=120, help="seconds until a request must be answered (120)")
    add("--grace", type=_seconds, default=20, help="seconds for requests in progress when the server ends (20)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {number}")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number of seconds, found {text}")
    return number


def _listener(host: str, port: int) -> socket.socket:
    """A socket with the port, so that a port that is taken is noticed before the model is loaded."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise OSError(f"serve: cannot listen on {host}, port {port}: {error}") from None
    return found


def _serve(options: argparse.Namespace, listener: socket.socket) -> None:
    from lit_mm.hub.loading import load, name_of
    from lit_mm.inference.server import Limits, Server, run
    from lit_mm.inference.urls import MediaURLs

    name = options.model_name or name_of(options.ckpt_path)
    model = load(options.ckpt_path, options.device)
    if options.max_pixels:
        media = model.media
        media.image, media.frame = (replace(own, max_pixels=options.max_pixels) for own in (media.image, media.frame))
        media.video = media.video and replace(media.video, max_pixels=options.max_pixels)
    names = "max_requests", "max_batch", "max_bytes", "max_images", "max_tokens", "timeout"
    limits = Limits(**{name: getattr(options, name) for name in names})
    urls = MediaURLs(options.allow_files, options.allow_urls, options.max_bytes)
    run(Server(model, name, limits, urls), listener, options.grace)
