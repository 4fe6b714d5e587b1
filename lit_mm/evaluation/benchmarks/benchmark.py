"""Benchmarks by name or YAML file: where their files are, their questions, and what their servers want."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lit_mm.evaluation.benchmarks.definition import Definition, Layout, read_definition
from lit_mm.evaluation.benchmarks.fields import as_list
from lit_mm.evaluation.benchmarks.questions import Item, Questions
from lit_mm.evaluation.benchmarks.rows import fits, kind_of, matching
from lit_mm.evaluation.benchmarks.submission import write_submission

BENCHMARKS: dict[str, Path] = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.yaml"))}
"""The YAML file of every benchmark that comes with the package, by name."""


class Benchmark:
    """A benchmark and the ways to read its files. Its path is a file of questions, or a folder with its files.

    Args:
        name: Its name in results.
        definition: What its YAML file says.
    """

    def __init__(self, name: str, definition: Definition) -> None:
        self.name, self.definition = name, definition
        self.metric, self.max_new_tokens = definition.metric, definition.max_new_tokens

    def items(self, path: str, root: str | Path | None = None) -> list[Item]:
        """All questions, with images in tables as bytes, in the format `question` of `lit_mm.data.records`.

        Args:
            path: A file or folder.
            root: The folder of images and videos; None: `image_root`.

        Raises:
            As `source`, and RecordError: An image or a video is missing or outside the root.
        """
        with TemporaryDirectory() as cache:
            return [item for _, item in self.source(path, Path(cache), root)]

    def source(self, path: str, cache: Path, root: str | Path | None = None) -> Questions:
        """The questions by number; only images and videos are read when they are needed.

        Args:
            path: A file or folder.
            cache: The folder for parquet files as Arrow.
            root: The folder of images and videos; None: `image_root`.

        Raises:
            FileNotFoundError: The path, the questions' file or a second file that belongs to it does not exist.
            ValueError, RecordError: As `Questions`.
        """
        layout, files, folder = self._find(path)
        root = Path(root).expanduser() if root else folder
        return Questions(path or self.name, self.definition, layout, files, folder, root, cache)

    def image_root(self, path: str) -> Path:
        """The folder in which images and videos are looked for: the path, or the folder of that file."""
        return self._find(path)[2]

    def submission(self, predictions: Iterable[Mapping[str, Any]], folder: str | Path, path: str) -> Path:
        """Write the answers to all questions as the benchmark's server wants them.

        Args:
            predictions: {"question_id", "text"} of every question, in any order.
            folder: Where the file is written; created if needed.
            path: The benchmark's path, as the questions were read from.

        Returns:
            The file.

        Raises:
            ValueError: The benchmark has no server, or there are not exactly one answer to each question.
        """
        if self.definition.submission is None:
            raise ValueError(f"{self.name}: has no server for submissions")
        with TemporaryDirectory() as cache:
            questions = self.source(path, Path(cache))
            return write_submission(self.definition.submission, questions, predictions, Path(folder))

    def _find(self, path: str) -> tuple[Layout, list[Path], Path]:
        """The layout that fits a path, the questions' files, and the folder that these and the images are in."""
        place = Path(path).expanduser() if path else self._package()
        if place.is_dir():
            return self._in_folder(place)
        if not place.is_file():
            raise FileNotFoundError(f"{self.name}: no file or folder {place}")
        layouts = self.definition.layouts
        named = [layout for layout in layouts if fits(place, layout.files)]
        alike = [layout for layout in layouts if self._format(layout) == kind_of(place, None)]
        if not (named or alike):
            raise ValueError(f"{place}: expected one of {self._expected()}, as {self.name} comes in")
        return (named or alike)[0], [place], place.parent

    def _in_folder(self, folder: Path) -> tuple[Layout, list[Path], Path]:
        for layout in self.definition.layouts:
            if files := matching(folder, layout.files):
                return layout, files, folder
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{folder}: expected one of {self._expected()}, as {self.name} comes in, found {found}")

    def _package(self) -> Path:
        name, _, folder = self.definition.package.partition("/")
        if not name:
            raise ValueError(f"{self.name}: expected a path, as in {self.name}:PATH")
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"{self.name}: comes with the package {name}, which is not installed")
        return Path(spec.submodule_search_locations[0]) / folder

    def _expected(self) -> str:
        return ", ".join(name for layout in self.definition.layouts for name in as_list(layout.files))

    @staticmethod
    def _format(layout: Layout) -> str:
        return kind_of(Path(as_list(layout.files)[0]), layout.format)


def load_benchmark(name: str) -> Benchmark:
    """A benchmark of this package by name, or one that a YAML file describes.

    Raises:
        FileNotFoundError: There is no such YAML file.
        ValueError: The name is unknown, or the file does not describe a benchmark.
    """
    if name.endswith((".yaml", ".yml")):
        file = Path(name).expanduser()
    elif name in BENCHMARKS:
        file = BENCHMARKS[name]
    else:
        raise ValueError(f"unknown benchmark {name!r}: expected a YAML file or one of {', '.join(BENCHMARKS)}")
    return Benchmark(file.stem, read_definition(file))


def split_name(path: str) -> tuple[Benchmark | None, str]:
    """The benchmark and the path of `docvqa:PATH` or `my.yaml:PATH`; None and the path of a file of records.

    Raises:
        FileNotFoundError, ValueError: As `load_benchmark`.
    """
    name, colon, rest = path.partition(":")
    if re.search(r"\.ya?ml$", name) and colon:
        return load_benchmark(name), rest
    is_name = re.fullmatch(r"[\w-]{2,}", name)  # not C:\, nor owner/name:split of the hub
    if not colon or not is_name or Path(path).exists():
        return None, path
    return load_benchmark(name), rest
