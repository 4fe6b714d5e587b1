"""Files of benchmarks on the disk."""

from pathlib import Path

import pytest

from tests.helpers import benchmark_files


@pytest.fixture
def files(tmp_path):
    """Writes a benchmark's files; returns their folder."""

    def write(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        getattr(benchmark_files, name)(folder)
        return folder

    return write
