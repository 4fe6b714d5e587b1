"""Short fits of a small module on an instruction set."""

import lightning
from lightning.pytorch.loggers import CSVLogger

from lit_mm.callbacks.token_efficiency import TokenEfficiency
from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.images import ImageOptions
from lit_mm.model.llm import LLM
from lit_mm.training.module import LitMatryoshka
from lit_mm.training.parts import LLMPart, Part, Parts
from tests.helpers.models import tiny_encoder, tiny_llm


def module(llm: LLM | None = None, **options) -> LitMatryoshka:
    """A rate of its own for every part."""
    options = {"parts": Parts(Part(1e-3), Part(2e-3), LLMPart(3e-3)), "max_new_tokens": 3, **options}
    return LitMatryoshka(tiny_encoder, llm or tiny_llm(), [16, 4, 1], **options)


def fit(root, folder, ckpt_path=None, data=None, lit=None, **options) -> tuple[LitMatryoshka, lightning.Trainer]:
    """Four steps on the CPU, logged into a file; `options` are the Trainer's, `data` the data module's."""
    lightning.seed_everything(7, verbose=False)
    lit = lit or module()
    source = ImageDataModule(
        lit.inputs,
        train=f"{root}/train.json",
        val=f"{root}/val.json",
        test=f"{root}/val.json",
        image_root=str(root),
        image=ImageOptions("keep", None),
        **{"batch_size": 4, **(data or {})},
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": CSVLogger(folder)}
    defaults = {"max_steps": 4, "accelerator": "cpu", "log_every_n_steps": 1, **quiet}
    trainer = lightning.Trainer(**{**defaults, **options})
    trainer.fit(lit, source, ckpt_path=ckpt_path, weights_only=False)
    return lit, trainer


def logged(folder, having="speed/step_ms"):
    """Rows of metrics.csv that have a name, as numbers."""
    lines = next(folder.glob("**/metrics.csv")).read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    return [{name: float(value) for name, value in row.items() if value} for row in rows if row[having]]


def losses(folder) -> list[dict[str, float]]:
    """Each step's loss, and that of each scale."""
    return [{n: v for n, v in row.items() if n.startswith("train/loss")} for row in logged(folder, "train/loss")]


class Spy(lightning.Callback):
    """Keeps every training batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, lit, batch, batch_idx):
        self.batches.append(batch)


def watched_fit(root, folder, callback=None, model=None, **options):
    """A short fit with token efficiency: (trainer, lit, data, training batches)."""
    spy = Spy()
    defaults = {"max_steps": 6, "log_every_n_steps": 3, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    watching = {"callbacks": [callback or TokenEfficiency(), spy], "reload_dataloaders_every_n_epochs": 1}
    lit, trainer = fit(root, folder, lit=module(**(model or {})), **{**defaults, **watching, **options})
    return trainer, lit, trainer.datamodule, spy.batches
