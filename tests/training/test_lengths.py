"""Records at and behind the last position of the LLM, in all verbs."""

import json
import warnings

import lightning
import pytest

from lit_mm.data.datamodules import ImageDataModule
from lit_mm.data.images import ImageOptions
from lit_mm.data.records import RecordError
from lit_mm.model.llm import LLM
from lit_mm.training.module import LitMatryoshka
from tests.helpers.environment import TOKENIZER
from tests.helpers.models import tiny_encoder, tiny_llm
from tests.helpers.records import conversation

NEW_TOKENS = 5
QUESTION = "<image>\nwhat color is the shape in this picture?"


def gpt2(positions: int) -> LLM:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": positions}
    return LLM("GPT2Config", sizes, TOKENIZER, "bare")


def llama(positions: int) -> LLM:
    return tiny_llm(max_position_embeddings=positions)


@pytest.fixture
def files(instruction_set):
    """The longest record of each file comes last."""
    answers = ["red", "it is a very bright green, with a little yellow"]
    items = [
        {"id": str(number), "image": "images/1.png", "conversations": conversation((QUESTION, answer))}
        for number, answer in enumerate(answers)
    ]
    asked = [{"question_id": 7, "text": "why?"}, {"question_id": 8, "image": "images/1.png", "text": QUESTION}]
    (instruction_set / "all.json").write_text(json.dumps(items))
    (instruction_set / "ask.jsonl").write_text("\n".join(map(json.dumps, asked)))
    all_of = str(instruction_set / "all.json")
    return {"train": all_of, "test": all_of, "predict": str(instruction_set / "ask.jsonl")}


def run(verb: str, llm: LLM, files: dict, root, **options) -> None:
    lit = LitMatryoshka(tiny_encoder, llm, [16, 4, 1], max_new_tokens=NEW_TOKENS)
    image = ImageOptions("keep", None)
    data = ImageDataModule(lit.inputs, **files, image_root=str(root), image=image, cache=str(root / "c"), **options)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "inference_mode")
    trainer = lightning.Trainer(max_steps=2, accelerator="cpu", limit_val_batches=0, **dict.fromkeys(off, False))
    getattr(trainer, verb)(lit, data)


def longest(verb: str, tokenizer) -> int:
    """By hand: the plain template's text, an image's 16 tokens for its marker, in training the answer."""
    text = QUESTION.removeprefix("<image>")
    if verb == "fit":
        return 16 + len(tokenizer(f"{text} it is a very bright green, with a little yellow<|end|>").input_ids)
    return 16 + len(tokenizer(text).input_ids) + NEW_TOKENS


@pytest.mark.parametrize("verb", ["fit", "test", "predict"])
def test_a_table_of_positions_bounds_the_records(files, instruction_set, tokenizer, verb):
    length = longest(verb, tokenizer)
    run(verb, gpt2(length), files, instruction_set)
    counted = "" if verb == "fit" else " and max_new_tokens 5"
    said = rf"too long for the LLM: {length} positions with the images at scale 16{counted}, the LLM has {length - 1}"
    with pytest.raises(RecordError, match=f"{'id 8' if verb == 'predict' else 'record [01]'}.*{said}"):
        run(verb, gpt2(length - 1), files, instruction_set)
    with pytest.warns(UserWarning, match=r"skipped [12] of 2 records\n.*too long for the LLM"):
        if verb == "test":
            with pytest.raises(ValueError, match="no usable record"):  # both questions are equally long
                run(verb, gpt2(length - 1), files, instruction_set, on_bad_record="skip")
        else:
            run(verb, gpt2(length - 1), files, instruction_set, on_bad_record="skip")


@pytest.mark.parametrize("verb", ["fit", "test", "predict"])
def test_rotated_positions_go_on_with_a_warning(files, instruction_set, tokenizer, verb):
    length = longest(verb, tokenizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(verb, llama(length), files, instruction_set)
    assert not [each for each in caught if "positions that" in str(each.message)]
    for _ in range(2):  # also from the table of records that the first start has left
        with pytest.warns(
            UserWarning, match=f"than the {length - 1} positions that the LLM was trained on: up to {length},"
        ):
            run(verb, llama(length - 1), files, instruction_set)
