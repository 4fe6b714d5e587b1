"""Renders a small video instruction set whose questions cannot be answered from one frame.

A clip has eight frames of 32×32 pixels. On white, a shape moves, leaving the picture on one side and
returning on the other, and cycles through four colors from a random start. A black dot flashes on top,
for one frame at a time.
    "in which direction does the circle move?"     left, right, up or down
    "which colour comes after red?"                "blue"
    "how many times does the dot appear?"          1, 2, 3 or 4

A shape's place says nothing about its direction, as the picture has no border to start from. One frame
shows one of four colors. A frame with the dot makes a higher count a little more likely, so that the best
guess from one frame is right in 34 to 42 % of the clips instead of 25 %. Videos are lossless H.264.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import numpy as np

from lit_mm.data.datamodules import VideoDataModule
from lit_mm.data.images import ImageOptions
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.video import VideoOptions
from lit_mm.data.writing import conversation, write_records

SIZE, FRAMES, FPS = 32, 8, 4
COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 70, 230),
    "yellow": (240, 200, 0),
    "purple": (160, 50, 200),
    "cyan": (40, 210, 220),
}
BLACK = (0, 0, 0)
SHAPES = ("circle", "square", "triangle")
RADIUS, DOT = 6, 4
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
ORDER = [(frame + 1) // 2 % 4 for frame in range(FRAMES)]
"""The color of each frame: two frames per color, with the first color in the first and last frame."""
Place = tuple[int, int]


@dataclass(frozen=True)
class Figure:
    """A colored shape in a clip.

    Args:
        color: One of COLORS, or black.
        shape: One of SHAPES, or dot.
        places: Row and column of its center in every frame; None where it is not shown.
    """

    color: str
    shape: str
    places: tuple[Place | None, ...]


@dataclass(frozen=True)
class Clip:
    """What a clip shows, and its questions.

    Args:
        figures: In drawing order.
        questions: Pairs of question and answer.
        captions: Pairs of question and answer, where the answer describes every frame.
    """

    figures: tuple[Figure, ...]
    questions: tuple[tuple[str, str], ...]
    captions: tuple[tuple[str, str], ...]


class VideoShapesDataModule(VideoDataModule):
    """Rendered clips as LLaVA records, with all questions of a clip in one conversation.

    A run can begin with some epochs of captions, which describe every frame: they teach the model to look at
    each frame before questions ask about changes between them.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        root: str = "data/clips",
        video: VideoOptions = VideoOptions(),  # noqa: B008 (frozen)
        train_clips: int = 6000,
        val_clips: int = 200,
        test_clips: int = 600,
        caption_epochs: int = 0,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        val_questions: int | None = None,
        num_workers: int = 0,
    ) -> None:
        """Set where the clips are written and how batches are made.

        Args:
            inputs: The model's properties that the data depends on; on the command line the model sets them.
            root: Folder for the clips and for captions.json, train.json, val.json and test.json.
            video: Which frames are shown; a clip has eight.
            train_clips: Clips to train on.
            val_clips: Clips for validation.
            test_clips: Clips for the final test.
            caption_epochs: Epochs of captions before the questions. Needs
                trainer.reload_dataloaders_every_n_epochs: 1.
            batch_size: Conversations per batch and device in training.
            eval_batch_size: Conversations per batch and device outside training; null: as batch_size.
            val_questions: Number of questions that validation asks; null: all. As in ImageDataModule.
            num_workers: Processes that load batches; 0 loads in the main process.
        """
        super().__init__(
            inputs,
            video,
            train=f"{root}/train.json",
            val=f"{root}/val.json",
            test=f"{root}/test.json",
            image_root=root,
            image=ImageOptions("keep", None),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_questions=val_questions,
            num_workers=num_workers,
        )
        self.files["captions"] = f"{root}/captions.json"
        self.root, self.caption_epochs = Path(root), caption_epochs
        self.clips = {"train": train_clips, "val": val_clips, "test": test_clips}

    def prepare_data(self) -> None:
        """Write the clips and records that do not exist yet."""
        write_clips(self.root, **self.clips)


def write_clips(root: Path, train: int, val: int, test: int, seed: int = 0) -> None:
    """Write captions.json (of the training clips), train.json, val.json and test.json in LLaVA's format, and
    their videos.

    A clip depends only on the seed, its split and its number. Existing videos are not written again.

    Args:
        root: Folder of the records; videos go to clips_SEED in it.
        train: Number of training clips.
        val: Number of clips for validation.
        test: Number of clips for the final test.
        seed: Seed of all random choices.
    """
    (root / f"clips_{seed}").mkdir(parents=True, exist_ok=True)
    counts = {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        for number in range(count):
            file = root / video_name(split, number, seed)
            if not file.is_file():
                write_video(file, render(make_clip(split, number, seed)))
        write_records(root / f"{split}.json", records(split, count, seed))
    write_records(root / "captions.json", captions("train", train, seed))


def records(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """LLaVA records of the first `count` clips of a split, with all questions of a clip in one conversation."""
    return [_record(split, number, seed, make_clip(split, number, seed).questions) for number in range(count)]


def captions(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """LLaVA records of the same clips with their captions."""
    return [_record(split, number, seed, make_clip(split, number, seed).captions) for number in range(count)]


def _record(split: str, number: int, seed: int, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return conversation(f"{split}_{number}", "video", video_name(split, number, seed), pairs)


def video_name(split: str, number: int, seed: int) -> str:
    """The video's path below the root."""
    return f"clips_{seed}/{split}_{number}.mp4"


def make_clip(split: str, number: int, seed: int = 0) -> Clip:
    """The clip with this number."""
    rng = random.Random(f"{seed} {split} {number}")
    shape, colors = rng.choice(SHAPES), rng.sample([*COLORS], 4)
    start, direction = (rng.randrange(SIZE), rng.randrange(SIZE)), rng.choice([*STEPS])
    places = path(start, direction, speed=rng.randint(4, 7))
    seen = rng.choice(patterns(rng.randint(1, 4)))
    middle = rng.randrange(DOT, SIZE - DOT), rng.randrange(DOT, SIZE - DOT)
    dot = Figure("black", "dot", shown([middle] * FRAMES, seen))
    figures = [Figure(colors[i], shape, shown(places, [now == i for now in ORDER])) for i in range(4)]
    questions = [(f"which colour comes after {colors[i]}?", colors[(i + 1) % 4]) for i in rng.sample(range(4), 2)]
    questions.append((f"in which direction does the {shape} move?", direction))
    questions.append(("how many times does the dot appear?", str(appearances(seen))))
    captions = [
        (f"where is the {shape} in each frame?", " ".join(map(cell, places))),
        (f"which colour has the {shape} in each frame?", " ".join(colors[now] for now in ORDER)),
        ("how often did the dot appear up to each frame?", " ".join(map(str, accumulate(map(int, begins(seen)))))),
    ]
    return Clip((*figures, dot), tuple(rng.sample(questions, 4)), tuple(rng.sample(captions, 3)))


def path(start: Place, direction: str, speed: int) -> list[Place]:
    """Places along a straight line, modulo SIZE; `speed` is in pixels per frame."""
    down, right = STEPS[direction]
    row, column = start
    return [((row + down * speed * i) % SIZE, (column + right * speed * i) % SIZE) for i in range(FRAMES)]


def patterns(count: int) -> list[tuple[bool, ...]]:
    """All ways to be visible in `count` frames, no two of them neighbors."""
    return [way for way in product((False, True), repeat=FRAMES) if sum(way) == appearances(way) == count]


def appearances(seen: tuple[bool, ...]) -> int:
    """How many times a shape appears."""
    return sum(begins(seen))


def begins(seen: tuple[bool, ...]) -> list[bool]:
    """In which frames a shape appears, i.e. was not visible just before."""
    return [now and not before for before, now in zip((False, *seen), seen, strict=False)]


def shown(places: Sequence[Place], seen: Sequence[bool]) -> tuple[Place | None, ...]:
    """The places, with None for frames in which a figure is not visible."""
    return tuple(place if now else None for place, now in zip(places, seen, strict=True))


def cell(place: Place) -> str:
    """The cell of a 4×4 grid, column letter first: "a1" is top left."""
    row, column = (4 * middle // SIZE for middle in place)
    return f"{'abcd'[column]}{row + 1}"


def render(clip: Clip) -> np.ndarray:
    """The clip's frames, uint8 [FRAMES, SIZE, SIZE, 3]."""
    frames = np.full((FRAMES, SIZE, SIZE, 3), 255, dtype=np.uint8)
    for figure in clip.figures:
        for frame, place in zip(frames, figure.places, strict=True):
            if place is not None:
                frame[np.roll(MASKS[figure.shape], place, axis=(0, 1))] = COLORS.get(figure.color, BLACK)
    return frames


def _mask(inside: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """The pixels [SIZE, SIZE] covered by a shape centered at (0, 0), modulo SIZE."""
    offsets = (np.arange(SIZE) + SIZE // 2) % SIZE - SIZE // 2
    return inside(offsets[:, None], offsets[None, :])


MASKS = {
    "circle": _mask(lambda row, column: row**2 + column**2 < (RADIUS + 0.5) ** 2),
    "dot": _mask(lambda row, column: row**2 + column**2 < (DOT + 0.5) ** 2),
    "square": _mask(lambda row, column: np.maximum(abs(row), abs(column)) < RADIUS),
    "triangle": _mask(lambda row, column: (abs(row) <= RADIUS) & (2 * abs(column) <= row + RADIUS)),
}


def write_video(file: Path, frames: np.ndarray) -> None:
    """Write frames uint8 [T, H, W, 3] to a lossless mp4 file."""
    import av

    part = file.with_suffix(".part.mp4")
    with av.open(str(part), "w") as container:
        stream: Any = container.add_stream("libx264rgb", rate=FPS, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = *frames.shape[1:3], "rgb24", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    part.replace(file)
