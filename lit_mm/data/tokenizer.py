"""Loads the LLM's tokenizer with a chat template, such that its ids equal those of the model's authors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import sentencepiece
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_mm.model.llm import LLM, from_source, is_config_class

TEMPLATES: dict[str, str] = {
    "vicuna_v1": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% else %}"
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions.{% endif %} {% for message in messages %}"
        "{% if message['role'] == 'user' %}USER: {{ message['content'] }} "
        "{% elif message['role'] == 'assistant' %}ASSISTANT: {{ message['content'] }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    ),
    "plain": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] }}\n"
        "{% elif '<image>' in message['content'] %}<image>{% elif '<video>' in message['content'] %}<video>"
        "{% else %}{{ raise_exception('plain is for captions: expected an image in the question') }}"
        "{% endif %}{% endfor %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "bare": (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    ),
}
"""Named chat templates (Jinja, as in transformers). vicuna_v1 and plain are LLaVA's; bare is the
plain conversation, with the tokenizer's end token after each answer."""
IN_CHUNKS = (TEMPLATES["vicuna_v1"], TEMPLATES["plain"])
"""Templates whose authors encode each piece of text between images separately (LLaVA's
`tokenizer_image_token`); all others are encoded as transformers does it."""


def load_tokenizer(llm: LLM) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the chat template set.

    Raises:
        ValueError: A random model has no tokenizer set, or the template is `own` but the tokenizer has none.
        FileNotFoundError: A folder, GGUF file or package does not exist.
    """
    if llm.tokenizer is None and is_config_class(llm.name_or_path):
        raise ValueError(f"llm.name_or_path {llm.name_or_path} is a random model: set llm.tokenizer too")
    tokenizer = from_source(AutoTokenizer, llm.tokenizer or llm.name_or_path)
    if file := model_file(tokenizer):
        config = file.with_name("tokenizer_config.json")
        if not config.is_file() or "legacy" not in json.loads(config.read_text(encoding="utf-8")):
            # these folders come from transformers 4, where True was the default
            tokenizer = from_source(AutoTokenizer, llm.tokenizer or llm.name_or_path, legacy=True)
        rank_merges(tokenizer)
    if llm.chat_template != "own":
        tokenizer.chat_template = TEMPLATES[llm.chat_template]
    if not tokenizer.chat_template:
        named = ", ".join(TEMPLATES)
        raise ValueError(
            f"{llm.tokenizer or llm.name_or_path} has no chat template of its own: "
            f"set llm.chat_template to one of {named}"
        )
    return tokenizer


def model_file(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """The `tokenizer.model` that a tokenizer was converted from, if there was no `tokenizer.json`."""
    file = Path(str(tokenizer.init_kwargs.get("vocab_file")))
    is_bpe = isinstance(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), models.BPE)
    alone = file.suffix == ".model" and file.is_file() and not file.with_name("tokenizer.json").is_file()
    return file if is_bpe and alone else None


def rank_merges(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer converted from a `tokenizer.model` the merges in SentencePiece's order.

    transformers 5 ranks merges by the resulting id, which merges runs of spaces first: "x  y" becomes
    `▁x ▁▁ y`, while SentencePiece ranks by the pieces' scores and gives `▁x ▁ ▁y`.
    """
    file, backend = model_file(tokenizer), cast(Any, tokenizer).backend_tokenizer
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    scores = {pieces.id_to_piece(number): pieces.get_score(number) for number in range(len(pieces))}
    ids = {piece: number for number, piece in enumerate(scores)}
    merges = sorted(
        (-score, ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    )
    vocabulary = backend.get_vocab(with_added_tokens=False)
    backend.model = models.BPE(
        vocabulary,
        [(left, right) for *_, left, right in merges],
        unk_token=str(tokenizer.unk_token),
        fuse_unk=True,
        byte_fallback="<0x00>" in ids,
    )
