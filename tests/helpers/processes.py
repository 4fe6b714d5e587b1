"""Processes that have imported everything already, which takes seconds, and what they are told of each other."""

import multiprocessing
import socket

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["lit_mm.cli", "tests.helpers.killing", "tests.helpers.command_line", "tests.helpers.sharded"]
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
