"""The questions of a benchmark as items, which `lit_mm.data.records` reads like those of any other file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from lit_mm.data.media import inside
from lit_mm.data.records import Kind, Media, RecordError
from lit_mm.data.sources.base import Source, digest, stamp_of
from lit_mm.evaluation.benchmarks.definition import Definition, Layout
from lit_mm.evaluation.benchmarks.fields import MissingField, NullField, as_list, fill, or_empty, text, values
from lit_mm.evaluation.benchmarks.rows import Row, joined_files, read_rows

Item = dict[str, Any]


class Questions(Source):
    """A benchmark's questions by number, as `(where, item)`.

    An item has `question_id`, `text`, and where the benchmark has them `references`, `type`, `group`, and `image` or
    `video`: a path below the root, or the file itself, which is only read when the item is. All but images and
    videos is read and checked when this is made.

    Args:
        name: What errors call the files.
        definition: What the benchmark's YAML file says.
        layout: The layout of the files.
        files: The questions' files.
        folder: The folder that these are below.
        root: The folder that images and videos are looked for in.
        cache: The folder for parquet files as Arrow.

    Raises:
        ValueError: The files disagree with the layout, or with each other: ids that come twice, answers of another
            split, questions with and without answers.
        RecordError: A record lacks a field, or has a wrong value in it.
    """

    def __init__(
        self,
        name: str,
        definition: Definition,
        layout: Layout,
        files: list[Path],
        folder: Path,
        root: Path,
        cache: Path,
    ) -> None:
        self.name, self.definition, self.layout, self.root = name, definition, layout, root.resolve()
        self.rows = read_rows(files, layout, folder, cache)
        self._share()
        self.items = [self._item(number) for number in range(len(self.rows.rows))]
        self._check_ids()
        self._check_references()
        joined = [file for join in layout.join for file in joined_files(join, files[0], layout.files)]
        stamps = [stamp_of(str(file)) for file in (*files, *joined)]
        self.fingerprint = digest("benchmark", asdict(definition), stamps, str(self.root))

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[tuple[str, Item]]:
        return (self[number] for number in range(len(self)))

    @property
    def ids(self) -> list[str | int]:
        """The questions' ids, in order."""
        return [item["question_id"] for item in self.items]

    def _read(self, number: int) -> tuple[str, Item]:
        where, item = self._where(number), self.items[number]
        row = self.rows.rows[number]
        if self.rows.media is not None:
            row = row | self.rows.media[self.rows.numbers[number]].to_pylist()[0]
        templates: dict[Kind, list[str]] = {"image": as_list(self.layout.image), "video": as_list(self.layout.video)}
        return where, item | {kind: self._medium(where, kind, own, row) for kind, own in templates.items() if own}

    def _where(self, number: int) -> str:
        return f"{self.rows.places[number]} (id {self.items[number]['question_id']})"

    def _medium(self, where: str, kind: Kind, templates: list[str], row: Row) -> Any:
        """The record's image or video: the content itself, or the first path of the templates that exists."""
        paths, lacking = [], ""
        for template in templates:
            try:
                found = fill(template, row)
            except MissingField as error:  # of an optional join
                lacking = str(error)
                continue
            if not isinstance(found, str) or found.startswith("data:"):
                return found
            paths.append(found)
        if not paths:
            raise RecordError(where, f"missing {kind}", lacking)
        exists = [path for path in paths if (self.root / path).is_file()]
        if not exists and len(paths) > 1:
            detail = f"{kind}: expected one of {', '.join(paths)} in {self.root}, found none"
            raise RecordError(where, f"missing {kind}", detail)
        path = exists[0] if exists else paths[0]
        inside(self.root, where, Media(kind, path))
        return path

    def _item(self, number: int) -> Item:
        where, row, layout = self.rows.places[number], self.rows.rows[number], self.layout
        try:
            if layout.compute == "padded_box":
                row["padded_box"] = padded_box(row)
            item: Item = {"question_id": _id(layout.id, row), "text": self._prompt(row)}
            if references := self._references(row):
                item["references"] = references
            with suppress(NullField):  # a question without a type
                if layout.type:
                    item["type"] = layout.type_names.get(kind := text(layout.type, row), kind)
            if layout.group:
                item["group"] = text(layout.group, row)
        except MissingField as error:
            raise RecordError(where, "missing field", str(error)) from None
        except ValueError as error:
            raise RecordError(where, "malformed field", str(error)) from None
        return item

    def _prompt(self, row: Row) -> str:
        definition, layout = self.definition, self.layout
        question = text(layout.question, row)
        if definition.remove:
            question = question.replace(definition.remove, "")
        options = [
            text(definition.option, {"letter": letter, "text": option})
            for letter, option in zip(ascii_uppercase, self.options(row), strict=False)
        ]
        parts = {"question": question.strip(), "context": or_empty(layout.context, row), "options": "\n".join(options)}
        return text(definition.prompt, {**row, **parts})

    def options(self, row: Row) -> list[str]:
        """The texts of a record's options; empty if it has none."""
        found = []
        for template in as_list(self.layout.options):
            try:
                found += list(values(template, row))
            except MissingField:
                found.append("")
        filled = [option for option in found if option.strip()]
        if found[: len(filled)] != filled or (found and not filled):
            raise ValueError(f"options: expected texts, and empty ones only at the end, found {found!r:.200}")
        if len(filled) > len(ascii_uppercase):
            raise ValueError(f"options: expected at most {len(ascii_uppercase)}, found {len(filled)}")
        return filled

    def _references(self, row: Row) -> list[str]:
        """The accepted answers, or the right option's letter and text, all options, and for circular evaluation the
        group; empty if there are none."""
        try:
            if not self.layout.options:
                return list(values(self.layout.references, row))
            answer = text(self.layout.answer, row).strip()
        except MissingField:
            return []
        if not answer:
            return []
        options = self.options(row)
        known = {
            "letter": list(ascii_uppercase[: len(options)]),
            "number": [str(number) for number in range(len(options))],
            "text": options,
        }[self.layout.answer_is]
        if answer not in known:
            raise ValueError(f"{self.layout.answer}: expected one of {', '.join(known)}, found {answer!r:.60}")
        right = known.index(answer)
        group = [text(self.layout.group, row)] if self.definition.metric == "circular" else []
        return [ascii_uppercase[right], options[right], *options, *group]

    def _share(self) -> None:
        """Where the shared field has the id of another record, put that record's value."""
        if not (field := self.layout.shared):
            return
        own = {text(self.layout.id, row): row.get(field) for row in self.rows.rows}
        for row in self.rows.rows:
            row[field] = own.get(str(row.get(field)), row.get(field))

    def _check_ids(self) -> None:
        seen: dict[str, int] = {}
        for number, name in enumerate(map(str, self.ids)):
            if name in seen:
                first = self.rows.places[seen[name]]
                raise ValueError(f"{self.rows.places[number]}: {self.layout.id} is {name!r:.80}, as in {first}")
            seen[name] = number

    def _check_references(self) -> None:
        lacking = [number for number, item in enumerate(self.items) if "references" not in item]
        if lacking and len(lacking) < len(self):
            field = self.layout.answer or self.layout.references
            detail = f"{field}: {len(lacking)} of {len(self)} questions have no answer, expected all or none"
            raise RecordError(self._where(lacking[0]), "no answer", detail)


def _id(template: str, row: Row) -> str | int:
    value = fill(template, row)
    return value if isinstance(value, int) and not isinstance(value, bool) else text(template, row)


def padded_box(row: Row) -> str:
    """The box of a record in parts of the side of the square that its image is padded to, as `[x1, y1, x2, y2]`.

    The padding is as LLaVA's `expand2square`: the image is in the middle, half a pixel up or left for an odd rest.

    Raises:
        MissingField: The record lacks `bbox`, `width` or `height`.
        ValueError: The box is not within the image.
    """
    if lacking := {"bbox", "width", "height"} - row.keys():
        raise MissingField(f"expected the fields bbox, width and height, found no {', '.join(sorted(lacking))}")
    box, width, height = row["bbox"], row["width"], row["height"]
    numbers = [*box, width, height] if isinstance(box, list) and len(box) == 4 else [None]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise ValueError(
            f"bbox, width, height: expected a box of four numbers and a size, found {box!r}, {width!r}, {height!r}"
        )
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"bbox: expected x1 < x2 and y1 < y2 within {width}×{height} (width × height), found {box}")
    side = max(width, height)
    x, y = (side - width) // 2, (side - height) // 2
    parts = [(left + x) / side, (top + y) / side, (right + x) / side, (bottom + y) / side]
    return "[" + ", ".join(f"{part:.6f}" for part in parts) + "]"
