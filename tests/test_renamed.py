"""Configurations of the release before: their keys, values and class paths."""

import pytest
import yaml
from lightning import LightningDataModule

import lit_mm
from lit_mm.cli import LitMMCLI
from lit_mm.renamed import with_new_arguments
from tests.helpers.environment import TOKENIZER

OLD = f"""
model:
  scales: [16, 4, 1]
  attention: loop
  encoder:
    class_path: lit_mm.ConvNeXtEncoder
    init_args: {{backbone: convnext_atto, pretrained: false}}
  llm:
    source: LlamaConfig
    sizes: {{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}
    tokenizer: {TOKENIZER}
    template: bare
  parts:
    llm: {{lora: {{rank: 4, alpha: 8, targets: [q_proj]}}}}
data:
  class_path: lit_mm.data.easy_vqa.EasyVQA
  init_args: {{batch_size: 3}}
trainer: {{accelerator: cpu, logger: false, enable_checkpointing: false}}
"""


@pytest.fixture
def shown(tmp_path, capsys):
    """What `--print_config` makes of an old config and further options."""

    def show(*options: str) -> dict:
        (tmp_path / "old.yaml").write_text(OLD)
        with pytest.raises(SystemExit) as ended:
            LitMMCLI(["fit", "--config", str(tmp_path / "old.yaml"), *options, "--print_config"])
        assert ended.value.code == 0
        return yaml.safe_load(capsys.readouterr().out)

    return show


def test_an_old_config_is_read_with_its_new_names(shown):
    with pytest.warns(UserWarning, match="is called") as warned:
        config = shown()
    llm, lora = config["model"]["llm"], config["model"]["parts"]["llm"]["lora"]
    assert (llm["name_or_path"], llm["config_overrides"]["hidden_size"], llm["chat_template"]) == (
        "LlamaConfig",
        32,
        "bare",
    )
    assert (lora["r"], lora["lora_alpha"], lora["target_modules"]) == (4, 8, ["q_proj"])
    assert (config["model"]["packing"], config["model"]["attention"]) == ("padded", "branch")
    assert config["data"]["class_path"].endswith("EasyVQADataModule")
    said = {str(each.message).split(";")[0] for each in warned}
    assert "model.llm.source is called name_or_path now" in said
    assert "this value of model.attention is called model.packing: padded now" in said
    assert "lit_mm.data.easy_vqa.EasyVQA is called lit_mm.EasyVQADataModule now" in said


def test_old_options_are_read_with_their_new_names(shown):
    options = ["--model.llm.sizes.hidden_size", "64", "--model.parts.llm.lora.rank=2", "--data", "VideoShapes"]
    with pytest.warns(UserWarning, match="is called"):
        config = shown(*options)
    assert config["model"]["llm"]["config_overrides"]["hidden_size"] == 64
    assert config["model"]["parts"]["llm"]["lora"]["r"] == 2
    assert config["data"]["class_path"].endswith("VideoShapesDataModule")


def test_old_names_in_mappings_of_the_command_line_are_read(shown):
    options = ["--model.llm", "{source: LlamaConfig, template: bare}", "--model.parts.llm.lora={rank: 2, alpha: 8}"]
    with pytest.warns(UserWarning, match="is called"):
        config = shown(*options, "--model.llm.sizes={hidden_size: 64}", "--data", "{class_path: VideoShapes}")
    assert config["model"]["llm"]["config_overrides"] == {"hidden_size": 64}
    assert config["model"]["parts"]["llm"]["lora"]["r"] == 2
    assert config["data"]["class_path"].endswith("VideoShapesDataModule")


def test_a_mapping_of_the_command_line_without_old_names_is_as_it_was():
    words = ["--model.llm", "{name_or_path: a, chat_template: '1e-3'}", "--data={a: [1e-3,", "{x", "--y", "{z: 1e-3}"]
    assert with_new_arguments(words) == words


@pytest.mark.parametrize("name", ["EasyVQA", "ImageInstructions", "VideoInstructions", "VideoShapes"])
def test_old_class_names_are_imported_with_a_warning(name):
    with pytest.warns(UserWarning, match=f"lit_mm.{name} is called"):
        assert issubclass(getattr(lit_mm, name), LightningDataModule)
