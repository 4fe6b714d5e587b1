"""Names on the Hugging Face hub -> folders on this machine, without long waits where there is no network."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import get_session

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the client raises for a broken connection, too; it is of httpx or httpx2, whichever huggingface_hub uses."""
SECONDS = 5.0
"""How long the hub may take to answer before it counts as out of reach."""
BUSY = 429
"""Too many requests: then the cache is used, as when the hub fails."""
TWICE = ["pytorch_model*.bin"]
"""What a repository has beside the same weights as safetensors."""
KNOWN = {"model.safetensors": TWICE, "model.safetensors.index.json": TWICE}
KNOWN |= {"pytorch_model.bin": [], "pytorch_model.bin.index.json": []}
"""Weights that are in the cache -> what need not be fetched beside them."""
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def split(source: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> name and revision; no revision is None. A path that exists is never split."""
    name, _, revision = source.rpartition("@")
    return (name, revision) if name and not Path(source).expanduser().exists() else (source, None)


def is_hub_name(source: str) -> bool:
    """Whether a source can only mean `owner/name` on the hub: `runs/mine` is a path where there is a folder `runs`."""
    name = split(source)[0]
    return bool(NAME.fullmatch(name)) and not name.startswith(".") and not Path(name).parent.is_dir()


@cache
def reachable() -> bool:
    """Whether the hub answers within a few seconds; False if HF_HUB_OFFLINE is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # the client has a dozen errors for no network, a proxy that refuses, and no answer
        return False
    return True


def folder_of(source: str, patterns: list[str], option: str, revision: str | None = None) -> Path:
    """The folder of a hub name: what the cache has, or what is downloaded into it.

    Args:
        source: `owner/name`, or `owner/name@revision`.
        patterns: Names of the files that are needed, such as `*.safetensors`.
        option: What errors call the source.
        revision: Commit, branch or tag; None: that of the name, or the newest.

    Raises:
        FileNotFoundError: The hub has no such repository, or is out of reach and the cache lacks it.
    """
    name, own = split(source)
    pinned = revision or own
    try:
        return _online(name, pinned, patterns) if reachable() else _cached(name, pinned, patterns)
    except (LocalEntryNotFoundError, HTTP_ERROR) as error:
        raise FileNotFoundError(missing(option, name, str(error) or repr(error), pinned)) from None


def _online(name: str, revision: str | None, patterns: list[str]) -> Path:
    """What the hub has; what the cache has if the connection breaks or the hub fails."""
    try:
        twice = _twice(name, revision)
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=twice))
    except HTTP_ERROR as error:
        if (
            isinstance(error, HfHubHTTPError)
            and error.response.status_code < 500
            and error.response.status_code != BUSY
        ):
            raise
        with suppress(LocalEntryNotFoundError):
            return _cached(name, revision, patterns)
        raise


def _cached(name: str, revision: str | None, patterns: list[str]) -> Path:
    """What the cache has."""
    return Path(
        snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=TWICE, local_files_only=True
        )
    )


def _twice(name: str, revision: str | None) -> list[str]:
    """Files that hold the same weights as the safetensors beside them. The hub is not asked about a commit of which the
    cache has weights: what it holds never changes."""
    if revision and COMMIT.fullmatch(revision):
        for file, twice in KNOWN.items():
            if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
                return twice
    names = HfApi().list_repo_files(name, revision=revision)
    has = any(each.startswith("model") and each.endswith(".safetensors") for each in names)
    return TWICE if has else []


def missing(option: str, name: str, error: str, revision: str | None = None) -> str:
    """What to do about a hub name that is not at hand."""
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} is out of reach"
    said = error.splitlines()[0] if reachable() else f"no folder of this name, the cache lacks it, and {why}"
    pinned = f" --revision {revision}" if revision else ""
    return (
        f"{option}: {name}: {said}\n  With a network, `hf download {name}{pinned}` fetches it into the cache "
        "(HF_HOME), or with `--local-dir FOLDER` into a folder that can be named instead"
    )
