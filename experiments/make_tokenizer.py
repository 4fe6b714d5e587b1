"""Train the quickstart's tokenizer: byte-level BPE on the questions and answers of easy-VQA.

    python experiments/make_tokenizer.py experiments/quickstart_tokenizer

A vocabulary of 512 instead of a pretrained model's 49,152 makes the head of so small a model a
hundred times cheaper. Only the images that train, not those held out for validation, are read.
"""

from __future__ import annotations

import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lit_mm.data.easy_vqa import captions, read_questions, records

END = "<|end|>"


def train(vocabulary: int = 512, held_out: int = 200) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training records' turns."""
    questions = read_questions("train")
    kept = dict(list(questions.items())[: len(questions) - held_out])
    items = records("train", kept) + captions("train", kept)
    turns = [turn["value"] for item in items for turn in item["conversations"]]
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
    train().save_pretrained(sys.argv[1])
