"""SentencePiece tokenizers in folders."""

import json
import shutil

from tests.helpers.environment import ROOT

FIXTURES = ROOT / "tests/fixtures"


def folder_of(path, model, legacy=False):
    """As lmsys/vicuna-7b-v1.5: a tokenizer.model without a tokenizer.json."""
    path.mkdir(exist_ok=True)
    shutil.copy(model, path / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    special |= {} if legacy is None else {"legacy": legacy}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **special}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(path)
