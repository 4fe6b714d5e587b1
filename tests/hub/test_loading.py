"""What cannot be loaded says why, and at once."""

import shutil
import time

import pytest
import torch

from lit_mm import load
from tests.helpers.network import dead_hub  # noqa: F401 (a fixture)
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
