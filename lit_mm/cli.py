"""The command line: LightningCLI with this project's classes and the layout of its run folders.

<trainer.default_root_dir>/version_0/      one run: its config.yaml, checkpoints/, TensorBoard
                                           logs, and what test and predict made of it
"""

from __future__ import annotations

import difflib
import inspect
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_mm.__main__ import tidy
from lit_mm.callbacks.advice import MemoryAdvice
from lit_mm.callbacks.predictions import AnswerWriter
from lit_mm.callbacks.progress import Progress
from lit_mm.callbacks.skipped import SkippedRecords
from lit_mm.callbacks.stopping import StopBetweenBatches
from lit_mm.callbacks.token_efficiency import TokenEfficiency
from lit_mm.data.clips import VideoShapesDataModule
from lit_mm.data.datamodules import ImageDataModule, VideoDataModule
from lit_mm.data.easy_vqa import EasyVQADataModule
from lit_mm.renamed import accept_old_names, with_new_arguments
from lit_mm.training import strategies  # noqa: F401 (likewise to --trainer.strategy)
from lit_mm.training.checkpoints import SHARDED, InitFrom, check_new, export, is_of_fsdp1, start_from
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.saving import WholeFiles, check_readable, check_room, is_remote

PROGRAM = "python -m lit_mm"
DATA_MODULES = (
    ImageDataModule,
    VideoDataModule,
    EasyVQADataModule,
    VideoShapesDataModule,
)  # known to --data by their short names
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # what is frozen, on purpose


def usage(verb: str) -> str:
    """One line instead of the ninety that argparse would print with every error."""
    return f"{PROGRAM} {verb} --config FILE [--config FILE …] [--ckpt_path last | FILE] [--FIELD VALUE …]"


class Parser(LightningArgumentParser):
    """LightningCLI's, with errors that say which file and which key, and the nearest one that there is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message."""
        if self.exit_on_error:  # not a parser that only tries one type out
            key = re.search(r"(?:does not accept option|Option|Unrecognized arguments?:?) '?(?:--)?([\w.]+)'?", message)
            known = getattr(getattr(ex, "subcommand_parser", None) or self, "_actions", [])
            message = tidy(message) + (nearest(key[1], {action.dest for action in known}) if key else "")
        super().error(message, ex)


def nearest(key: str, known: set[str]) -> str:
    """Which of the config files holds a key, and what it might be meant to be."""
    last = key.rpartition(".")[2]
    fields = {name for kind in DATA_MODULES for name in inspect.signature(kind).parameters}
    files = [file for file in config_files(sys.argv) if f"{last}:" in Path(file).read_text(encoding="utf-8")]
    close = difflib.get_close_matches(key, known | fields, 1, 0.75) or difflib.get_close_matches(last, fields, 1, 0.6)
    where = f"\n  it stands in {', '.join(files)}" if files else ""
    return f"{where}\n  did you mean {close[0]}?" if close else where


def config_files(arguments: Sequence[str]) -> list[str]:
    """The files that are given as --config and can be read."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    named = [
        following if own in ("--config", "-c") else own.partition("=")[2]
        for own, following in pairs
        if own in ("--config", "-c") or own.startswith("--config=")
    ]
    return [file for file in named if Path(file).is_file()]


class _Unique(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"line {node.start_mark.line + 1}: the key {twice[0]} stands twice")
        return super().construct_mapping(node, deep)


def check_configs(arguments: Sequence[str]) -> None:
    """Whether the config files are YAML without double keys.

    Raises:
        ValueError: One is not; the message names the file and the line.
    """
    for file in config_files(arguments):
        try:
            found = yaml.load(Path(file).read_text(encoding="utf-8"), _Unique)
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"--config {file}: {' '.join(str(error).split())}") from None
        if not isinstance(found, dict):
            raise ValueError(f"--config {file}: expected keys and values such as `model:`, found {found!r:.60}")


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder when a fit starts."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only a new fit defines a run: a resume, test and predict leave its config as it is."""
        resumed = self.config.get("ckpt_path") and (Path(trainer.log_dir or ".") / "config.yaml").exists()
        if stage == "fit" and not resumed:
            self.config = self.config.clone()
            self.config["ckpt_path"] = None
            super().setup(trainer, pl_module, stage)


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, but last.ckpt is the end of the run, whatever was saved on the way, and
    a rank that fails alone does not wait for the others to save with it."""

    trained = False
    """Whether this process has trained on a batch: before that nothing is written."""

    def format_checkpoint_name(
        self,
        metrics: dict[str, torch.Tensor],
        filename: str | None = None,
        ver: int | None = None,
        prefix: str | None = None,
    ) -> str:
        """`{val/loss:.2f}` becomes `val_loss=1.23`: a slash would make a folder of it."""
        flat = {name.replace("/", "_"): value for name, value in metrics.items()}
        name = re.sub(r"\{[^}:]*", lambda field: field[0].replace("/", "_"), filename or self.filename or "")
        return super().format_checkpoint_name(flat, name, ver, prefix)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that could not hold a checkpoint.

        Raises:
            OSError: It cannot be written, or its disk is too full.
        """
        if trainer.is_global_zero and not cast(Any, trainer).fast_dev_run and not is_remote(self.dirpath):
            check_room(Path(str(self.dirpath)), list(pl_module.parameters()))
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """From now on there is something to save."""
        self.trained = True
        super().on_train_batch_end(trainer, *arguments)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where all ranks have stopped: by a signal, agreed upon, or gradients that are no numbers."""
        together = isinstance(exception, KeyboardInterrupt | SIGTERMException | FloatingPointError)
        if self.trained and (together or trainer.world_size == 1):
            super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning leaves out the steps after the last of `every_n_train_steps`; the next stage starts here."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class LitMMTrainer(Trainer):
    """Lightning's Trainer with this project's own verbs."""

    def export(self, model: LitMatryoshka, datamodule: Any, ckpt_path: str, to: str) -> None:
        """Write a checkpoint, sharded or not, as plain files.

        `init_from` of another run takes the folder; its part `llm` is a Hugging Face model.

        Args:
            model: The model of the config.
            datamodule: Not needed.
            ckpt_path: Path of the checkpoint, or `last`.
            to: The folder to write: encoder.safetensors, projector.safetensors, and llm/ with the
                tokenizer, adapters merged.
        """
        folder = Path(to).expanduser()
        check_new(folder)
        model.configure_model()
        start_from(model.vlm, InitFrom(ckpt_path))
        export(model.vlm, model.tokenizer, folder)
        rank_zero_info(f"Exported to {to}")


class LitMMCLI(LightningCLI):
    """fit, validate, test, predict and export; run it with `python -m lit_mm`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and export."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def __init__(self, args: list[str] | None = None) -> None:
        accept_old_names()
        if args is None:
            sys.argv[1:] = with_new_arguments(sys.argv[1:])
        else:
            args = with_new_arguments(args)
        check_configs(sys.argv if args is None else args)
        super().__init__(
            LitMatryoshka,
            LightningDataModule,
            trainer_class=LitMMTrainer,
            parser_class=Parser,
            subclass_mode_data=True,
            args=args,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={
                "callbacks": [
                    StopBetweenBatches(),
                    SkippedRecords(),
                    MemoryAdvice(),
                    AnswerWriter(),
                ],
                "default_root_dir": "runs",
                "use_distributed_sampler": False,  # the data side shares records among ranks itself
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,  # the table of parts says more
                "inference_mode": False,  # its tensors do not go with sharded parameters
                "reload_dataloaders_every_n_epochs": 1,  # epochs may differ in length
            },
            parser_kwargs={"prog": PROGRAM} | {verb: {"usage": usage(verb)} for verb in self.subcommands()},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Checkpoints, the bar and what is measured, each with its own section; what the data get of the model."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        kept = {"save_last": True, "save_on_exception": True, "enable_version_counter": False}  # after Ctrl-C, too
        parser.set_defaults({f"checkpoint.{name}": value for name, value in kept.items()})
        parser.add_lightning_class_args(Progress, "progress")
        parser.add_lightning_class_args(TokenEfficiency, "token_efficiency")
        parser.add_argument(
            "--scales",
            type=list[str | int] | None,
            default=None,
            help="Judge and answer at these of the model's scales alone, such as [36] or [8x16]; null: at all.",
        )
        parser.link_arguments("model.inputs", "data.init_args.inputs", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint that is meant; the config given now beats the checkpoint's."""
        verb, config = self.config.subcommand, self.config[self.config.subcommand]
        config.trainer.default_root_dir = str(Path(config.trainer.default_root_dir).expanduser())
        if not config.get("ckpt_path"):
            if verb not in ("fit", "export") and not config.model.init_from:
                raise ValueError(f"{verb} needs trained weights: --ckpt_path last, best, or the path of a checkpoint")
            return
        path = find_checkpoint(config.ckpt_path, Path(config.trainer.default_root_dir))
        check_readable(path)
        sharded, strategy = (path / SHARDED).is_file(), str(config.trainer.strategy).lower()
        if sharded and verb != "export" and "fsdp" not in strategy:
            raise ValueError(
                f"--ckpt_path: {path} is sharded: give trainer.strategy fsdp, on as many devices as you like, "
                "or `export` it"
            )
        if sharded and verb != "export" and is_of_fsdp1(path):
            raise ValueError(
                f"--ckpt_path: {path} is of FSDP1, which is gone: `export` it and go on from the weights with "
                "model.init_from"
            )
        config.ckpt_path = str(path)
        config.model.init_from = None  # all comes from the checkpoint, the sources may be gone
        if "weights_only" in config:
            config.weights_only = True

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """TensorBoard in the run's folder, unless the config says otherwise; what follows a
        checkpoint (test, predict, resume) is logged in the folder of the run that made it."""
        config = self.config[self.subcommand]
        if config.trainer.logger is None:
            root, checkpoint = Path(config.trainer.default_root_dir).resolve(), config.get("ckpt_path")
            run = run_of(Path(checkpoint), root) if checkpoint else None
            kwargs["logger"] = TensorBoardLogger(root, name="", version=run, default_hp_metric=False)
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out the bar and the checkpoints where the config switches them off or names another bar."""
        off = {Progress: "enable_progress_bar", Checkpoints: "enable_checkpointing"}
        kept = [callback for callback in callbacks if config.get(off.get(type(callback), "")) is not False]
        named = config.get("callbacks") or []
        if any(isinstance(callback, ProgressBar) for callback in (named if isinstance(named, list) else [named])):
            kept = [callback for callback in kept if not isinstance(callback, Progress)]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, WholeFiles()]
        return super()._instantiate_trainer(config, kept)

    def _run_subcommand(self, subcommand: str) -> None:
        """A fit that fails before its first step leaves no folder behind, but for the records of such a step."""
        folder = Path(self.trainer.log_dir) if self.trainer.log_dir else None
        self.model.ask_at(self.config[subcommand].scales)
        new = subcommand == "fit" and folder is not None and not folder.exists()
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            checkpoints = [each for each in cast(Any, self.trainer).callbacks if isinstance(each, Checkpoints)]
            trained = any(each.trained for each in checkpoints)
            if not checkpoints:  # trainer.enable_checkpointing false: the logs are all that a run leaves
                trained = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed > 0
            trained |= isinstance(error, FloatingPointError)
            if new and folder is not None and not trained and self.trainer.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def find_checkpoint(asked: str, root: Path) -> Path:
    """The checkpoint that `--ckpt_path` means.

    Args:
        asked: `last` or `best` of the newest run below the root, a run's folder (its last.ckpt), or a checkpoint.
        root: `trainer.default_root_dir`.

    Raises:
        FileNotFoundError: There is none.
    """
    if asked in ("last", "best"):
        return newest_checkpoint(root, asked)
    path = Path(asked).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"--ckpt_path: no checkpoint {path} (expected a file, a run's folder, last or best)")
    if path.is_file() or (path / SHARDED).is_file():
        return path
    return newest_checkpoint(path, "last")


def newest_checkpoint(root: Path, asked: str = "last") -> Path:
    """The newest last.ckpt below a folder, or the checkpoint that its run found best.

    Raises:
        FileNotFoundError: There is none.
    """
    folders = [root, *(folder for depth in ("", "*/", "*/*/") for folder in root.glob(f"{depth}checkpoints"))]
    found = sorted(
        (folder / "last.ckpt" for folder in folders), key=lambda file: file.exists() and file.stat().st_mtime
    )
    if not found or not found[-1].exists():
        raise FileNotFoundError(f"--ckpt_path {asked}: no checkpoints/last.ckpt below {root}: run fit first")
    return found[-1] if asked == "last" else best_beside(found[-1])


def best_beside(last: Path) -> Path:
    """The best checkpoint of the run that wrote a last.ckpt, by its `checkpoint.monitor`.

    Raises:
        FileNotFoundError: It monitored nothing, or the file is gone.
    """
    check_readable(last)
    states = {} if last.is_dir() else torch.load(last, weights_only=True, mmap=True, map_location="cpu")["callbacks"]
    paths = [Path(state["best_model_path"]) for state in states.values() if state.get("best_model_score") is not None]
    here = [last.parent / path.name for path in paths]
    if not here or not here[0].exists():
        raise FileNotFoundError(f"--ckpt_path best: the run of {last} has none: set checkpoint.monitor in its fit")
    return here[0]


def run_of(checkpoint: Path, root: Path) -> str | None:
    """`version_3` for a checkpoint in that run's folder below root, None for one from elsewhere."""
    run = checkpoint.resolve().parent.parent
    return run.name if run.parent == root.resolve() and run.name.startswith("version_") else None
