"""A hub that accepts connections and never answers."""

import socket

import pytest
from huggingface_hub import constants

from lit_mm.model import hub


@pytest.fixture
def dead_hub(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "SECONDS", 1.0)
        hub.reachable.cache_clear()
        yield
        hub.reachable.cache_clear()
