"""What cannot be loaded says why, and at once."""

import json
import shutil
import time

import pytest
import torch
from PIL import Image

from lit_mm import ImageOptions, Model, load
from tests.helpers.network import dead_hub  # noqa: F401 (a fixture)
from tests.helpers.runs import fit, module
from tests.helpers.serving import trained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("set"))


def changed(run, folder, **fields):
    """A copy of the run's checkpoint without its tokenizer, with other fields."""
    file = folder / "checkpoints/last.ckpt"
    file.parent.mkdir(parents=True)
    torch.save(torch.load(run / "checkpoints/last.ckpt", weights_only=True) | fields, file)
    return file


def test_a_checkpoint_without_its_tokenizer_names_the_folder(run, tmp_path, dead_hub):  # noqa: F811
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    saved["llm"]["tokenizer"] = "nobody/nothing"
    file, started = changed(run, tmp_path, hyper_parameters=saved), time.monotonic()
    with pytest.raises(
        FileNotFoundError, match=r"load: no folder .*/tokenizer: copy the run's .*nobody/nothing"
    ) as error:
        load(file)
    assert "out of reach" in str(error.value) and "hf download nobody/nothing" in str(error.value)
    assert time.monotonic() - started < 20
    shutil.copytree(run / "tokenizer", tmp_path / "tokenizer")
    assert load(file).tokenizer.get_vocab() == load(run).tokenizer.get_vocab()


def test_an_empty_folder_is_not_called_an_option(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^load: no checkpoints/last.ckpt below {tmp_path}"):
        load(tmp_path)


@pytest.mark.parametrize("described", [None, [], {"scales": [1]}])
def test_a_checkpoint_that_does_not_describe_its_model(run, tmp_path, described):
    with pytest.raises(ValueError, match="does not describe its model"):
        load(changed(run, tmp_path, hyper_parameters=described))


def test_a_run_trained_in_python_opens_with_its_module(tmp_path):
    """The loaded model has the trained weights, and answers as the module does; another sampling is refused."""
    image = Image.new("RGB", (64, 64), "red")
    image.save(tmp_path / "a.png")
    talk = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "train.json").write_text(json.dumps([{"image": "a.png", "conversations": talk}] * 4))
    (tmp_path / "val.json").write_text((tmp_path / "train.json").read_text())
    lit, trainer = fit(tmp_path, tmp_path, max_steps=2)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"give load the module that was trained"):
        load(tmp_path)
    model = load(tmp_path, "cpu", module=module())
    assert all(map(torch.equal, model.vlm.state_dict().values(), lit.vlm.state_dict().values()))
    assert model.media.image == ImageOptions("keep", None)
    by_hand = Model(lit.vlm, lit.tokenizer, ImageOptions("keep", None), max_new_tokens=3)
    for scale, answer in by_hand.answer(image, "what color?", "all").items():
        assert model.answer(image, "what color?", scale).ids == answer.ids
    with pytest.raises(ValueError, match="sampling was 'mean' and is 'spatial'"):
        load(tmp_path, module=module(sampling="spatial"))
    with pytest.raises(ValueError, match="expected a checkpoint without scales"):
        load(tmp_path, scales=[4], module=module())
