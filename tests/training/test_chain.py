"""The recipes' chains of stages, scaled down: the shipped overlays with their pixels, scales, batches and hand-offs,
on narrow parts, two steps a stage, with files where the recipes look for them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from lit_mm.cli import LitMMCLI
from lit_mm.training.module import LitMatryoshka
from tests.helpers.command_line import configs
from tests.helpers.environment import ROOT, TOKENIZER
from tests.helpers.media import draw, render
from tests.helpers.models import SIZES
from tests.helpers.records import conversation

NARROW = {
    "model": {
        "encoder": {
            "init_args": {
                "backbone": "convnext_atto",
                "overrides": {"depths": [1, 1, 1, 1], "dims": [8, 8, 12, 16], "kernel_sizes": 3, "ls_init_value": 1.0},
                "extra_stages": [{"depth": 1, "width": 24, "layer_scale": 1.0}],
                "pretrained": False,
            }
        },
        "llm": {"name_or_path": "LlamaConfig", "config_overrides": SIZES, "tokenizer": TOKENIZER},
        "init_gain": 1.0,
    },
    "data": {"init_args": {"num_workers": 0}},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, "enable_progress_bar": False},
}
"""Laid over a recipe it makes the model small; all else stays the recipe's."""

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """Runs overlays, all in one folder with their data: the weights of the first step and those of the checkpoint."""
    folder, seen = tmp_path_factory.mktemp("chain"), {}
    (folder / "narrow.yaml").write_text(yaml.safe_dump(NARROW))
    original = LitMatryoshka.on_train_start

    def on_train_start(lit: LitMatryoshka) -> None:
        seen["first"] = {f"vlm.{name}": tensor.clone() for name, tensor in lit.vlm.state_dict().items()}
        original(lit)

    def run(*names: str, more: Sequence[str] = ()) -> tuple[Weights, Weights]:
        place_data(*names)
        trainer = LitMMCLI(["fit", *configs("base", *names), "--config=narrow.yaml", *more]).trainer
        assert trainer.global_step == trainer.max_steps
        last = Path(trainer.default_root_dir) / "version_0/checkpoints/last.ckpt"
        return seen["first"], torch.load(last, weights_only=True)["state_dict"]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["lit_mm"])
        patch.setattr(LitMatryoshka, "on_train_start", on_train_start)
        yield run


def place_data(*names: str) -> None:
    """Forty records, and their pictures, wherever the overlays name a set."""
    for name in names:
        options = yaml.safe_load((ROOT / f"experiments/{name}.yaml").read_text()).get("data", {}).get("init_args", {})
        named = options.get("train", [])
        for subset in [{"path": named}] if isinstance(named, str) else named:
            place_set(Path(subset["path"]), Path(subset.get("root", "data")), "video" in options)


def place_set(file: Path, root: Path, has_video: bool) -> None:
    for number, color in enumerate(["red", "green", "blue", "teal"]):
        draw(root / f"pictures/{number}.png", (128, 64) if number % 2 else (64, 64), color)
    asked = conversation(("<image>\nwhat color is the shape?", "teal"), ("is there a circle?", "yes"))
    records = [{"image": f"pictures/{number % 4}.png", "conversations": asked} for number in range(39)]
    records.append({"conversations": conversation(("is a red shape red?", "yes"))})
    if has_video:
        render(root / "a.mp4")
        records[1::2] = [{"video": "a.mp4", "conversations": conversation(("<video>\nwhat moves?", "a shape"))}] * 20
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records))


@pytest.fixture(scope="module")
def stages(fit) -> list[tuple[Weights, Weights]]:
    """ConvLLaVA's three stages, one after the other."""
    return [fit(f"convllava/stage_{number}", f"convllava/768/stage_{number}") for number in (1, 2, 3)]


def test_each_stage_begins_with_the_last_ones_weights(stages):
    (_, one), (two_first, two), (three_first, _) = stages
    assert moved(one, two_first) == set()
    assert moved(two, three_first) == set()


def test_each_stage_moves_what_the_paper_trains_and_nothing_else(stages):
    deep = [f"vlm.encoder.trunk.stages.{number}." for number in (2, 3, 4)]
    rest = ["vlm.projector.", "vlm.llm."]
    for (first, last), parts in zip(stages, ([deep[-1], rest[0]], [*deep, *rest], rest), strict=True):
        assert moved(first, last) == {name for name in last if name.startswith(tuple(parts))}


def test_m3_goes_on_from_stage_3(fit, stages):
    first, last = fit("m3/tune", "m3/convllava_768")
    assert moved(stages[-1][1], first) == set()
    assert moved(first, last) == set(last)


def test_m3_through_lora_leaves_the_llm_as_it_is(fit, stages):
    more = ["--trainer.max_steps=3"]  # the first at rate 0, and one half of an adapter starts at zero
    first, last = fit("m3/tune", "m3/convllava_768", "m3/lora", more=more)
    adapters = {name for name in last if "lora_" in name}
    own = {name for name in last if name.startswith("vlm.llm.")} - adapters
    assert len(adapters) == 2 * 7 * SIZES["num_hidden_layers"]
    assert moved(first, last) == set(last) - own
    before = stages[-1][1]
    for name in set(last) - adapters:
        given = before[name.replace(".base_layer.", ".")]
        assert torch.equal(first[name], given.to(first[name].dtype)), name


@pytest.fixture(scope="module")
def joined(fit, stages) -> tuple[Weights, Weights]:
    """Nested tokens on images of any shape, after stage 2."""
    return fit("convllava_m3/stage_3", "convllava_m3/768/stage_3")


def test_convllava_m3_goes_on_from_stage_2(stages, joined):
    first, last = joined
    assert moved(stages[1][1], first) == set()
    assert moved(first, last) == set(last)


def test_video_goes_on_from_convllava_m3(fit, joined):
    few = ["--trainer.accumulate_grad_batches=2"]
    first, last = fit("convllava_m3/stage_3", "convllava_m3/768/stage_3", "video/stage_4", more=few)
    assert moved(joined[1], first) == set()
    assert moved(first, last) == set(last)


def moved(before: Weights, after: Weights) -> set[str]:
    """Names of tensors that differ in any bit; both must have the same names."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
