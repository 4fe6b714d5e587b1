"""Copies real receipts to data/receipts, 60 of them for validation, and writes records that ask for their whole text.

    python -m experiments.evidence.receipts FOLDER

FOLDER has train.json and val.json in LLaVA's format, images, and train_lines.jsonl: {"image": …, "text": …} for each
line of text of the training receipts, from top to bottom. Its val.json becomes test.json, so that nothing is chosen by
what the test asks.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from lit_mm.data.writing import conversation, write_records

TO, HELD_OUT = Path("data/receipts"), 60


def main(folder: Path, to: Path = TO) -> None:
    """Copy and write.

    Raises:
        ValueError: There are too few receipts, or one has no line of text.
    """
    shutil.copytree(folder / "images", to / "images", dirs_exist_ok=True, copy_function=shutil.copyfile)
    records, asked = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("train", "val"))
    if len(records) <= HELD_OUT:
        raise ValueError(f"{folder / 'train.json'}: expected more than {HELD_OUT} receipts, found {len(records)}")
    for name, own in {"train": records[:-HELD_OUT], "val": records[-HELD_OUT:], "test": asked}.items():
        write_records(to / f"{name}.json", own)
    texts: dict[str, list[str]] = defaultdict(list)
    file = folder / "train_lines.jsonl"
    with file.open(encoding="utf-8") as lines:  # str.splitlines would also end one at U+2028
        for record in map(json.loads, lines):
            texts[record["image"]].append(record["text"])
    images = [record["image"] for record in records[:-HELD_OUT]]
    if lacking := [image for image in images if image not in texts]:
        raise ValueError(f"{file}: no line of text for {lacking[0]} and {len(lacking) - 1} other images")
    pairs = {image: [("what is in the image?", "\n".join(texts[image]))] for image in images}
    read = [conversation(f"{Path(image).stem}_text", "image", image, own) for image, own in pairs.items()]
    write_records(to / "text.json", read)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
