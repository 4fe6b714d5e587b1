"""python -m lit_mm serve: a server that OpenAI's clients speak to, and a page to ask on."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

PROGRAM = "python -m lit_mm serve"
USAGE = f"""{PROGRAM} --ckpt_path last [--port 8000]
       then open http://127.0.0.1:8000, or point an OpenAI client to http://127.0.0.1:8000/v1"""
NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "pydantic": "pydantic", "prometheus_client": "prometheus-client"}
log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        ImportError: The packages of the group `serve` are not installed.
        ValueError: A wrong option.
        FileNotFoundError: No such checkpoint or folder.
        OSError: The port is taken.
    """
    options = _parser().parse_args(arguments)
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise ImportError(f"serve needs {', '.join(missing)}: pip install 'lit_mm[serve]'")
    if options.allow_files is not None and not options.allow_files.is_dir():
        raise FileNotFoundError(f"--allow_files: no folder {options.allow_files}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    listener = _listener(options.host, options.port)
    with listener:
        serve(options, listener)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, USAGE, allow_abbrev=False)
    parser.add_argument("--ckpt_path", default="last", help="a checkpoint, a run's folder, or last: the newest in runs")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--model_name", help="what requests call the model (default: the name of its run)")
    parser.add_argument("--allow_files", type=Path, metavar="FOLDER", help="open file:// URLs below this folder")
    parser.add_argument(
        "--allow_urls",
        nargs="*",
        metavar="HOST",
        help="fetch http and https URLs, from these hosts only if any are named",
    )
    parser.add_argument("--max_batch", type=int, default=16, help="answers in one batch (16)")
    parser.add_argument("--max_requests", type=int, default=256, help="requests at once, waiting ones included (256)")
    parser.add_argument("--max_bytes", type=int, default=2**25, help="of a request's body (32 MiB)")
    parser.add_argument("--max_pixels", type=int, help="of an image (default: as in training)")
    parser.add_argument("--max_images", type=int, default=16, help="images and videos in a request (16)")
    parser.add_argument("--max_tokens", type=int, help="of prompt and answer (default: the LLM's positions)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds until a request must be answered (120)")
    parser.add_argument("--grace", type=float, default=20, help="seconds for requests in progress at the end (20)")
    return parser


def _listener(host: str, port: int) -> socket.socket:
    """A socket with the port, so that a port that is taken is told before a model is loaded."""
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        raise OSError(f"serve: cannot listen on {host}, port {port}: {error.strerror}") from None
    return found


def serve(options: argparse.Namespace, listener: socket.socket) -> None:
    """Load the model and answer requests until a signal."""
    import uvicorn

    from lit_mm.hub.loading import load
    from lit_mm.inference.server import Limits, Server
    from lit_mm.inference.urls import MediaURLs

    model = load(options.ckpt_path, options.device)
    if options.max_pixels:
        media = model.media
        media.image, media.frame = (replace(own, max_pixels=options.max_pixels) for own in (media.image, media.frame))
        media.video = media.video and replace(media.video, max_pixels=options.max_pixels)
    names = "max_requests", "max_batch", "max_bytes", "max_images", "max_tokens", "timeout"
    limits = Limits(**{name: getattr(options, name) for name in names})
    urls = MediaURLs(options.allow_files, options.allow_urls, options.max_bytes)
    server = Server(model, options.model_name or name_of(options.ckpt_path), limits, urls)

    class Uvicorn(uvicorn.Server):
        """Says where it listens, and ends requests that take longer than the grace time."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            scales = ", ".join(str(scale) for scale in model.scales)
            log.info("%s at scales %s: http://%s:%d", server.name, scales, f"[{host}]" if ":" in host else host, port)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            import asyncio

            log.info("ending: %d requests waiting, up to %g s", len(server.batcher.waiting), options.grace)
            asyncio.get_running_loop().call_later(options.grace, server.batcher.close)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        server.app(),
        http="h11",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(options.grace) + 5,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn takes them, ends, and raises them again
    with server.batcher:
        Uvicorn(config).run([listener])
    log.info("ended")


def name_of(ckpt_path: str) -> str:
    """What a model is called: its run's folder and the one above, such as quickstart/version_0."""
    from lit_mm.training.saving import find_checkpoint

    checkpoint = find_checkpoint(ckpt_path, Path("runs")).resolve()
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.with_suffix("")
    return f"{run.parent.name}/{run.name}"
