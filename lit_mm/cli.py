"""The command line: LightningCLI with this project's classes and the layout of its run folders.

<trainer.default_root_dir>/version_0/      one run: its config.yaml, checkpoints/, TensorBoard
                                           logs, and what test and predict made of it
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_mm.callbacks.advice import MemoryAdvice
from lit_mm.callbacks.predictions import AnswerWriter
from lit_mm.callbacks.progress import Progress
from lit_mm.callbacks.skipped import SkippedRecords
from lit_mm.callbacks.stopping import StopBetweenBatches
from lit_mm.callbacks.token_efficiency import TokenEfficiency
from lit_mm.data import clips, easy_vqa  # noqa: F401 (known to --data by their short names)
from lit_mm.training import strategies  # noqa: F401 (likewise to --trainer.strategy)
from lit_mm.training.checkpoints import SHARDED, InitFrom, check_new, export, start_from
from lit_mm.training.module import LitMatryoshka

PROGRAM = "python -m lit_mm"
warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # what is frozen, on purpose


def usage(verb: str) -> str:
    """One line instead of the ninety that argparse would print with every error."""
    return f"{PROGRAM} {verb} --config FILE [--config FILE …] [--ckpt_path last | FILE] [--FIELD VALUE …]"


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder when a fit starts."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only a fit defines a run; test and predict leave its config as it is. What it resumed from
        is no part of the experiment."""
        if stage == "fit":
            self.config = self.config.clone()
            self.config["ckpt_path"] = None
            super().setup(trainer, pl_module, stage)


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, but last.ckpt is the end of the run, whatever was saved on the way, and
    a rank that fails alone does not wait for the others to save with it."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where all ranks have stopped: by a signal, agreed upon, or gradients that are no numbers."""
        together = isinstance(exception, KeyboardInterrupt | SIGTERMException | FloatingPointError)
        if together or trainer.world_size == 1:
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
        check_new(Path(to))
        model.configure_model()
        start_from(model.vlm, InitFrom(ckpt_path))
        export(model.vlm, model.tokenizer, Path(to))
        rank_zero_info(f"Exported to {to}")


class LitMMCLI(LightningCLI):
    """fit, validate, test, predict and export; run it with `python -m lit_mm`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and export."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            LitMatryoshka,
            LightningDataModule,
            trainer_class=LitMMTrainer,
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
        parser.link_arguments("model.inputs", "data.init_args.inputs", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """`--ckpt_path last` means the newest run's; the config given now beats the checkpoint's."""
        config = self.config[self.config.subcommand]
        if config.get("ckpt_path") == "last":
            config.ckpt_path = str(newest_checkpoint(Path(config.trainer.default_root_dir)))
        if config.get("ckpt_path"):
            if not Path(config.ckpt_path).exists():
                raise FileNotFoundError(f"--ckpt_path: no checkpoint {config.ckpt_path} (expected a file, or `last`)")
            sharded, strategy = (Path(config.ckpt_path) / SHARDED).is_file(), str(config.trainer.strategy).lower()
            if sharded and self.config.subcommand != "export" and "fsdp" not in strategy:
                raise ValueError(
                    f"--ckpt_path: {config.ckpt_path} is sharded: give the trainer.strategy that wrote it, fsdp2 or "
                    "fsdp1, on as many devices as you like, or `export` it"
                )
            config.model.init_from = None  # all comes from the checkpoint, the sources may be gone
            if "weights_only" in config:
                config.weights_only = True
        if not config.get("ckpt_path") and self.config.subcommand != "fit":
            rank_zero_warn(f"{self.config.subcommand} without --ckpt_path: the weights are those before training")

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
        """Leave out the bar and the checkpoints where the config switches them off."""
        off = {Progress: "enable_progress_bar", Checkpoints: "enable_checkpointing"}
        kept = [callback for callback in callbacks if config.get(off.get(type(callback), "")) is not False]
        return super()._instantiate_trainer(config, kept)


def newest_checkpoint(root: Path) -> Path:
    """The newest last.ckpt of the runs below root.

    Raises:
        FileNotFoundError: There is none.
    """
    found = sorted(root.glob("version_*/checkpoints/last.ckpt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"--ckpt_path last: no version_*/checkpoints/last.ckpt below {root}: run fit first")
    return found[-1]


def run_of(checkpoint: Path, root: Path) -> str | None:
    """`version_3` for a checkpoint in that run's folder below root, None for one from elsewhere."""
    run = checkpoint.resolve().parent.parent
    return run.name if run.parent == root.resolve() and run.name.startswith("version_") else None
