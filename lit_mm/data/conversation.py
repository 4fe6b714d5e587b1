"""Record -> token ids and targets, by the LLM's own chat template.

The template is rendered once with a stand-in for every answer. What the rendering puts between the
stand-ins is prompt, what replaces them is answer: targets are known by construction, for any
template, and a prompt at generation has the same ids as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

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
        self._encode = lru_cache(maxsize=65536)(self._encode_text)
        self.end_id = self._end_id()

    def encode(self, record: Record) -> tuple[Tensor, Tensor]:
        """Token ids [T], IMAGE once for each image, and targets [T]: answers with their end token.

        Raises:
            RecordError: The text holds the stand-in character, or the template drops a turn.
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
        rendered = self._render([Turn("user", text)], where, ask=True)
        return torch.tensor(self.ids(rendered.removesuffix(" "), first=True))

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

    def _render(self, turns: Sequence[Turn], where: str, ask: bool = False) -> str:
        if any(STAND_IN in turn.text for turn in turns):
            raise RecordError(where, "reserved character", f"the text holds {STAND_IN!r}, which stands for answers")
        messages = [
            {"role": turn.role, "content": STAND_IN if turn.role == "assistant" else turn.text} for turn in turns
        ]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))

    def _end_id(self) -> int:
        *_, after = self._prompts("chat template", [Turn("user", "a"), Turn("assistant", "b")])
        ids = self._encode_text(after, first=False)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        if not ids or ids[0] not in special:
            raise ValueError(f"the chat template ends an answer with {after!r}, expected a special token first")
        return ids[0]
