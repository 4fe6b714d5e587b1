"""Opens the URLs of images and videos in requests: data URLs always, files and remote URLs where that is allowed."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from lit_mm.inference.chat_completions import RefusedError, short
from lit_mm.inference.pictures import kind_of

SECONDS = 10
"""Until a remote server must have sent a file."""


@dataclass
class MediaURLs:
    """What may be opened.

    Args:
        files: Files below this folder, by file:// URLs; None: no files.
        hosts: Servers from which http and https URLs are fetched; empty: from all; None: from none.
        max_bytes: The largest file.
    """

    files: Path | None = None
    hosts: Sequence[str] | None = None
    max_bytes: int = 2**25

    def read(self, url: str, kind: str, field: str) -> bytes:
        """The file that a URL means.

        Args:
            url: data:…;base64,…, file:///… or https://….
            kind: image or video.
            field: What errors call it.

        Raises:
            RefusedError: It is not allowed, or cannot be read.
        """
        scheme = url.partition(":")[0].lower()
        openers = {"file": self._file, "http": self._fetched, "https": self._fetched}
        try:
            found = openers[scheme](url) if scheme in openers else _decoded(url, kind)
            if kind_of(found) != kind:
                raise ValueError(f"expected {'a video (mp4, mov, webm, mkv)' if kind == 'video' else 'an image'}")
        except ValueError as error:
            raise RefusedError(f"{field}: {error}", field) from None
        return found

    def _file(self, url: str) -> bytes:
        if self.files is None:
            raise ValueError("this server opens no files: send a data URL, or start it with --allow_files FOLDER")
        parts, root = urlsplit(url), self.files.resolve()
        file = Path(unquote(parts.path)).resolve()
        if parts.netloc not in ("", "localhost") or not file.is_relative_to(root) or not file.is_file():
            raise ValueError(f"{short(url)} is not a file below {root}")
        if file.stat().st_size > self.max_bytes:
            raise ValueError(f"{short(url)} has {file.stat().st_size} bytes, the limit is {self.max_bytes}")
        return file.read_bytes()

    def _fetched(self, url: str) -> bytes:
        self.check(url)
        try:
            with build_opener(_Redirects(self)).open(Request(url), timeout=SECONDS) as reply:
                found = _received(reply, self.max_bytes)
        except (OSError, HTTPException, ValueError) as error:
            raise ValueError(f"{short(url)} cannot be fetched: {error}") from None
        return found

    def check(self, url: str) -> None:
        """Check that a remote URL may be fetched.

        Raises:
            ValueError: It may not.
        """
        if self.hosts is None:
            raise ValueError("this server fetches no URLs: send a data URL, or start it with --allow_urls")
        if self.hosts and urlsplit(url).hostname not in self.hosts:
            raise ValueError(f"{short(url)} is not on one of the servers {', '.join(self.hosts)}")


def _received(reply: Any, most: int) -> bytes:
    found, end = bytearray(), time.monotonic() + SECONDS
    while piece := reply.read1(2**16):
        found += piece
        if len(found) > most:
            raise ValueError(f"more than {most} bytes, the limit")
        if time.monotonic() > end:
            raise ValueError(f"it takes longer than {SECONDS} seconds")
    return bytes(found)


class _Redirects(HTTPRedirectHandler):
    def __init__(self, allowed: MediaURLs) -> None:
        self.allowed = allowed

    def redirect_request(self, request: Any, file: Any, code: Any, message: Any, headers: Any, url: str) -> Any:
        self.allowed.check(url)
        return super().redirect_request(request, file, code, message, headers, url)


def _decoded(url: str, kind: str) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or not re.fullmatch(rf"data:{kind}/[\w.+-]+;base64", header, re.IGNORECASE):
        raise ValueError(f"expected data:{kind}/…;base64,…, found {short(header)}")
    try:
        found = base64.b64decode("".join(content.split()), validate=True)  # `base64 FILE` breaks lines
    except ValueError as error:
        raise ValueError(f"the base64 is broken: {error}") from None
    if not found:
        raise ValueError("the data URL is empty")
    return found
