"""Writes answers to files, also in the format that LLaVA's evaluation scripts read, and goes on with an interrupted
prediction."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_mm.callbacks.meter import objects_of_ranks
from lit_mm.evaluation.benchmarks import Benchmark, split_name
from lit_mm.evaluation.calibration import CHOOSER
from lit_mm.inference.choosers import Calibrated, read_chooser, tried
from lit_mm.inference.generation import Generated
from lit_mm.training.saving import SHARDED

UNFINISHED, FINISHED = "unfinished.json", "settings.json"
"""The file with a prediction's questions, checkpoint and settings: its name while answers are missing, and once all are
written."""
COLUMNS = {"question_id": "string", "prompt": "string", "scale": "string", "text": "string", "logprob": "double"}
COLUMNS |= {"tokens": "int64", "visual_tokens": "int64", "finish": "string", "seconds": "double"}
"""Of answers.parquet, with Arrow's names of their types."""


class AnswerWriter(BasePredictionWriter):
    """Writes the answers of one prediction to a new folder `answers_0`, `answers_1`, … in the run's folder.

    `answers.jsonl` has one line per question and scale: question_id, prompt, scale, text, logprob (of the whole
    answer), tokens, visual_tokens, finish (`stop`, `length` or `error`) and seconds (from the start of the batch to
    the answer's last token). `answers@16.jsonl`, … have the format of LLaVA's scripts, {"question_id", "prompt",
    "text"}, one file per scale. Other ranks' files are `answers.rank1.jsonl`, ….

    If the run has a chooser (`python -m lit_mm calibrate`) and all of its scales are asked, `auto` is one more scale:
    the answer that the chooser takes, with the visual tokens of all scales that it tries.

    For a benchmark with a server, `submission@16/` has the file that it wants with the answers of that scale, ….

    An interrupted prediction is continued by the next one with the same questions, checkpoint and settings, on any
    number of ranks: it asks what has no answer yet and appends to the same files.
    """

    def __init__(self, parquet: bool = False, mean_tokens: float | None = None) -> None:
        """Choose the formats.

        Args:
            parquet: Whether to write answers.parquet too at the end, with the columns of answers.jsonl; question_id
                is text there.
            mean_tokens: Visual tokens of a question that the run's chooser may spend on average, over questions like
                those of validation; null: as it was calibrated.
        """
        super().__init__(write_interval="batch")
        self.mean_tokens, self.chooser = mean_tokens, cast(Calibrated | None, None)
        self.parquet = parquet
        self.files: dict[str | None, IO[str]] = {}
        self.answered: set[str | int] = set()
        self.lock: IO[str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the data module ask what is answered, once the checkpoint is loaded."""
        self.files, self.answered, self.lock = {}, set(), None
        data: Any = getattr(trainer, "datamodule", None)
        if stage == "predict" and hasattr(data, "answered"):
            data.answered = lambda: self._begin(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin for a data module that does not ask."""
        if not self.files:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, lit: LightningModule) -> set[str | int]:
        """Open the files in a new folder or in one to go on in, the same on every rank; return what is answered."""
        run, told, folder = Path(trainer.log_dir or trainer.default_root_dir), prediction_settings(trainer, lit), ""
        self.chooser = chooser_of(run, cast(Any, lit), self.mean_tokens)
        if self.chooser:
            told |= {"scales": [*told["scales"], "auto"], "chooser": str(self.chooser)}
        if trainer.is_global_zero:
            self.lock = self._unfinished(trainer, run, told) or begin(run, told)
            folder = str(Path(self.lock.name).parent)
        self.folder = Path(trainer.strategy.broadcast(folder))
        self.folder.mkdir(parents=True, exist_ok=True)  # this rank may be on another machine
        suffixes = self._suffixes(trainer)
        own = set[str | int]().union(*(repaired(self.folder, suffix, told["scales"]) for suffix in suffixes))
        self.answered = set().union(*objects_of_ranks(trainer, own))
        for scale in (*told["scales"], None):
            name = f"answers{suffixes[0]}.jsonl" if scale is None else f"answers@{scale}{suffixes[0]}.jsonl"
            self.files[scale] = (self.folder / name).open("a", encoding="utf-8")
        if self.answered:
            rank_zero_info(f"Going on in {self.folder}, where {len(self.answered)} questions are answered")
        return self.answered

    def _unfinished(self, trainer: Trainer, run: Path, told: dict[str, Any]) -> IO[str] | None:
        """An unfinished prediction to go on with; not where several questions have the same id."""
        found = unfinished(run, told)
        if found and (id := cast(Any, trainer).datamodule.repeated_id("predict")) is not None:
            rank_zero_warn(f"{found.name} is not continued: several questions have the id {id!r}")
            found.close()
            return None
        return found

    def _suffixes(self, trainer: Trainer) -> list[str]:
        """Of this rank's files, its own first; rank 0 has those of ranks that an earlier run had besides these."""
        ranks = [trainer.global_rank]
        if trainer.is_global_zero:
            names = (file.name.split(".")[1] for file in self.folder.glob("answers.rank*.jsonl"))
            known = [int(name.removeprefix("rank")) for name in names]
            ranks += [rank for rank in known if rank >= trainer.world_size]
        return [f".rank{rank}" if rank else "" for rank in ranks]

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write one batch's answers, answers.jsonl last: what is there is in the other files, too."""
        for row in prediction:
            asked = {"question_id": row["question_id"], "prompt": row["prompt"]}
            if asked["question_id"] in self.answered:  # by the part of its record that was written before
                continue
            for scale, answer in (row["answers"] | self._chosen(row["answers"])).items():
                self.files[str(scale)].write(as_line({**asked, "text": answer.text}))
                told = {"scale": str(scale), "text": answer.text, "logprob": sum(answer.logprobs)}
                told |= {"tokens": len(answer.ids), "visual_tokens": answer.visual_tokens, "finish": answer.finish}
                self.files[None].write(as_line({**asked, **told, "seconds": round(answer.seconds, 4)}))
        for file in self.files.values():
            file.flush()

    def _chosen(self, answers: dict[Any, Generated]) -> dict[Any, Generated]:
        """The answer that the chooser takes."""
        if self.chooser is None:
            return {}
        found = tried(self.chooser, answers)
        return {"auto": replace(found[-1], visual_tokens=sum(answer.visual_tokens for answer in found))}

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the files, write parquet if asked to and what a benchmark's server wants, and print where the answers
        are.

        Raises:
            ValueError: A benchmark's questions do not have one answer each.
            ModuleNotFoundError: Its server wants an Excel file and openpyxl is not installed.
        """
        self._close()
        for suffix in self._suffixes(trainer) if self.parquet else ():
            write_parquet(self.folder / f"answers{suffix}.jsonl")
        trainer.strategy.barrier("answers")
        submissions = self._submissions(trainer)  # may fail: the same command then goes on from here
        if self.lock:
            (self.folder / UNFINISHED).rename(self.folder / FINISHED)
            self.lock.close()
        names = ", ".join([*(Path(file.name).name for file in self.files.values()), *submissions])
        rank_zero_info(f"Answers: {names} in {self.folder}")

    def _submissions(self, trainer: Trainer) -> list[str]:
        """Write the files that a benchmark's server wants, one for each scale; return their paths in the folder."""
        benchmark, path = benchmark_of(trainer)
        if benchmark is None or benchmark.definition.submission is None:
            return []
        written, error = [], None
        for scale in (scale for scale in self.files if scale is not None):
            files = [self.folder / f"answers@{scale}{suffix}.jsonl" for suffix in self._suffixes(trainer)]
            own = [json.loads(line) for file in files if file.exists() for line in file.open(encoding="utf-8")]
            answers = [answer for each in objects_of_ranks(trainer, own) for answer in each]
            try:
                if trainer.is_global_zero and not error:
                    folder = self.folder / f"submission@{scale}"
                    written.append(str(benchmark.submission(answers, folder, path).relative_to(self.folder)))
            except (ValueError, ModuleNotFoundError) as found:
                error = found
        if error := trainer.strategy.broadcast(error):
            raise error
        return written

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End a prediction that had nothing left to ask, and so no other hook."""
        if any(not file.closed for file in self.files.values()):
            self.on_predict_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the answers written so far."""
        self._close()
        if self.lock:
            self.lock.close()

    def _close(self) -> None:
        for file in self.files.values():
            file.close()


def prediction_settings(trainer: Trainer, lit: LightningModule) -> dict[str, Any]:
    """What decides the answers. A checkpoint of None may be any weights: such a prediction is not continued."""
    told: dict[str, Any] = {"checkpoint": None, "limit_predict_batches": str(trainer.limit_predict_batches)}
    if trainer.ckpt_path:
        path = Path(trainer.ckpt_path).resolve()
        file = path / SHARDED if path.is_dir() else path
        told["checkpoint"] = [str(path), file.stat().st_size, file.stat().st_mtime_ns] if file.exists() else None
    sets = getattr(getattr(trainer, "datamodule", None), "sets", {})
    told["questions"] = [each.digest for each in sets["predict"].sets] if "predict" in sets else None
    told |= {name: str(getattr(lit, name, None)) for name in ("llm", "max_new_tokens", "decoding")}
    told |= {"scales": [str(s) for s in cast(Any, lit).asked_scales], "precision": str(trainer.precision)}
    return told


def chooser_of(run: Path, lit: Any, mean_tokens: float | None) -> Calibrated | None:
    """The run's chooser, if all scales that it may try are asked.

    Raises:
        FileNotFoundError: mean_tokens, and the run has none.
        ValueError: mean_tokens, and no chooser is that cheap or tries asked scales only.
    """
    if not (run / CHOOSER).is_file():
        if mean_tokens is not None:
            raise FileNotFoundError(f"answers.mean_tokens: no {run / CHOOSER}, `python -m lit_mm calibrate` writes it")
        return None
    chooser, at = read_chooser(run / CHOOSER, lit.all_scales, mean_tokens)
    if at != lit.place.steps:
        rank_zero_warn(f"{run / CHOOSER} was calibrated at step {at}, the weights are of step {lit.place.steps}")
    missing = [str(scale) for scale in chooser.scales if scale not in lit.asked_scales]
    if missing and mean_tokens is not None:
        raise ValueError(f"answers.mean_tokens: the chooser tries scale {missing[0]}, which is not asked")
    return None if missing else chooser


def unfinished(run: Path, told: dict[str, Any]) -> IO[str] | None:
    """The locked file of an unfinished prediction of the same, which no running process writes; None: there is none."""
    if told["checkpoint"] is None or told["questions"] is None:
        return None
    for path in sorted(run.glob(f"answers_*/{UNFINISHED}")):
        file = path.open("r+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if json.load(file) == told:
                return file
        except (BlockingIOError, json.JSONDecodeError):  # being written, or cut off at its beginning
            pass
        file.close()
    return None


def begin(run: Path, told: dict[str, Any]) -> IO[str]:
    """The locked file of a new prediction, in a new folder."""
    file = (new_folder(run) / UNFINISHED).open("w", encoding="utf-8")
    fcntl.lockf(file, fcntl.LOCK_EX)
    json.dump(told, file, indent=1)
    file.flush()
    return file


def new_folder(run: Path) -> Path:
    """Create and return the first of `answers_0`, `answers_1`, … that does not exist yet."""
    number = 0
    while True:
        try:
            (run / f"answers_{number}").mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return run / f"answers_{number}"


def repaired(folder: Path, suffix: str, scales: Sequence[str]) -> set[str | int]:
    """Cut the files of one rank to the questions that all of them have whole; return their ids."""
    ends = {folder / f"answers@{scale}{suffix}.jsonl": 1 for scale in scales}
    ends[folder / f"answers{suffix}.jsonl"] = len(scales)  # lines per question
    found = {file: list(line_ends(file)) for file in ends if file.exists()}
    count = min((len(found.get(file, ())) // lines for file, lines in ends.items()), default=0)
    for file, own in found.items():
        os.truncate(file, own[count * ends[file] - 1] if count else 0)
    if not count:
        return set()
    with (folder / f"answers{suffix}.jsonl").open(encoding="utf-8") as lines:
        return {json.loads(line)["question_id"] for line in lines}


def line_ends(file: Path) -> Iterator[int]:
    """The bytes up to the end of each whole line."""
    length = 0
    with file.open("rb") as lines:
        for line in lines:
            length += len(line)
            if line.endswith(b"\n"):
                yield length


def benchmark_of(trainer: Trainer) -> tuple[Benchmark | None, str]:
    """The benchmark that is predicted and its path; None where it is another file."""
    file = getattr(getattr(trainer, "datamodule", None), "files", {}).get("predict")
    return split_name(file) if file else (None, "")


def write_parquet(file: Path) -> None:
    """answers.jsonl -> answers.parquet beside it."""
    import pyarrow as pa  # here, as it takes a tenth of a second, and only for those who ask for parquet
    from pyarrow.parquet import ParquetWriter

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    part = file.with_suffix(".parquet.part")
    with file.open(encoding="utf-8") as lines, ParquetWriter(part, schema) as writer:
        while some := list(islice(lines, 10_000)):
            writer.write_table(pa.Table.from_pylist([_row(json.loads(line)) for line in some], schema))
    part.rename(file.with_suffix(".parquet"))


def _row(answer: dict[str, Any]) -> dict[str, Any]:
    """A row for Arrow, whose text is UTF-8: half characters are escaped."""
    texts = {name: str(answer[name]) for name, kind in COLUMNS.items() if kind == "string"}
    return answer | {name: text.encode(errors="backslashreplace").decode() for name, text in texts.items()}


def as_line(answer: dict[str, Any]) -> str:
    """A line of JSON in UTF-8, with half characters (lone surrogates) escaped."""
    line = json.dumps(answer, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(answer)
    return line + "\n"
