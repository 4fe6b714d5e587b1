"""The command line: LightningCLI with this project's classes and run folders.

<trainer.default_root_dir>/version_0/ is the folder of one run: its config.yaml, checkpoints/, TensorBoard logs, and
the results of test and predict.
"""

from __future__ import annotations

import difflib
import inspect
import pydoc
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_mm.__main__ import tidy
from lit_mm.callbacks.advice import MemoryAdvice
from lit_mm.callbacks.predictions import AnswerWriter
from lit_mm.callbacks.progress import Progress
from lit_mm.callbacks.skipped import SkippedRecords
from lit_mm.callbacks.stopping import StopBetweenBatches
from lit_mm.callbacks.token_efficiency import TokenEfficiency
from lit_mm.data.boards import DemoDataModule
from lit_mm.data.clips import VideoShapesDataModule
from lit_mm.data.datamodules import ImageDataModule, VideoDataModule
from lit_mm.data.easy_vqa import EasyVQADataModule
from lit_mm.data.rendered import RenderedDataModule
from lit_mm.renamed import accept_old_names, with_new_arguments
from lit_mm.training import strategies  # noqa: F401 (registers --trainer.strategy fsdp)
from lit_mm.training.checkpoints import is_of_fsdp1
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.saving import SHARDED, WholeFiles, check_readable, check_room, find_checkpoint, is_remote

PROGRAM = "python -m lit_mm"
DATA_MODULES = (
    ImageDataModule,
    VideoDataModule,
    DemoDataModule,
    EasyVQADataModule,
    RenderedDataModule,
    VideoShapesDataModule,
)  # `--data NAME`
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # frozen parts, on purpose


UNKNOWN_OPTION = re.compile(
    r"Type .* expects a function or a callable class: (Option '\w+' is not accepted)\. "
    r"Got value: Namespace\(class_path='([\w.]+)'.*",
    re.DOTALL,
)
"""jsonargparse's error for a class that gets an unknown argument, which does not say what the class takes."""


class Parser(LightningArgumentParser):
    """LightningCLI's parser, with errors that name the file, the key, and the closest valid key."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message."""
        if self.exit_on_error:  # otherwise the parser only tries whether a type fits
            key = re.search(r"(?:does not accept option|Option|Unrecognized arguments?:?) '?(?:--)?([\w.]+)'?", message)
            known = getattr(getattr(ex, "subcommand_parser", None) or self, "_actions", [])
            taken = arguments_of(unknown[2]) if (unknown := UNKNOWN_OPTION.search(message)) else []
            message = UNKNOWN_OPTION.sub(lambda found: f"{found[1]} by {found[2]}", tidy(message))
            message += f", which takes {', '.join(taken)}" if taken else ""
            message += nearest(key[1], {action.dest for action in known}, taken) if key else ""
        super().error(message, ex)


def arguments_of(path: str) -> list[str]:
    """The names of a class's arguments; empty if there is no such class."""
    kind = pydoc.locate(path)
    return [*inspect.signature(kind).parameters] if callable(kind) else []


def nearest(key: str, known: set[str], taken: Sequence[str]) -> str:
    """The config files that contain an unknown key, and the valid key that was probably meant.

    Args:
        key: The unknown key.
        known: The valid keys.
        taken: The arguments of the class that was given the key; empty: one of the data modules.
    """
    last = key.rpartition(".")[2]
    fields = {*taken} or {name for kind in DATA_MODULES for name in inspect.signature(kind).parameters}
    files = [file for file in config_files(sys.argv) if f"{last}:" in Path(file).read_text(encoding="utf-8")]
    close = difflib.get_close_matches(key, known | fields, 1, 0.75) or difflib.get_close_matches(last, fields, 1, 0.6)
    where = f"\n  it is in {', '.join(files)}" if files else ""
    return f"{where}\n  did you mean {close[0]}?" if close else where


def config_files(arguments: Sequence[str]) -> list[str]:
    """The existing files that are given as --config."""
    named = [following for own, following in pairwise(arguments) if own in ("--config", "-c")]
    named += [own.removeprefix("--config=") for own in arguments if own.startswith("--config=")]
    return [file for file in named if Path(file).is_file()]


class _Unique(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"line {node.start_mark.line + 1}: duplicate key {twice[0]}")
        return super().construct_mapping(node, deep)


def check_configs(arguments: Sequence[str]) -> None:
    """Check that the config files are YAML mappings without duplicate keys.

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
    """Writes config.yaml to the run's folder when a fit starts."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it only for a new fit: a resume, test and predict leave the run's config as it is."""
        resumed = self.config.get("ckpt_path") and (Path(trainer.log_dir or ".") / "config.yaml").exists()
        if stage == "fit" and not resumed:
            self.config = self.config.clone()
            self.config["ckpt_path"] = None
            super().setup(trainer, pl_module, stage)


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, except that last.ckpt is always the end of the run, and that a rank which fails
    alone does not wait for the others to save with it."""

    trained = False
    """Whether this process has trained on a batch; nothing is written before that."""

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
        """Check that the folder can hold a checkpoint.

        Raises:
            OSError: It is not writable, or its disk is too full.
        """
        if trainer.is_global_zero and not cast(Any, trainer).fast_dev_run and not is_remote(self.dirpath):
            check_room(Path(str(self.dirpath)), list(pl_module.parameters()))
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        """Remember that there is something to save."""
        self.trained = True
        super().on_train_batch_end(trainer, *arguments)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save if all ranks have stopped together: by a signal that they agreed on, or by non-finite gradients."""
        together = isinstance(exception, KeyboardInterrupt | SIGTERMException | FloatingPointError)
        if self.trained and (together or trainer.world_size == 1):
            super().on_exception(trainer, pl_module, exception)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save last.ckpt, which Lightning leaves at the last multiple of `every_n_train_steps`."""
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))


class LitMMCLI(LightningCLI):
    """fit, validate, test and predict; run it with `python -m lit_mm`."""

    def __init__(self, args: list[str] | None = None) -> None:
        accept_old_names()
        given = with_new_arguments(sys.argv[1:] if args is None else args)
        if args is None:
            sys.argv[1:] = given
        check_configs(given)
        verbs = self.subcommands()
        usage = "--config FILE [--config FILE …] [--ckpt_path last | FILE] [--FIELD VALUE …]"  # argparse's has 90 lines
        super().__init__(
            LitMatryoshka,
            LightningDataModule,
            parser_class=Parser,
            subclass_mode_data=True,
            args=None if args is None else given,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={
                "callbacks": [StopBetweenBatches(), SkippedRecords(), MemoryAdvice()],
                "default_root_dir": "runs",
                "use_distributed_sampler": False,  # the data module distributes records among ranks
                "log_every_n_steps": 10,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,  # the table of parts is better
                "inference_mode": False,  # its tensors do not work with sharded parameters
                "reload_dataloaders_every_n_epochs": 1,  # epochs may differ in length
            },
            parser_kwargs={"prog": PROGRAM, **{verb: {"usage": f"{PROGRAM} {verb} {usage}"} for verb in verbs}},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add sections for checkpoints, progress, token efficiency and answers, and link the data to the model."""
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        kept = {"save_last": True, "save_on_exception": True, "enable_version_counter": False}  # after Ctrl-C, too
        parser.set_defaults({f"checkpoint.{name}": value for name, value in kept.items()})
        parser.add_lightning_class_args(Progress, "progress")
        parser.add_lightning_class_args(TokenEfficiency, "token_efficiency")
        parser.add_lightning_class_args(AnswerWriter, "answers")
        parser.add_argument(
            "--scales",
            type=list[str | int] | str | int | None,
            default=None,
            help="Evaluate and answer only at these scales, such as 36, 8x16 or [144, 36]; null: all.",
        )
        parser.link_arguments("model.inputs", "data.init_args.inputs", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint; the given config overrides the one in the checkpoint."""
        verb, config = self.config.subcommand, self.config[self.config.subcommand]
        config.trainer.default_root_dir = str(Path(config.trainer.default_root_dir).expanduser())
        if not config.get("ckpt_path"):
            if verb != "fit" and not config.model.init_from:
                raise ValueError(f"{verb} needs trained weights: --ckpt_path last, best, or the path of a checkpoint")
            return
        path = find_checkpoint(config.ckpt_path, Path(config.trainer.default_root_dir))
        check_readable(path)
        if (path / SHARDED).is_file():
            if "fsdp" not in str(config.trainer.strategy).lower():
                raise ValueError(
                    f"--ckpt_path: {path} is sharded: use trainer.strategy fsdp on any number of devices, or `export`"
                )
            if is_of_fsdp1(path):
                raise ValueError(
                    f"--ckpt_path: {path} is of FSDP1, which is gone: `export` it, then use model.init_from"
                )
        config.ckpt_path = str(path)
        config.model.init_from = None  # the checkpoint has all weights; the sources may be gone
        if "weights_only" in config:
            config.weights_only = True

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Log to TensorBoard in the run's folder, unless the config has a logger.

        Test, predict and resume use the folder of the run that wrote the checkpoint.
        """
        config = self.config[self.subcommand]
        if config.trainer.logger is None:
            root, checkpoint = Path(config.trainer.default_root_dir).resolve(), config.get("ckpt_path")
            run = run_of(Path(checkpoint), root) if checkpoint else None
            kwargs["logger"] = TensorBoardLogger(root, name="", version=run, default_hp_metric=False)
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out the bar and the checkpoints if the config turns them off, and the bar if it has another one."""
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
        """Remove the folder of a fit that fails before its first step, except after non-finite gradients."""
        folder = Path(self.trainer.log_dir) if self.trainer.log_dir else None
        self.model.ask_at(self.config[subcommand].scales)
        new = subcommand == "fit" and folder is not None and not folder.exists()
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            checkpoints = [each for each in cast(Any, self.trainer).callbacks if isinstance(each, Checkpoints)]
            trained = any(each.trained for each in checkpoints) or isinstance(error, FloatingPointError)
            if not checkpoints:  # trainer.enable_checkpointing false: a run leaves only its logs
                trained |= self.trainer.fit_loop.epoch_loop.batch_progress.total.completed > 0
            if new and folder is not None and not trained and self.trainer.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def run_of(checkpoint: Path, root: Path) -> str | None:
    """`version_3` for a checkpoint in that run's folder below root, None for any other checkpoint."""
    run = checkpoint.resolve().parent.parent
    return run.name if run.parent == root.resolve() and run.name.startswith("version_") else None
