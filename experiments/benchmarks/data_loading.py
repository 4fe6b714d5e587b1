"""The speed of the DataModule compared with plain decoding and resizing, and how full its batches are.

    python experiments/benchmarks/data_loading.py [--images FOLDER] [--videos FOLDER] [--json FILE]
    python experiments/benchmarks/data_loading.py --records 1000000     # also the start on a large data set

- loader: samples/s of ImageDataModule (reading records, encoding, decoding, collating, packing) compared with a
  loop that only decodes and resizes the same files with the same number of processes, once with the functions
  of this package (`loader_ratio`) and once with Pillow, as LLaVA does (`loader_ratio_pillow`).
- video: frames/s of VideoDataModule compared with plain PyAV (`video_ratio`): a loop that seeks to the key frame
  before each selected frame, or decodes the whole file, whichever is faster for the file, and resizes with the
  same function.
- padding: unused positions of batches that fill 16,384 positions, and of padded batches of 16 grouped by length,
  on 100,000 records with random lengths like those of LLaVA's mixture (its shares of sources, log-normal lengths).
- start: seconds and memory of a first and a second start on the given number of text records.

Each figure is a median of alternating repetitions, in one process with one thread unless --workers is given.
If no folder of images or videos is given, some are rendered.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from lit_mm.data.datamodules import ImageDataModule, VideoDataModule
from lit_mm.data.images import ImageFile, ImageOptions, to_pixels
from lit_mm.data.inputs import ModelInputs
from lit_mm.data.sampler import Budget, RecordSizes, fill
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.data.video import Video, VideoOptions
from lit_mm.model.llm import LLM

ROOT = Path(__file__).parents[2]
TOKENIZER = str(ROOT / "experiments/quickstart_tokenizer")
COLOUR = (122, 116, 104)
SCALES = [576, 144, 36, 9, 1]


def main() -> None:
    """Measure and print."""
    arguments = parsed()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"hardware": f"{os.cpu_count()} cores", "workers": arguments.workers}
    with TemporaryDirectory() as folder:
        scratch = Path(folder)
        images, videos = arguments.images or render_images(scratch), arguments.videos or render_videos(scratch)
        result |= measure_images(images, scratch, arguments)
        result |= measure_videos(videos, scratch, arguments)
        result |= measure_padding(arguments.padding_records)
        result |= measure_start(arguments.records, scratch) if arguments.records else {}
    show(result)
    if wrong := impossible(result):
        sys.exit("refused, these figures cannot be:\n" + "\n".join(wrong))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def impossible(result: dict[str, Any]) -> list[str]:
    """The loader faster by a fifth than decoding alone in every repetition, in one process; shares that are none."""
    found = []
    if not result["workers"] and result["loader_ratio_least"] > 1.2:
        found.append(f"the loader takes {1 / result['loader_ratio_least']:.2f} of what its own decoding takes alone")
    shares = [name for name in ("padding", "padding_length_grouped") if not 0 <= result[name] < 1]
    return found + [f"{name}: expected a share, found {result[name]:.3f}" for name in shares]


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of images; none: 40 rendered photos")
    parser.add_argument("--videos", type=Path, help="folder of videos; none: 3 rendered clips")
    parser.add_argument("--size", type=int, default=768, help="side of the padded square in pixels")
    parser.add_argument("--count", type=int, default=64, help="most images")
    parser.add_argument("--frames", type=int, default=8, help="frames per video")
    parser.add_argument("--workers", type=int, default=0, help="processes that load, on both sides")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--padding-records", type=int, default=100_000)
    parser.add_argument("--records", type=int, default=0, help="records of the set whose start is measured")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def render_images(folder: Path, count: int = 40) -> Path:
    """JPEGs of 1,000 × 1,400 pixels with some detail."""
    (folder / "images").mkdir()
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (100, 140, 3), dtype=np.uint8)
        photo = Image.fromarray(noise).resize((1400, 1000), Image.Resampling.BICUBIC)
        photo.save(folder / f"images/{number}.jpg", quality=90)
    return folder / "images"


def render_videos(folder: Path, count: int = 3) -> Path:
    """Clips of 20 s, 320 × 240 pixels, a key frame every two seconds."""
    (folder / "videos").mkdir()
    for number in range(count):
        with av.open(str(folder / f"videos/{number}.mp4"), "w") as container:
            stream: Any = container.add_stream("libx264", rate=25, options={"g": "50"})
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for frame in range(500):
                pixels = np.full((240, 320, 3), 255, np.uint8)
                pixels[frame % 200 : frame % 200 + 40, frame % 280 : frame % 280 + 40] = (220, 30 * number, 60)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            container.mux(stream.encode())
    return folder / "videos"


def alternating(ways: dict[str, Callable[[], int]], repetitions: int) -> dict[str, list[float]]:
    """Items per second of each way in each repetition; a way returns how many it has done."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            done = way()
            if repetition:  # the first round fills caches
                rates[name].append(done / (time.perf_counter() - start))
    return rates


def medians(rates: dict[str, list[float]]) -> dict[str, float]:
    """Of each way."""
    return {name: statistics.median(values) for name, values in rates.items()}


def inputs_of() -> ModelInputs:
    """Of a model with the quickstart's tokenizer and a stride of 32 pixels."""
    tokenizer = load_tokenizer(LLM("LlamaConfig", {}, TOKENIZER, "bare"))
    return ModelInputs(tokenizer, 32, SCALES, COLOUR, pooling="adaptive")


def write_records(file: Path, kind: str, names: list[str]) -> str:
    """One question a file."""
    turns = [{"from": "human", "value": f"<{kind}>\nwhat is it?"}, {"from": "gpt", "value": "a red circle"}]
    file.write_text(json.dumps([{kind: name, "conversations": turns} for name in names]))
    return str(file)


def through(data: Any) -> int:
    """All training batches of a DataModule; the number of records."""
    return sum(len(batch.input_ids) for batch in data.train_dataloader())


def bare(decode: Callable[[Path], Any], files: list[Path], workers: int) -> int:
    """The same files through one function; the number of files."""
    if not workers:
        return sum(decode(file) is not None for file in files)
    with multiprocessing.Pool(workers, torch.set_num_threads, (1,)) as pool:
        return sum(pool.imap_unordered(partial(discarded, decode), files, chunksize=4))


def discarded(decode: Callable[[Path], Any], file: Path) -> bool:
    """Whether a file could be decoded: results stay in the process that made them."""
    return decode(file) is not None


def own_way(options: ImageOptions, file: Path) -> torch.Tensor:
    """This package's decoding and resizing."""
    return ImageFile("", file.name, file, options).pixels(COLOUR)


def llavas_way(size: int, file: Path) -> np.ndarray:
    """LLaVA's `expand2square` and resizing, by Pillow."""
    image = Image.open(file).convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def measure_images(folder: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Samples/s of the DataModule and of both bare ways."""
    files = sorted(file for file in folder.iterdir() if file.is_file())[: arguments.count]
    options = ImageOptions("pad", arguments.size)
    train = write_records(scratch / "images.json", "image", [file.name for file in files])
    settings = {"image_root": str(folder), "image": options, "batch_size": 8, "num_workers": arguments.workers}
    data = ImageDataModule(inputs_of(), train=train, cache=str(scratch / "cache"), **settings)
    data.setup("fit")
    found = alternating(
        {
            "loader": lambda: through(data),
            "own": lambda: bare(partial(own_way, options), files, arguments.workers),
            "pillow": lambda: bare(partial(llavas_way, arguments.size), files, arguments.workers),
        },
        arguments.repetitions,
    )
    rates = medians(found)
    return {
        "images_per_s": rates["loader"],
        "images_per_s_bare": rates["own"],
        "images_per_s_pillow": rates["pillow"],
        "loader_ratio": rates["loader"] / rates["own"],
        "loader_ratio_least": min(found["loader"]) / max(found["own"]),
        "loader_ratio_pillow": rates["loader"] / rates["pillow"],
    }


def whole_file(times: list[float], file: Path) -> list[Image.Image]:
    """The frames at times since the first, by decoding everything up to the last of them."""
    with av.open(str(file)) as container:
        stream, wanted, found = container.streams.video[0], list(times), []
        stream.codec_context.thread_count = 1
        first = None
        for frame in container.decode(stream):
            first = frame.time if first is None else first
            if wanted and frame.time - first >= wanted[0] - 1e-6:
                found.append(frame.to_image())
                wanted.pop(0)
            if not wanted:
                break
    return found


def seeking(times: list[float], file: Path) -> list[Image.Image]:
    """The same frames, each by seeking to the key frame before it."""
    found = []
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        base, start = stream.time_base, stream.start_time or 0
        for moment in times:
            container.seek(round(moment / base) + start, stream=stream)
            for frame in container.decode(stream):
                if float((frame.pts - start) * base) >= moment - 1e-6:
                    found.append(frame.to_image())
                    break
    return found


def resized(images: list[Image.Image], options: ImageOptions) -> int:
    """Bring frames to size; their number."""
    return sum(to_pixels(image, options.target(image.height, image.width), COLOUR) is not None for image in images)


def measure_videos(folder: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Frames/s of the DataModule and of bare PyAV."""
    files = sorted(file for file in folder.iterdir() if file.suffix in (".mp4", ".webm", ".mkv"))
    options, size = VideoOptions(max_frames=arguments.frames), ImageOptions("pad", arguments.size)
    times = {file: Video("", file.name, file, options).header()[1] for file in files}
    best = {}
    for file in files:
        ways = {"whole": partial(whole_file, times[file], file), "seek": partial(seeking, times[file], file)}
        rates = alternating({name: (lambda way=way: len(way())) for name, way in ways.items()}, 1)
        best[file] = ways[max(rates, key=lambda name: rates[name])]
    train = write_records(scratch / "videos.json", "video", [file.name for file in files])
    settings = {"image_root": str(folder), "image": size, "video": options, "batch_size": 1}
    data = VideoDataModule(inputs_of(), train=train, cache=str(scratch / "cache"), max_length=10**6, **settings)
    data.setup("fit")
    found = alternating(
        {
            "loader": lambda: sum(len(batch.images.order) for batch in data.train_dataloader()),
            "bare": lambda: sum(resized(way(), size) for way in best.values()),
        },
        arguments.repetitions,
    )
    rates = medians(found)
    return {
        "frames_per_s": rates["loader"],
        "frames_per_s_bare": rates["bare"],
        "video_ratio": rates["loader"] / rates["bare"],
    }


SOURCES = {  # share of the records, median and spread of the text behind the image, whether there is one
    "VQA, several questions": (0.38, 110, 0.6, True),
    "boxes, several questions": (0.20, 330, 0.5, True),
    "instructions": (0.24, 290, 0.5, True),
    "OCR and captions": (0.12, 90, 0.7, True),
    "text": (0.06, 550, 0.8, False),
}


def llava_like(count: int) -> RecordSizes:
    """Sizes of random records: 40 positions of prompt, an image, text."""
    generator = np.random.default_rng(0)
    names = generator.choice(len(SOURCES), count, p=[share for share, *_ in SOURCES.values()])
    medians, spreads, images = (np.array(column)[names] for column in list(zip(*SOURCES.values(), strict=True))[1:])
    text = np.clip(generator.lognormal(np.log(medians), spreads), 8, 1400).astype(np.int64)
    before, words = np.where(images, 40, text + 40), np.where(images, text, 0)
    return RecordSizes(before, words[:, None], images.astype(np.int64)[:, None], np.zeros(count, np.int64))


def measure_padding(count: int, tokens: int = 16_384, size: int = 16) -> dict[str, float]:
    """Share of positions that hold nothing."""
    costs, drawn = llava_like(count), range(len(SCALES))
    every, order = np.arange(count), np.random.default_rng(1).permutation(count)
    length = costs.tokens(every, drawn, SCALES)
    sizes = np.stack([np.ones_like(length), length, 0 * length], axis=1)
    start = time.perf_counter()
    steps = list(fill(order, lambda step, records: sizes[records], Budget(None, tokens), 1, "largest", 512))
    seconds = time.perf_counter() - start
    used, padded = 0, 0
    for scale in SCALES:  # a padded step runs scale after scale
        alone = costs.before + costs.words[:, 0] + costs.frames[:, 0] * scale
        batches = grouped_by_length(alone[order], size)
        used, padded = used + alone.sum(), padded + sum(int(batch.max()) * len(batch) for batch in batches)
    return {
        "padding": 1 - length.sum() / (tokens * len(steps)),
        "padding_length_grouped": 1 - used / padded,
        "records_filled_per_s": count / seconds,
    }


def grouped_by_length(lengths: np.ndarray, size: int, window: int = 50) -> list[np.ndarray]:
    """Lengths of batches of so many records, sorted within windows of so many batches."""
    step = size * window
    windows = [np.sort(lengths[first : first + step]) for first in range(0, len(lengths), step)]
    return [each[first : first + size] for each in windows for first in range(0, len(each), size)]


START = """
import json, resource, sys, time
from itertools import islice
from lit_mm.data.datamodules import ImageDataModule
sys.path.insert(0, sys.argv[1])
from data_loading import inputs_of
inputs = inputs_of()
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
data = ImageDataModule(inputs, train=sys.argv[2], cache=sys.argv[3], batch_size=None, tokens_per_batch=16384)
data.setup("fit")
opened = time.perf_counter() - start
batches = iter(data.train_dataloader())
next(batches)
first = time.perf_counter() - start
for _ in islice(batches, 100):
    pass
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"opened_s": opened, "first_batch_s": first, "memory_mib": (after - before) / 1024}))
"""


def measure_start(records: int, scratch: Path) -> dict[str, Any]:
    """A first and a second start on a set of many records of text, each in a process of its own."""
    file = scratch / "many.jsonl"
    with file.open("w") as out:
        for number in range(records):
            turns = [
                {"from": "human", "value": f"what is {number} and {number % 977}?"},
                {"from": "gpt", "value": "a number"},
            ]
            out.write(json.dumps({"id": number, "conversations": turns}) + "\n")
    command = [sys.executable, "-c", START, str(Path(__file__).parent), str(file), str(scratch / "cache")]
    found = {}
    for name in ("first", "second"):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[f"{name}_start"] = json.loads(done.stdout.splitlines()[-1])
    return {"records": records, "file_mib": file.stat().st_size / 2**20, **found}


def show(result: dict[str, Any]) -> None:
    """The figures as a table."""
    table = Table("figure", "value")
    for name, value in result.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
