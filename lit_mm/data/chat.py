"""Record -> token ids and labels, with the LLM's own chat template.

The template is rendered once with a placeholder for every answer. The text between placeholders is prompt
and what replaces them is answer, so labels are right by construction for any template, and a prompt gets
the same ids in generation as in training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_mm.data.records import MARKERS, Record, RecordError
from lit_mm.data.tokenizer import IN_CHUNKS, TEMPLATES
from lit_mm.model.batch import IGNORE_INDEX, IMAGE
from lit_mm.model.scales import coarsest_time_scale

STAND_IN = "\ue000"
"""The placeholder: a private-use character."""
OFTEN = 64
"""Ids of texts up to this many characters are cached."""
Frames = Sequence[str]
"""One image or video in the text: the text before each of its frames, usually empty."""


@dataclass
class Encoded:
    """Text as token ids.

    Args:
        ids: [T], with IMAGE once for each frame.
        time_scale: [T] index of the coarsest time scale that still includes the position. Coarser time scales
            drop the later frames of a set and the text before them.
        labels: [T], IGNORE_INDEX for positions that are not supervised.
    """

    ids: list[int] = field(default_factory=list)
    time_scale: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, other: Encoded, labels: Sequence[int]) -> None:
        """Append a piece with its labels."""
        self.ids += other.ids
        self.time_scale += other.time_scale
        self.labels += labels

    def tensors(self, timed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, labels and, if `timed`, time_scale."""
        return torch.tensor(self.ids), torch.tensor(self.labels), torch.tensor(self.time_scale) if timed else None


class Conversation:
    """Encodes records and questions with one tokenizer.

    Args:
        tokenizer: The tokenizer, with its chat template set.
        time_scales: Sets of frames per video, finest first, if any.

    Raises:
        ValueError: The template does not end an answer with a special token, or changes answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, time_scales: Sequence[int] = ()) -> None:
        self.tokenizer, self.time_scales = tokenizer, list(time_scales)
        plain, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a"))
        self._prepends_space = tokenizer.convert_ids_to_tokens(plain)[0].startswith("▁")
        self._doubles_space = plain != spaced  # otherwise a text that begins with a space gets no second one
        self._in_chunks = tokenizer.chat_template in IN_CHUNKS
        self._special = {*tokenizer.all_special_tokens}
        self._special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special -= {*MARKERS.values()}  # markers never reach the tokenizer
        self._often = lru_cache(maxsize=4096)(self._encode_text)
        self.end_id = self._end_id()

    def encode(self, record: Record, media: Sequence[Frames] | None = None) -> Encoded:
        """Token ids with IMAGE once for each frame; labels are the answers with their end tokens.

        Args:
            record: The record to encode.
            media: Its images and videos, in order; None: all are still images.

        Raises:
            RecordError: The text contains a special token, or the template fails or drops a turn.
        """
        shown = iter([[""]] * len(record.media) if media is None else media)
        made = self._dialog(record.where, record.turns, record.system, shown)
        made.add(Encoded([self.end_id], [self._always]), [self.end_id])
        return made

    def prompt(
        self,
        text: str,
        where: str = "question",
        media: Sequence[Frames] | None = None,
        system: str | None = None,
        history: Sequence[str] = (),
    ) -> Encoded:
        """Token ids of a question up to where its answer begins.

        Args:
            text: The question, with a marker for each of its images and videos.
            where: What errors call it.
            media: Images and videos of history and question, in order; None: all of them are still images.
            system: The system message.
            history: Earlier questions and answers in turn.

        Raises:
            RecordError: As `encode`.
        """
        turns = [*history, text]
        markers = sum(turn.count(marker) for turn in turns for marker in MARKERS.values())
        return self._dialog(where, turns, system, iter([[""]] * markers if media is None else media))

    def _dialog(self, where: str, turns: Sequence[str], system: str | None, shown: Iterator[Frames]) -> Encoded:
        """Questions and answers in turn; a last question without its answer ends where the answer begins."""
        made = Encoded()
        prompts = self._prompts(where, turns if len(turns) % 2 == 0 else [*turns, ""], system)
        for text, number in zip(prompts, range(0, len(turns), 2), strict=False):
            prompt = self._pieces(text.removesuffix(" "), shown, first=not made.ids)
            # A later prompt opens with the end token of the answer before it, which is a label.
            if made.ids and prompt.ids[0] != self.end_id:
                raise RecordError(where, "chat template", f"expected the end token first in {text!r}")
            end = [self.end_id] * bool(made.ids)
            made.add(prompt, end + [IGNORE_INDEX] * (len(prompt.ids) - len(end)))
            for answer in turns[number + 1 : number + 2]:
                reply = self._pieces(" " + answer if text.endswith(" ") else answer, shown)
                made.add(reply, reply.ids)
        return made

    @property
    def _always(self) -> int:
        return len(self.time_scales) - 1

    def _pieces(self, text: str, media: Iterator[Frames], first: bool = False) -> Encoded:
        """Encode a piece of rendered text; `first` if it is the beginning of the conversation."""
        made = Encoded()
        for number, chunk in enumerate(re.split("|".join(MARKERS.values()), text)):
            if number:
                self._add_frames(made, next(media), first and not made.ids)
            starts = (first and not made.ids) or (number > 0 and self._in_chunks)
            self._add(made, self._encode(chunk, starts), self._always)
        return made

    def _add_frames(self, made: Encoded, frames: Frames, first: bool) -> None:
        for before, time in zip(frames, coarsest_time_scale(len(frames), self.time_scales), strict=True):
            self._add(made, [*self._encode(before, first and not made.ids), IMAGE], time)

    def _add(self, made: Encoded, ids: list[int], time: int) -> None:
        made.add(Encoded(ids, [time] * len(ids)), [])

    def _encode(self, text: str, starts: bool) -> list[int]:
        # short answers and the template's own text repeat, long texts rarely do
        return self._often(text, starts) if len(text) <= OFTEN else self._encode_text(text, starts)

    def _encode_text(self, text: str, starts: bool) -> list[int]:
        """Ids of a piece of text. A SentencePiece tokenizer prepends a space, which is right only if the piece
        `starts` a text; otherwise the piece's own first space takes its place."""
        bos = self.tokenizer.bos_token
        if starts and self._in_chunks and bos and text.startswith(bos):
            # separately, as transformers prepends no space after a special token
            return [self.tokenizer.bos_token_id, *self._encode_text(text.removeprefix(bos), starts)]
        if self._prepends_space and not starts:
            text = text.removeprefix(" ") if self._doubles_space else text
        elif self._prepends_space and self._in_chunks and not self._doubles_space and text.startswith(" "):
            text = f" {text}"
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def _prompts(self, where: str, turns: Sequence[str], system: str | None = None) -> list[str]:
        """The template's text around the answers: before the first, between two, after the last."""
        texts = {f"turn {number}": text for number, text in enumerate(turns)} | {"system": system or ""}
        for name, text in texts.items():
            if found := [token for token in (STAND_IN, *self._special) if token in text]:
                detail = f"{name} contains {found[0]!r}, which the model would read as a control token"
                raise RecordError(where, "reserved text", detail)
        messages = [{"role": "system", "content": system}] if system else []
        for number, text in enumerate(turns):
            role, content = ("assistant", STAND_IN) if number % 2 else ("user", text)
            messages.append({"role": role, "content": content})
        try:
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        except Exception as error:  # a template can raise any error, not only Jinja's
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            detail = f"{kind}{error} (in the template of {self.tokenizer.name_or_path or 'the tokenizer'})"
            raise RecordError(where, "chat template", detail) from None
        if system and system not in text:
            raise RecordError(where, "chat template", "it leaves the system message out")
        pieces = text.split(STAND_IN)
        expected = len(turns) // 2
        if len(pieces) != expected + 1:
            raise RecordError(where, "chat template", f"rendered {len(pieces) - 1} answers, expected {expected}")
        return pieces

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_often"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._often = lru_cache(maxsize=4096)(self._encode_text)

    def _end_id(self) -> int:
        asked = "".join(MARKERS.values()) if self._in_chunks else "a"
        *_, after = self._prompts(self.tokenizer.name_or_path or "the tokenizer", [asked, "b"])
        if self.tokenizer.chat_template == TEMPLATES["plain"]:  # ends captions with a newline, not a special token
            return self._encode_text("a\n", starts=True)[-1]
        ids = self._encode_text(after, starts=False)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        if not ids or ids[0] not in special:
            raise ValueError(f"the chat template ends an answer with {after!r}, expected a special token first")
        return ids[0]
