"""Where things lie, and what may be missing."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


TOKENIZER = str(ROOT / "experiments/quickstart_tokenizer")


def installed(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")
