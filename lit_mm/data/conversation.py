"""Record -> token ids and targets, by the LLM's own chat template.

The template is rendered once with a stand-in for every answer. What the rendering puts between the
stand-ins is prompt, what replaces them is answer: targets are known by construction, for any
template, and a prompt at generation has the same ids as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_mm.data.records import MARKER, Record, RecordError, Turn
from lit_mm.model.rows import IGNORED, IMAGE

STAND_IN = "\ue000"
"""A private-use character that stands for an answer while the template is rendered."""


class Conversation:
    """Encodes records and questions with one tokenizer.

    Args:
        tokenizer: With its chat template set.

    Raises:
        ValueError: The template does not end an answer with a special token, or alters answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[0]
        self._prepends_space = first.startswith("▁")
        self._special = {*tokenizer.all_special_tokens}
        self._special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._encode = lru_cache(maxsize=65536)(self._encode_text)
        self.end_id = self._end_id()

    def encode(self, record: Record) -> tuple[Tensor, Tensor]:
        """Token ids [T], IMAGE once for each image, and targets [T]: answers with their end token.

        Raises:
            RecordError: The text holds a special token, or the template drops a turn.
        """
        ids: list[int] = []
        targets: list[int] = []
        answers = [turn.text for turn in record.turns if turn.role == "assistant"]
        pieces = self._prompts(record.where, record.turns)
        for prompt, answer in zip(pieces, answers, strict=False):
            prompt_ids = self.ids(prompt.removesuffix(" "), first=not ids)
            answer_ids = self.ids(" " + answer if prompt.endswith(" ") else answer)
            # A later prompt opens with the end token of the answer before it, which is a target.
            if ids and prompt_ids[0] != self.end_id:
                raise RecordError(record.where, "chat template", f"expected the end token first in {prompt!r}")
            targets += [self.end_id] * bool(ids) + [IGNORED] * (len(prompt_ids) - bool(ids)) + answer_ids
            ids += prompt_ids + answer_ids
        return torch.tensor([*ids, self.end_id]), torch.tensor([*targets, self.end_id])

    def prompt(self, text: str, where: str = "question") -> Tensor:
        """Token ids [T] of one question up to where the answer begins."""
        prompt = self._prompts(where, [Turn("user", text), Turn("assistant", "")])[0]
        return torch.tensor(self.ids(prompt.removesuffix(" "), first=True))

    def ids(self, text: str, first: bool = False) -> list[int]:
        """Ids of a piece of rendered text, IMAGE for each marker; `first` if nothing stands before it."""
        ids: list[int] = []
        for number, chunk in enumerate(text.split(MARKER)):
            ids += [IMAGE] if number else []
            ids += self._encode(chunk, first and not number)
        return ids

    def _encode_text(self, text: str, first: bool) -> list[int]:
        # SentencePiece-like tokenizers put a space before any text they get: in the middle of a
        # sequence it stands for the space that is there already.
        if self._prepends_space and not first:
            text = text.removeprefix(" ")
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def _prompts(self, where: str, turns: Sequence[Turn]) -> list[str]:
        pieces = self._render(turns, where).split(STAND_IN)
        expected = sum(turn.role == "assistant" for turn in turns) + 1
        if len(pieces) != expected:
            raise RecordError(where, "chat template", f"rendered {len(pieces) - 1} answers, expected {expected - 1}")
        return pieces

    def _render(self, turns: Sequence[Turn], where: str) -> str:
        for number, turn in enumerate(turns):
            if found := [token for token in (STAND_IN, *self._special) if token in turn.text]:
                detail = f"conversations[{number}].value holds {found[0]!r}, which would steer the model, not inform it"
                raise RecordError(where, "reserved text", detail)
        messages = [
            {"role": turn.role, "content": STAND_IN if turn.role == "assistant" else turn.text} for turn in turns
        ]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_encode"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._encode = lru_cache(maxsize=65536)(self._encode_text)

    def _end_id(self) -> int:
        *_, after = self._prompts("chat template", [Turn("user", "a"), Turn("assistant", "b")])
        ids = self._encode_text(after, first=False)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        if not ids or ids[0] not in special:
            raise ValueError(f"the chat template ends an answer with {after!r}, expected a special token first")
        return ids[0]
