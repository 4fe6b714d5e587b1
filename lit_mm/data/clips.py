"""A small video instruction set whose questions need time, rendered here.

A clip is eight frames of 32×32 pixels: on white a shape moves, leaves the picture on one side and
comes back on the other, and takes four colors one after the other, in a circle that begins
anywhere; over it a black dot flashes, each time in one frame.
    "in which direction does the circle move?"     left, right, up or down
    "which colour comes after red?"                "blue"
    "how many times does the dot appear?"          1, 2, 3 or 4

No single frame tells. Where the shape is says nothing of where it goes, as the picture has no border
to start from. Of four colors one frame shows one. A frame with the dot makes a higher count a
little likelier: the best guess from one frame is right in 34 to 42 % of the clips instead of 25 %.
Videos are H.264 without loss.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import numpy as np

from lit_mm.data.datamodules import VideoDataModule
from lit_mm.data.dataset import ModelInputs
from lit_mm.data.images import ImageOptions
from lit_mm.data.video import VideoOptions

SIZE, FRAMES, FPS = 32, 8, 4
COLOURS = {
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
"""Which of the four colors every frame has: two frames each, the first one's second frame is the last."""
Place = tuple[int, int]


@dataclass(frozen=True)
class Figure:
    """A colored shape in a clip.

    Args:
        color: One of COLOURS, or black.
        shape: One of SHAPES, or dot.
        places: For every frame the row and column of its middle, None where it is not shown.
    """

    color: str
    shape: str
    places: tuple[Place | None, ...]


@dataclass(frozen=True)
class Clip:
    """What is to be seen and what is asked.

    Args:
        figures: In the order in which they are drawn.
        questions: Pairs of question and answer.
        captions: Likewise, but the answer says something of every frame.
    """

    figures: tuple[Figure, ...]
    questions: tuple[tuple[str, str], ...]
    captions: tuple[tuple[str, str], ...]


class VideoShapesDataModule(VideoDataModule):
    """Rendered clips as LLaVA records: all questions of a clip in one conversation.

    A run can begin with some epochs of captions, which say something of every frame: it teaches to
    look at each before the questions ask for what changes between them.
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
        num_workers: int = 0,
    ) -> None:
        """Where the clips are written and how they are fed.

        Args:
            inputs: What the data must know of the model; on the command line it comes from there.
            root: Folder for the clips and for captions.json, train.json, val.json and test.json.
            video: Which frames are shown; a clip has eight.
            train_clips: Clips to train on.
            val_clips: Clips for validation.
            test_clips: Clips for the last look.
            caption_epochs: Epochs of captions before the questions. Needs
                trainer.reload_dataloaders_every_n_epochs: 1.
            batch_size: Conversations per batch and device in training.
            eval_batch_size: Conversations per batch and device elsewhere; null: as batch_size.
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
            num_workers=num_workers,
        )
        self.files["captions"] = f"{root}/captions.json"
        self.root, self.caption_epochs = Path(root), caption_epochs
        self.clips = {"train": train_clips, "val": val_clips, "test": test_clips}

    def prepare_data(self) -> None:
        """Write the clips and the records that are not there yet."""
        write_clips(self.root, **self.clips)


def write_clips(root: Path, train: int, val: int, test: int, seed: int = 0) -> None:
    """Write captions.json (of the training clips), train.json, val.json and test.json, in LLaVA's
    format, and the videos that they name.

    Every clip depends on the seed, its split and its number alone. Videos that are there already
    are not written again.

    Args:
        root: The folder; videos go to clips_SEED below it.
        train: Number of training clips.
        val: Number of clips for validation.
        test: Number of clips for the last look.
        seed: Decides everything.
    """
    (root / f"clips_{seed}").mkdir(parents=True, exist_ok=True)
    counts = {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        for number in range(count):
            file = root / video_name(split, number, seed)
            if not file.is_file():
                write_video(file, render(make_clip(split, number, seed)))
        _write_records(root / f"{split}.json", records(split, count, seed))
    _write_records(root / "captions.json", captions("train", train, seed))


def _write_records(file: Path, items: list[dict[str, Any]]) -> None:
    """Write a file unless it is so already; another run may be reading it."""
    text = json.dumps(items, indent=1)
    if file.is_file() and file.read_text() == text:
        return
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


def records(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """LLaVA records of the first `count` clips of a split: all questions of a clip in one conversation."""
    return [_record(split, number, seed, make_clip(split, number, seed).questions) for number in range(count)]


def captions(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """LLaVA records of the same clips: what is to be seen frame after frame."""
    return [_record(split, number, seed, make_clip(split, number, seed).captions) for number in range(count)]


def _record(split: str, number: int, seed: int, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    turns = [{"from": role, "value": text} for pair in pairs for role, text in zip(("human", "gpt"), pair, strict=True)]
    turns[0]["value"] = f"<video>\n{turns[0]['value']}"
    return {"id": f"{split}_{number}", "video": video_name(split, number, seed), "conversations": turns}


def video_name(split: str, number: int, seed: int) -> str:
    """The video's path below the root."""
    return f"clips_{seed}/{split}_{number}.mp4"


def make_clip(split: str, number: int, seed: int = 0) -> Clip:
    """The clip of that number."""
    rng = random.Random(f"{seed} {split} {number}")
    shape, colors = rng.choice(SHAPES), rng.sample([*COLOURS], 4)
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
    """Places along a straight line, modulo SIZE; `speed` is in pixels a frame."""
    down, right = STEPS[direction]
    row, column = start
    return [((row + down * speed * i) % SIZE, (column + right * speed * i) % SIZE) for i in range(FRAMES)]


def patterns(count: int) -> list[tuple[bool, ...]]:
    """All ways to be seen in `count` frames of which no two are neighbors."""
    return [way for way in product((False, True), repeat=FRAMES) if sum(way) == appearances(way) == count]


def appearances(seen: tuple[bool, ...]) -> int:
    """How many times a shape begins to be seen."""
    return sum(begins(seen))


def begins(seen: tuple[bool, ...]) -> list[bool]:
    """In which frames a shape begins to be seen."""
    return [now and not before for before, now in zip((False, *seen), seen, strict=False)]


def shown(places: Sequence[Place], seen: Sequence[bool]) -> tuple[Place | None, ...]:
    """The places where seen."""
    return tuple(place if now else None for place, now in zip(places, seen, strict=True))


def cell(place: Place) -> str:
    """The quarter of the picture's width, as a letter, and of its height, as a number: "a1" is top left."""
    row, column = (4 * middle // SIZE for middle in place)
    return f"{'abcd'[column]}{row + 1}"


def render(clip: Clip) -> np.ndarray:
    """The clip's frames, uint8 [FRAMES, SIZE, SIZE, 3]."""
    frames = np.full((FRAMES, SIZE, SIZE, 3), 255, dtype=np.uint8)
    for figure in clip.figures:
        for frame, place in zip(frames, figure.places, strict=True):
            if place is not None:
                frame[np.roll(MASKS[figure.shape], place, axis=(0, 1))] = COLOURS.get(figure.color, BLACK)
    return frames


def _mask(inside: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Which pixels [SIZE, SIZE] a shape around (0, 0) covers, modulo SIZE."""
    offsets = (np.arange(SIZE) + SIZE // 2) % SIZE - SIZE // 2
    return inside(offsets[:, None], offsets[None, :])


MASKS = {
    "circle": _mask(lambda row, column: row**2 + column**2 < (RADIUS + 0.5) ** 2),
    "dot": _mask(lambda row, column: row**2 + column**2 < (DOT + 0.5) ** 2),
    "square": _mask(lambda row, column: np.maximum(abs(row), abs(column)) < RADIUS),
    "triangle": _mask(lambda row, column: (abs(row) <= RADIUS) & (2 * abs(column) <= row + RADIUS)),
}


def write_video(file: Path, frames: np.ndarray) -> None:
    """Frames uint8 [T, H, W, 3] -> an mp4 file from which they can be read without loss."""
    import av

    part = file.with_suffix(".part.mp4")
    with av.open(str(part), "w") as container:
        stream: Any = container.add_stream("libx264rgb", rate=FPS, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = *frames.shape[1:3], "rgb24", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    part.replace(file)
