"""Benchmarks that are judged while a model trains: the right figures, and the training stays what it was."""

import os
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch

from lit_mm import BenchmarkEvaluation
from lit_mm.callbacks.token_efficiency import TokenEfficiency
from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.images import ImageOptions
from lit_mm.training import strategies  # noqa: F401 (registers fsdp)
from lit_mm.training.parts import LLMPart, Part, Parts
from tests.helpers.benchmark_files import write_json
from tests.helpers.clock import forward_by
from tests.helpers.media import draw
from tests.helpers.models import tiny_llm
from tests.helpers.runs import fit, logged, losses, module
from tests.helpers.sharded import Run, on_ranks

SCALES = ("16", "4", "1")
NOTHING = "none of them at all"
STILL = Parts(Part(0.0), Part(0.0), LLMPart(0.0))


def charts(folder: Path, references: list[list[str]]) -> str:
    """DocVQA with a question for each list of accepted answers."""
    questions = [
        {"questionId": n, "question": f"what is number {n}?", "image": f"documents/{n}.png", "answers": own}
        for n, own in enumerate(references)
    ]
    write_json(folder / "val_v1.0.json", {"data": questions})
    for n in range(len(references)):
        draw(folder / f"documents/{n}.png", (64, 64), ["red", "green", "blue", "teal"][n % 4])
    return f"docvqa:{folder}"


class Answers(lightning.Callback):
    """Keeps what the model answers at the end of a fit, by question and scale, without this package's callback."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark

    def on_train_end(self, trainer, lit):
        data = ImageDataModule(lit.inputs, predict=self.benchmark, image=ImageOptions("keep", None))
        data.setup("predict")
        lit.eval()
        lit.max_new_tokens = 32  # DocVQA's
        with torch.no_grad():
            own = [lit.answers(batch) for batch in data.predict_dataloader()]
        self.texts = [[answer.text for answer in answers] for batch in own for answers in batch]


@pytest.fixture
def known(instruction_set, tmp_path):
    """A benchmark of four questions, two of which are answered right at scale 16 after a fit of four steps."""
    (folder := tmp_path / "docvqa").mkdir()
    asked = Answers(charts(folder, [["?"]] * 4))
    fit(instruction_set, tmp_path / "plain", callbacks=[asked], limit_val_batches=0)
    assert all(own[0] for own in asked.texts)
    return charts(folder, [[asked.texts[n][0]] if n < 2 else [NOTHING] for n in range(4)])


def test_figures_are_those_of_the_model_at_that_step(instruction_set, tmp_path, known, capsys):
    watch = BenchmarkEvaluation([known, f"{instruction_set}/val.json"], evaluate_every=2, questions=None)
    lit, trainer = fit(instruction_set, tmp_path / "watched", callbacks=[watch], limit_val_batches=0)
    rows = logged(tmp_path / "watched", "bench/docvqa@16")
    assert [row["step"] for row in rows] == [1, 3]  # as Lightning counts: steps before this one
    assert rows[1]["bench/docvqa@16"] == 0.5
    trainer.datamodule.files["test"], trainer.datamodule.tests = known, ["test"]
    [tested] = trainer.test(lit, trainer.datamodule, verbose=False)
    found = [rows[1][f"bench/docvqa@{scale}"] for scale in SCALES]
    assert found == pytest.approx([tested[f"test/accuracy@{scale}"] for scale in SCALES])
    assert "benchmarks at step 4: docvqa 0.5 @16, " in capsys.readouterr().out
    assert rows[0].keys() >= {"bench/val@1"}


def test_training_is_the_same_with_and_without(instruction_set, tmp_path, known):
    """Also with random numbers (dropout), frozen parts, and accumulation."""
    modes = []

    class Modes(lightning.Callback):
        def on_train_batch_start(self, trainer, lit, *_):
            modes.append([each.training for each in lit.modules()])

    def run(name, *watch):
        parts = Parts(Part(1e-3, frozen=True), Part(2e-3), LLMPart(3e-3))
        lit = module(tiny_llm(attention_dropout=0.3), parts=parts)
        fit(instruction_set, tmp_path / name, callbacks=[*watch, Modes()], lit=lit, accumulate_grad_batches=2)
        return losses(tmp_path / name), {name: value.clone() for name, value in lit.state_dict().items()}

    watched, plain = run("watched", BenchmarkEvaluation([known], 1, 3)), run("not")
    assert watched[0] == plain[0]
    assert all(torch.equal(value, plain[1][name]) for name, value in watched[1].items())
    assert len(modes) == 16 and {*map(tuple, modes)} == {tuple(modes[0])} and {*modes[0]} == {True, False}
    assert len(logged(tmp_path / "watched", "bench/docvqa@1")) == 4


@pytest.mark.parametrize("first", [True, False])
def test_its_time_is_not_training_time(instruction_set, tmp_path, known, hands, first):
    """Whichever of the two callbacks comes first."""
    callbacks = [BenchmarkEvaluation([known], 1, 3), TokenEfficiency(repetitions=0)]
    lit = module()
    lit.judge = partial(lambda judge, *given: (forward_by(hands, 60)(), judge(*given))[1], lit.judge)
    train = forward_by(hands, 0.1)
    lit.on_before_backward = lambda loss: train()
    order = callbacks if first else callbacks[::-1]
    fit(instruction_set, tmp_path / "run", callbacks=order, lit=lit, limit_val_batches=0)
    assert [row["speed/step_ms"] for row in logged(tmp_path / "run")] == pytest.approx([100] * 4)


def on_one_rank(run: Run) -> None:
    """Or on one of several. Nothing trains, so that the model is the same on any number of them."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    watch = BenchmarkEvaluation([f"docvqa:{run.folder}/docvqa"], 1, 3, seed=1)
    options = {"strategy": run.strategy, "devices": ranks, "use_distributed_sampler": False, "limit_val_batches": 0}
    options |= {"inference_mode": False, "max_steps": 2, "enable_checkpointing": False, "callbacks": [watch]}
    folder = run.folder / f"{run.strategy}{ranks}"
    fit(run.folder, folder, lit=module(parts=STILL), data={"batch_size": 2}, **options)


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(instruction_set):
    (folder := instruction_set / "docvqa").mkdir()
    asked = Answers(charts(folder, [["?"]] * 5))
    fit(instruction_set, folder, lit=module(parts=STILL), callbacks=[asked], max_steps=1, limit_val_batches=0)
    charts(folder, [own[:1] for own in asked.texts])
    on_one_rank(Run(instruction_set))
    on_ranks(2, [Run(instruction_set, "ddp"), Run(instruction_set, "fsdp")], on_one_rank)
    one, ddp, fsdp = (logged(instruction_set / name, "bench/docvqa@16") for name in ("auto1", "ddp2", "fsdp2"))
    assert [row["bench/docvqa@16"] for row in one] == [1, 1]
    for own in ddp, fsdp:
        for scale in SCALES:
            assert [row[f"bench/docvqa@{scale}"] for row in own] == [row[f"bench/docvqa@{scale}"] for row in one]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"benchmarks": ["docvga:x"], "evaluate_every": 1}, "unknown benchmark 'docvga'"),
        ({"benchmarks": ["docvqa:x", "docvqa:y"], "evaluate_every": 1}, "would both be called docvqa"),
        ({"benchmarks": ["docvqa:x"], "evaluate_every": 0}, "evaluate_every: expected a positive number, found 0"),
        ({"benchmarks": ["docvqa:x"], "evaluate_every": 1, "questions": -1}, "questions: expected a positive number"),
    ],
)
def test_what_it_cannot_do_is_said(options, said):
    with pytest.raises(ValueError, match=said):
        BenchmarkEvaluation(**options)


def test_missing_files_are_said_before_training(instruction_set, tmp_path):
    watch = BenchmarkEvaluation([f"docvqa:{tmp_path}/none"], 1)
    with pytest.raises(FileNotFoundError, match="docvqa: no file or folder"):
        fit(instruction_set, tmp_path / "run", callbacks=[watch])
    assert watch.evaluate_every == 1 and not list((tmp_path / "run").glob("**/metrics.csv"))
