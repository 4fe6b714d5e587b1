"""Fixtures for all tests: a cache of their own, a tokenizer, an instruction set on disk."""

from __future__ import annotations

import pytest

from lit_mm.data.tokenizer import load_tokenizer
from tests.helpers.browser import page  # noqa: F401
from tests.helpers.clock import hands  # noqa: F401
from tests.helpers.models import tiny_llm
from tests.helpers.records import write_instruction_set


def pytest_collection_modifyitems(items):
    """Files with slow tests first: the last file of a run keeps one of two processes waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tables of records are not kept in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(tiny_llm())


@pytest.fixture
def instruction_set(tmp_path):
    """A folder with images, train.json and val.json in LLaVA's format."""
    return write_instruction_set(tmp_path)
