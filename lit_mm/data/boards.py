"""Renders boards of digits with questions that need few or many visual tokens, and mixes them with easy-VQA.

A board has 64×64 pixels: four rows of four digits on light paper, one digit in each cell of 16×16 pixels. With a 4×4
grid, a token shows one digit at 16 tokens, a block of four digits at 4, and all sixteen at 1.
    "what is in row 2?"              "9074"   type `row`
    "what is in row 2, column 3?"    "7"      type `cell`
    "what color is the text?"        "blue"   type `color`; one token tells it

Digits are independent, so that nothing but the image tells a row: a guess is right once in 10,000 times.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lit_mm.data.dataset import Subset
from lit_mm.data.easy_vqa import EasyVQADataModule, package_data
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.writing import DrawnSet, Pairs

ROWS, CELL = 4, 16
INKS = {
    "black": (0, 0, 0),
    "blue": (20, 40, 220),
    "brown": (120, 60, 10),
    "green": (0, 120, 0),
    "red": (210, 0, 0),
    "teal": (0, 130, 130),
}
Color = tuple[int, ...]


@dataclass(frozen=True)
class Board:
    """What a board shows.

    Args:
        rows: Four texts of four digits, from top to bottom.
        ink: The digits' color, one of INKS.
        paper: The background, RGB.
        shifts: For each cell in reading order, pixels by which its digit is off the center: across and down, -1 to 1.
        cells: Row and column, from 0, of the two cells that are asked for.
    """

    rows: tuple[str, ...]
    ink: str
    paper: Color
    shifts: tuple[tuple[int, int], ...]
    cells: tuple[tuple[int, int], ...]

    def questions(self) -> dict[str, Pairs]:
        """The type of the questions -> pairs of question and answer."""
        return {
            "row": [(f"what is in row {number}?", row) for number, row in enumerate(self.rows, 1)],
            "cell": [(f"what is in row {y + 1}, column {x + 1}?", self.rows[y][x]) for y, x in self.cells],
            "color": [("what color is the text?", self.ink)],
        }

    def caption(self) -> tuple[str, str]:
        """easy-VQA's caption question, and everything that the board shows: "blue 9791 9074 8337 8876"."""
        return "what is in the image?", " ".join((self.ink, *self.rows))


class DemoDataModule(EasyVQADataModule):
    """easy-VQA and rendered boards of digits: some questions need one visual token, others need many.

    Every question has a type, `easy-VQA`, `row`, `cell` or `color`, so that `test` tells the accuracy of each.

    Training goes from the boards' captions to the captions of both, and then to the questions of both. Reading is
    learned from captions of boards alone. A board's caption has five times as many tokens in the loss as easy-VQA's, so
    there are a fifth as many.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        root: str = "data/demo",
        val_images: int = 200,
        train_boards: int = 4000,
        val_boards: int = 200,
        test_boards: int = 1000,
        reading_epochs: int = 0,
        caption_epochs: int = 0,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        val_questions: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Set where the records and boards are written and how batches are made.

        Args:
            inputs: The model's properties that the data depends on; on the command line the model sets them.
            root: Folder for the boards, and for easy-VQA's records in easy_vqa.
            val_images: Training images of easy-VQA held out for validation, with all their questions.
            train_boards: Boards to train on.
            val_boards: Boards for validation.
            test_boards: Boards for the final test.
            reading_epochs: Epochs of the boards' captions. This and the next need
                trainer.reload_dataloaders_every_n_epochs: 1.
            caption_epochs: Epochs of captions of both, after that.
            batch_size: Conversations per batch and device in training.
            eval_batch_size: Conversations per batch and device outside training; null: as batch_size.
            val_questions: Number of questions that validation asks; null: all. As in ImageDataModule.
            num_workers: Processes that load batches; 0 loads in the main process.
        """
        easy = f"{root}/easy_vqa"
        super().__init__(
            inputs, easy, val_images, caption_epochs, batch_size, eval_batch_size, val_questions, num_workers
        )
        self.boards = Path(root) / "boards"
        self.counts = {"train": train_boards, "val": val_boards, "test": test_boards}
        self.reading_epochs = reading_epochs
        self.files["reading"] = [Subset(f"{self.boards}/captions.json", str(self.boards))]
        shares = {"captions": (1, 0.2), "train": (0.5, 0.5), "val": (1, 1), "test": (1, 1)}
        for name, (of_easy, of_boards) in shares.items():
            self.files[name] = [
                Subset(f"{easy}/{name}.json", str(package_data()), of_easy),
                Subset(f"{self.boards}/{name}.json", str(self.boards), of_boards),
            ]

    def setup(self, stage: str) -> None:
        """Also read the first stage's set."""
        super().setup(stage)
        if self.reading_epochs and str(getattr(stage, "value", stage)) == "fit":
            self.sets["reading"] = self._read("reading", "train")

    def train_set(self, epoch: int) -> str:
        """The set that an epoch trains on."""
        return "reading" if epoch < self.reading_epochs else super().train_set(epoch - self.reading_epochs)

    def order(self) -> dict[str, Any]:
        """Everything that decides which records go into which batch."""
        return super().order() | {"reading_epochs": self.reading_epochs}

    def prepare_data(self) -> None:
        """Write the records, and the boards that do not exist yet."""
        super().prepare_data()
        BOARDS.write(self.boards, **self.counts)


def make_board(split: str, number: int, seed: int = 0) -> Board:
    """The board with this number."""
    rng = random.Random(f"{seed} {split} {number}")
    rows = tuple("".join(rng.choices("0123456789", k=ROWS)) for _ in range(ROWS))
    ink, paper = rng.choice([*INKS]), tuple(rng.randint(190, 255) for _ in range(3))
    shifts = tuple((rng.randint(-1, 1), rng.randint(-1, 1)) for _ in range(ROWS**2))
    cells = rng.sample([(row, column) for row in range(ROWS) for column in range(ROWS)], 2)
    return Board(rows, ink, paper, shifts, tuple(cells))


def render(board: Board) -> Image.Image:
    """The board, 64×64 pixels RGB, in Pillow's own font."""
    image = Image.new("RGB", (ROWS * CELL, ROWS * CELL), board.paper)
    drawing, font = ImageDraw.Draw(image), ImageFont.load_default(size=15)
    for place, (digit, (across, down)) in enumerate(zip("".join(board.rows), board.shifts, strict=True)):
        row, column = divmod(place, ROWS)
        center = column * CELL + CELL // 2 + across, row * CELL + CELL // 2 + down
        drawing.text(center, digit, INKS[board.ink], font, anchor="mm")
    return image


def _sampled(rng: random.Random, pairs: Pairs) -> Pairs:
    """As `in_any_order`, but in the order of the demo's published figures."""
    return rng.sample(pairs, len(pairs))


BOARDS = DrawnSet("board", make_board, render, _sampled)
"""Boards as records; `BOARDS.write` writes them."""
