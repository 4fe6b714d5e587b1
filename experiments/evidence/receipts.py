"""Copies real receipts to data/receipts and writes records that ask for their whole text.

    python -m experiments.evidence.receipts FOLDER

FOLDER has train.json and val.json in LLaVA's format, images, and train_lines.jsonl: {"image": …, "text": …} for each
line of text of the training receipts, from top to bottom.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from lit_mm.data.writing import conversation, write_records

TO = Path("data/receipts")


def main(folder: Path, to: Path = TO) -> None:
    for name in ("train.json", "val.json"):
        to.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, to / name)
    shutil.copytree(folder / "images", to / "images", dirs_exist_ok=True, copy_function=shutil.copyfile)
    texts: dict[str, list[str]] = defaultdict(list)
    for line in (folder / "train_lines.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts[record["image"]].append(record["text"])
    asked = [
        conversation(f"{Path(image).stem}_text", "image", image, [("what is in the image?", "\n".join(lines))])
        for image, lines in texts.items()
    ]
    write_records(to / "text.json", asked)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
