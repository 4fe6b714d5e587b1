"""A router is trained by `fit` beside a model that stays as it is, and chooses the scale from then on."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
import yaml
from PIL import Image

from lit_mm import load
from lit_mm.evaluation.results import read_questions
from lit_mm.inference.choosers import Router
from lit_mm.model.router import RouterOptions
from lit_mm.training.parts import Part, Parts
from tests.helpers.command_line import lit_mm
from tests.helpers.records import conversation
from tests.helpers.runs import module
from tests.helpers.serving import trained_run

KINDS = {"what does the small text say": "16", "which color is it": "1"}
"""Questions, and the scale at which they are answered right."""


WORDS = ["red", "green", "one", "two", "three", "yes", "no", "left", "right", "up", "down", "cat", "dog", "tree", "box"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A random model, and answers that it finds likelier with many tokens to one question, with few to the other."""
    run = trained_run(tmp_path_factory.mktemp("set"), initializer_range=0.3)
    folder, model, rng = run.parent.parent, load(run), np.random.default_rng(0)
    items: dict[str, list] = {"train": [], "val": []}
    for number in range(64):
        pixels = rng.integers(0, 128, (64, 64, 3)) + rng.integers(0, 128, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        for text, scale in KINDS.items():
            found = model.logprobs(folder / f"{number}.png", text, WORDS)
            means = {name: np.array([float(each.mean()) for each in own]) for name, own in found.items()}
            best = (means[scale] - np.max([own for name, own in means.items() if name != scale], 0)).argmax()
            turns = conversation((f"<image>\n{text}", WORDS[best]))
            own = {"id": f"{number} {scale}", "image": f"{number}.png", "conversations": turns}
            items["val" if number % 4 == 0 else "train"].append(own)
    for split, own in items.items():
        (folder / f"{split}.json").write_text(json.dumps(own))
    return run


def fitted(base: Path, name: str, *further: str, steps: int = 60, **router) -> Path:
    """A run that trains a router."""
    folder = base.parent.parent
    trainer = {"default_root_dir": str(folder / name), "max_steps": steps, "val_check_interval": steps}
    model = {"init_from": str(base), "router": {"hidden": 32, **router}, "max_new_tokens": 1, "scales_per_step": 1}
    overlay = {"model": model | {"parts": {"router": {"lr": 0.01}}}, "data": {"init_args": {"batch_size": 32}}}
    overlay["trainer"] = trainer | {"check_val_every_n_epoch": None}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(overlay))
    lit_mm("fit", "--config", str(folder / "exp.yaml"), "--config", str(folder / f"{name}.yaml"), *further)
    return folder / name / "version_0"


def weights(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)["state_dict"]


def with_scores(file: Path) -> None:
    """Let the scale at which an answer is likelier be the one that answers right."""
    table = pyarrow.parquet.read_table(file)
    for scale in ("16", "4", "1"):
        right, name = [float(KINDS[text] == scale) for text in table["question"].to_pylist()], f"score@{scale}"
        table = table.set_column(table.column_names.index(name), name, [right])
    pyarrow.parquet.write_table(table, file)


@pytest.fixture(scope="module", params=[{"loss": "ranking"}, {"loss": "sufficient"}, {"question": False}], ids=str)
def routed(request, base):
    """A run with a calibrated router, and the router's options."""
    run = fitted(base, "_".join(map(str, request.param.values())), **request.param)
    with_scores(run / "accuracy_tokens_val.parquet")
    lit_mm("calibrate", str(run), "--mean_tokens", "14", "--statistic", "router")
    return run, request.param


def test_a_router_learns_which_questions_need_many_tokens(base, routed):
    """And cannot without seeing them, as both are asked about the same kind of images."""
    (run, options), folder = routed, base.parent.parent
    told, model = json.loads((run / "chooser.json").read_text()), load(run)
    rows, _ = read_questions(run / "accuracy_tokens_val.parquet")
    chooser = Router([1, 4, 16], math.log(2) if options.get("loss") == "sufficient" else 0)  # whatever was calibrated
    right, seen = 0, options.get("question", True)
    for item, row in zip(json.loads((folder / "val.json").read_text()), rows, strict=True):
        text, picture = item["conversations"][0]["value"].removeprefix("<image>\n"), folder / item["image"]
        answer = model.answer(picture, text, chooser)
        assert list(answer.router.values()) == pytest.approx(row.router, abs=1e-5)
        auto = model.answer(picture, text, "auto")
        assert auto.scale == model.chooser.choice(answer.router)
        assert auto.ids == model.answer(picture, text, auto.scale).ids
        right += (answer.scale != 1) == (KINDS[text] != "1")
    assert told["statistic"] == "router" and model.chooser == Router(list(map(int, told["path"])), *told["thresholds"])
    assert right == len(rows) if seen else right <= 0.65 * len(rows)
    assert (told["accuracy"], told["held_out"]["accuracy"]) == (1, 1) if seen else told["accuracy"] <= 0.65
    assert told["mean_tokens"] == 9 or not seen


def test_nothing_else_is_trained(base, routed):
    before, after = (weights(run / "checkpoints/last.ckpt") for run in (base, routed[0]))
    moved = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in moved} == {"router"} and len(moved) == 4
    opened = load(routed[0]).vlm.router.state_dict()
    assert all(torch.equal(after[f"vlm.router.{name}"], own) for name, own in opened.items())
    assert load(routed[0], scales=[16, 1]).vlm.router is None  # its scores are those of three scales


@pytest.mark.parametrize("routed", [{"loss": "ranking"}], indirect=True)
def test_test_and_predict_use_the_router(base, routed):
    (run, _), folder = routed, base.parent.parent
    told = json.loads((run / "chooser.json").read_text()) | {"path": ["1", "16"], "thresholds": [0.0]}
    (run / "chooser.json").write_text(json.dumps(told))
    val = json.loads((folder / "val.json").read_text())[:12]
    asked = [{"question_id": own["id"], "image": own["image"], "text": own["conversations"][0]["value"]} for own in val]
    asked = [own | {"text": own["text"].removeprefix("<image>\n")} for own in asked]
    (folder / "ask.jsonl").write_text("".join(json.dumps(own) + "\n" for own in asked))
    common = ("--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt"))
    printed = lit_mm("test", *common, "--data.test", str(folder / "val.json"))
    assert "by router" in printed
    found = json.loads((run / "accuracy_tokens.json").read_text())
    rows, _ = read_questions(run / "accuracy_tokens.parquet")
    chosen = [row.router[0] > row.router[2] for row in rows]
    costs, finest, coarsest = found["chooser"]["costs"], found["scales"][0], found["scales"][2]
    assert costs["tokens"]["auto"]["cost"] == pytest.approx(1 + 16 * np.mean(chosen))
    flops = coarsest["encode_flops"] + coarsest["prefill_flops"] + coarsest["router_flops"]
    assert costs["flops"]["auto"]["cost"] == pytest.approx(flops + finest["prefill_flops"] * np.mean(chosen))
    assert coarsest["router_flops"] == 2 * (32 * load(run).vlm.router.layers[0].in_features + 32 * 3)
    assert coarsest["measured"]["router_ms"]["median"] > 0
    lit_mm("predict", *common)
    [file] = run.glob("answers_*/answers@auto.jsonl")
    lines, model = [json.loads(line) for line in file.read_text().splitlines()], load(run)
    for own, line in zip(asked, lines, strict=True):
        assert line["text"] == model.answer(folder / own["image"], own["text"], "auto").text


def test_a_router_is_resumed_exactly(base):
    options = ("--checkpoint.every_n_train_steps", "3", "--checkpoint.save_top_k", "-1", "--model.max_new_tokens", "1")
    run = fitted(base, "resumed", *options, steps=6)
    whole, [third] = weights(run / "checkpoints/last.ckpt"), (run / "checkpoints").glob("*step=3.ckpt")
    third = shutil.copy(third, run.parent / "third.ckpt")
    lit_mm("fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(third))
    again = weights(run.parent / "version_1/checkpoints/last.ckpt")
    assert again.keys() == whole.keys() and all(torch.equal(whole[name], own) for name, own in again.items())
    part = weights(third)
    assert not any(torch.equal(part[name], own) for name, own in whole.items() if name.startswith("vlm.router"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"packing": "sequential"},
            "model.router: expected packing packed and no time scales, found packing sequential",
        ),
        ({"time_scales": [2, 1]}, r"time_scales \[2, 1\]"),
    ],
)
def test_what_a_router_does_not_go_with_is_named(options, said):
    with pytest.raises(ValueError, match=said):
        module(router=RouterOptions(), **options)
    with pytest.raises(ValueError, match=r"parts\.router: frozen"):
        Parts(router=Part(frozen=True))
    with pytest.raises(ValueError, match="hidden from 1"):
        RouterOptions(hidden=0)
