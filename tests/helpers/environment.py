"""Where things lie, and what may be missing."""

import importlib.util
import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


TOKENIZER = str(ROOT / "experiments/quickstart_tokenizer")


def installed(package: str):
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed (make install brings it)"
    )


def free_port() -> int:
    """A port that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment_of(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The variables by which torchrun tells a process its rank."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    return {name: str(value) for name, value in {**named, **told}.items()}
