"""Token ids and labels against the authors' own code, and SentencePiece's own ids."""

import json

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from lit_mm.data.chat import Conversation
from lit_mm.data.records import image_first, parse
from lit_mm.data.tokenizer import load_tokenizer
from lit_mm.model.llm import LLM
from tests.helpers.models import tiny_llm
from tests.helpers.tokenizers import FIXTURES, folder_of

AUTHORS = json.loads((FIXTURES / "authors_ids.json").read_text())
"""What LLaVA's preprocess_multimodal with preprocess_v1 or preprocess_plain makes of conversations, run by hand
with the tokenizer of `llama_tokenizer.model` as transformers 4 had it, with `legacy` and without."""


def encoded(case, conversation):
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(case["turns"])]
    shown = {"image": "a.jpg"} if any("<image>" in text for text in case["turns"]) else {}
    return conversation.encode(image_first(parse("set.json, record 0", {"conversations": turns, **shown})))


@pytest.mark.parametrize("case", AUTHORS, ids=[f"{case['case']}, legacy {case['legacy']}" for case in AUTHORS])
def test_ids_and_labels_are_the_authors_own(case, tmp_path):
    source = folder_of(tmp_path / "vicuna", FIXTURES / "llama_tokenizer.model", case["legacy"])
    conversation = Conversation(load_tokenizer(LLM(source, chat_template=case["template"])))
    made = encoded(case, conversation)
    assert made.ids == case["input_ids"]
    assert made.labels == case["labels"]
    end = len(made.ids) - [label != -100 for label in reversed(made.labels)].index(True)
    assert made.ids[end - 1] == conversation.end_id


@pytest.mark.parametrize("legacy", [False, True])
def test_a_prompt_is_the_beginning_of_what_was_trained_on(legacy, tmp_path):
    source = folder_of(tmp_path / "vicuna", FIXTURES / "llama_tokenizer.model", legacy)
    conversation = Conversation(load_tokenizer(LLM(source, chat_template="vicuna_v1")))
    for case in AUTHORS:
        if case["template"] == "vicuna_v1" and case["legacy"] == legacy and len(case["turns"]) == 2:
            asked = case["turns"][0]
            if "<image>" in asked:
                asked = "<image>\n" + asked.replace("<image>", "").strip()
            first = [label != -100 for label in case["labels"]].index(True)
            assert conversation.prompt(asked).ids == case["input_ids"][:first]


def test_a_folder_that_says_nothing_of_legacy_is_as_transformers_4_took_it(tmp_path):
    source = folder_of(tmp_path / "vicuna", FIXTURES / "llama_tokenizer.model", legacy=None)
    conversation = Conversation(load_tokenizer(LLM(source, chat_template="vicuna_v1")))
    for case in AUTHORS:
        if case["template"] == "vicuna_v1" and case["legacy"]:
            assert encoded(case, conversation).ids == case["input_ids"]


def test_one_space_follows_bos():
    """`<s> ▁A ▁chat`, as LLaVA, M3 and ConvLLaVA have it."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(FIXTURES / "llama_tokenizer.model"))
    for case in AUTHORS:
        if case["template"] == "vicuna_v1":
            assert pieces.decode(case["input_ids"][1:20]).startswith("A chat")
            assert pieces.id_to_piece(case["input_ids"][:2]) == ["<s>", "▁A"]


def test_what_a_model_without_bytes_does_not_know_is_unk(tmp_path):
    (tmp_path / "corpus.txt").write_text("a b c\nabc cab bca\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "made"),
        vocab_size=12,
        model_type="bpe",
        minloglevel=2,
    )
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made.model")).encode("a 日 b")
    tokenizer = load_tokenizer(LLM(folder_of(tmp_path / "llm", tmp_path / "made.model"), chat_template="vicuna_v1"))
    assert tokenizer.unk_token_id in expected
    assert tokenizer.encode("a 日 b", add_special_tokens=False) == expected


SPACED = [
    "x  y",
    "a   b",
    " lead",
    "  two",
    "a\n\n  b",
    "def f(x):\n    return x\n        y",
    "  ",
    "a b  c   d    e     f",
]


def test_runs_of_spaces_are_those_of_sentencepiece(tmp_path):
    """A model trained here; runs of spaces score lowest, as in Llama's."""
    (tmp_path / "corpus.txt").write_text("\n".join([*SPACED, "what is it? a red circle, return x", "abcdefg xyz"] * 9))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "made"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "made.model").read_bytes())
    runs = [piece for piece in model.pieces if len(piece.piece) > 1 and set(piece.piece) == {"▁"}]
    assert runs
    for piece in runs:
        piece.score = -1e6 - len(piece.piece)
    (tmp_path / "made.model").write_bytes(model.SerializeToString())
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "made.model"))
    tokenizer = load_tokenizer(LLM(folder_of(tmp_path / "llm", tmp_path / "made.model"), chat_template="vicuna_v1"))
    conversation = Conversation(tokenizer)
    for text in SPACED:
        assert conversation._encode_text(text, starts=True) == expected.encode(text), text


def test_plain_takes_captions_alone(tmp_path):
    source = folder_of(tmp_path / "llm", FIXTURES / "llama_tokenizer.model")
    conversation = Conversation(load_tokenizer(LLM(source, chat_template="plain")))
    for turns in (["What?", "A circle."], ["<image>\na?", "b", "c?", "d"]):
        with pytest.raises(ValueError, match="expected an image in the question"):
            encoded({"turns": turns}, conversation)


def test_an_image_marker_that_is_a_special_token_is_an_image_all_the_same(tokenizer):
    """As in the tokenizers of Hugging Face's LLaVA models."""
    ids = Conversation(tokenizer).prompt("<image>\nwhat?").ids
    known = load_tokenizer(tiny_llm())
    known.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert Conversation(known).prompt("<image>\nwhat?").ids == ids
