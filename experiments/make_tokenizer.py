"""Train a demo's tokenizer: byte-level BPE on the questions and answers that it trains on.

    python experiments/make_tokenizer.py easy_vqa experiments/quickstart_tokenizer
    python experiments/make_tokenizer.py clips experiments/video_quickstart_tokenizer

A vocabulary of 512 instead of a pretrained model's 49,152 makes the head of so small a model a
hundred times cheaper. Only what trains, not what is held out for validation, is read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_mm.data import clips, easy_vqa

END = "<|end|>"


def easy_vqa_records(held_out: int = 200) -> list[dict[str, Any]]:
    """Conversations and captions of the images that train."""
    questions = easy_vqa.read_questions("train")
    kept = dict(list(questions.items())[: len(questions) - held_out])
    return easy_vqa.records("train", kept) + easy_vqa.captions("train", kept)


def clip_records() -> list[dict[str, Any]]:
    """Conversations about clips and their captions."""
    return clips.records("train", 6000) + clips.captions("train", 6000)


RECORDS: dict[str, Callable[[], list[dict[str, Any]]]] = {"easy_vqa": easy_vqa_records, "clips": clip_records}


def train(source: str = "easy_vqa", vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training records' turns."""
    turns = [turn["value"] for item in RECORDS[source]() for turn in item["conversations"]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f" {turn}" for turn in turns), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


if __name__ == "__main__":
    train(sys.argv[1]).save_pretrained(sys.argv[2])
