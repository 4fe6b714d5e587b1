"""OpenAI's chat completions: what a request may say, and what the answers look like.

A field that would change the answer and is not supported is refused by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lit_mm.data.records import MARKERS, Kind
from lit_mm.inference.answering import Answer, Ask, Model, Prompt
from lit_mm.inference.batching import Piece
from lit_mm.inference.generation import settled
from lit_mm.model.scales import Scale

IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"}
IGNORED |= {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "include_obfuscation"}
"""Fields that do not change the answer."""
NEUTRAL: dict[str, Sequence[Any]] = {"n": [1], "frequency_penalty": [0], "presence_penalty": [0], "top_logprobs": [0]}
NEUTRAL |= {"response_format": [{"type": "text"}], "modalities": [["text"]], "tool_choice": ["none", "auto"]}
"""Unsupported fields, and the values that are accepted because they change nothing."""
MOST_STOPS = 16


class RefusedError(ValueError):
    """A request that is not answered.

    Args:
        message: What was found and what was expected.
        param: The field.
        code: OpenAI's word for it.
        status: HTTP status.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        # JSON can hold lone surrogates, which a reply in UTF-8 cannot
        self.message = message.encode("utf-8", "backslashreplace").decode()
        self.param, self.code, self.status = param, code, status

    def body(self) -> dict[str, Any]:
        """In OpenAI's format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """A JSON object that refuses fields it does not know, unless they are empty or allowed by IGNORED or NEUTRAL."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _only_known(self) -> Strict:
        for name, value in (self.model_extra or {}).items():
            if value not in (None, [], {}) and name not in IGNORED and value not in NEUTRAL.get(name, []):
                raise PydanticCustomError(
                    "unsupported", "{value} is not supported", {"name": name, "value": short(value)}
                )
        return self


def short(value: Any) -> str:
    """A value as text of a bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold lone surrogates, which are not characters
        raise PydanticCustomError("not_unicode", "expected Unicode text, found a lone surrogate") from None
    return text


class Text(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Annotated[StrictStr, AfterValidator(_unicode)]


class ImageURL(Strict):
    """Where an image is, and whether it is shown at the finest scale (high), at the coarsest (low), or at the one that
    the model's chooser chooses (auto; the finest if there is none)."""

    url: StrictStr
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """A part of a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class VideoURL(Strict):
    """Where a video is."""

    url: StrictStr


class VideoPart(Strict):
    """A part of a message."""

    type: Literal["video_url"]
    video_url: VideoURL


def _in_parts(content: Any) -> Any:
    if not isinstance(content, str | list):
        raise _other("a text or a list of parts", content)
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _scale(name: Any) -> Any:
    if isinstance(name, bool) or not isinstance(name, int | str | None):
        raise _other("a number of tokens, a scale such as '8x16', 'all' or 'auto'", name)
    return name


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        raise _other("a text that is not empty, or a list of those", stop)
    if len(stops) > MOST_STOPS:
        raise _other(f"at most {MOST_STOPS} texts", len(stops))
    return stops


def _other(expected: str, found: Any) -> PydanticCustomError:
    return PydanticCustomError(
        "other", "expected {expected}, found {found}", {"expected": expected, "found": short(found)}
    )


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        list[Annotated[Text | ImagePart | VideoPart, Field(discriminator="type")]], BeforeValidator(_in_parts)
    ]


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class ProcessorOptions(Strict):
    """vLLM's place for how images are shown: the scale, such as 36 or 8x16, all for one answer at each scale, or auto
    for the one that the model's chooser chooses."""

    num_visual_tokens: Annotated[int | str | None, BeforeValidator(_scale)] = None


class ChatRequest(Strict):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    model: StrictStr | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: StrictInt | None = Field(None, ge=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[list[str], BeforeValidator(_stops)] = []
    seed: StrictInt | None = None
    logprobs: bool | None = False
    mm_processor_kwargs: ProcessorOptions | None = None

    def settings(self) -> dict[str, Any]:
        """Settings of decoding.

        Raises:
            RefusedError: Two lengths, or options of a stream without a stream.
        """
        if self.stream_options and not self.stream:
            raise RefusedError("stream_options: expected stream to be true", "stream_options")
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise RefusedError("expected one of max_tokens and max_completion_tokens, found both", "max_tokens")
        found = {"temperature": self.temperature, "top_p": self.top_p, "stop_strings": self.stop}
        found["max_new_tokens"] = next(iter(lengths), None)
        return {name: value for name, value in found.items() if value not in (None, [])}

    def scale(self, chooses: bool = False) -> int | str | None:
        """What names the scale, as `Model.scales_of` takes it, or "auto"; None for the finest; "low" for the coarsest.

        Args:
            chooses: Whether the model has a chooser, so that it decides where an image says detail auto.

        Raises:
            RefusedError: Two fields name different scales.
        """
        chosen = self.mm_processor_kwargs.num_visual_tokens if self.mm_processor_kwargs else None
        parts = [part for message in self.messages for part in message.content]
        urls = [part.image_url for part in parts if isinstance(part, ImagePart)]
        details = {url.detail for url in urls} - {"auto"}
        if len(details) + (chosen is not None) > 1:
            given = [f"detail {detail}" for detail in sorted(details)] + [f"num_visual_tokens {chosen}"] * (
                chosen is not None
            )
            raise RefusedError(f"expected one scale for all images, found {' and '.join(given)}", "mm_processor_kwargs")
        if chooses and not details and any("detail" in url.model_fields_set for url in urls):
            return "auto" if chosen is None else chosen
        return "low" if details == {"low"} else chosen


def ask_of(request: ChatRequest, read: Callable[[str, str, str], bytes], max_images: int) -> Ask:
    """The question, its history and its images.

    Args:
        request: The messages.
        read: Opens a URL: called with it, with image or video, and with the field's name.
        max_images: The most images and videos.

    Raises:
        RefusedError: Roles in another order, a missing question, too many images.
    """
    messages = request.messages
    system = _joined(messages[0], "messages[0]", []) if messages[0].role == "system" else None
    first = int(system is not None)
    for number, message in enumerate(messages[first:], first):
        expected = "assistant" if (number - first) % 2 else "user"
        if message.role != expected:
            raise RefusedError(
                f"expected {expected}, found {message.role}: roles alternate, from user to user",
                f"messages[{number}].role",
            )
    if len(messages) == first or messages[-1].role != "user":
        raise RefusedError("expected a user message at the end: there is no question", "messages")
    parts: list[tuple[str, str, str]] = []
    turns = [_joined(message, f"messages[{number}]", parts) for number, message in enumerate(messages[first:], first)]
    if len(parts) > max_images:
        raise RefusedError(
            f"{len(parts)} images and videos in a request, the limit is {max_images}", "messages", "too_many_images"
        )
    if not any(isinstance(part, Text) and part.text.strip() for part in messages[-1].content):
        raise RefusedError(
            "expected some text in the last message: there is no question", f"messages[{len(messages) - 1}].content"
        )
    images = [read(*part) for part in parts]
    return Ask(turns[-1], images, turns[:-1], system)


def _joined(message: Message, field: str, found: list[tuple[str, str, str]]) -> str:
    """A message as a text with markers; its images and videos are added to `found`.

    Raises:
        RefusedError: A marker in a text, or an image in a message that is not the user's.
    """
    lines = []
    for number, part in enumerate(message.content):
        where = f"{field}.content[{number}]"
        if isinstance(part, Text):
            if marked := [marker for marker in MARKERS.values() if marker in part.text]:
                raise RefusedError(f"{marked[0]} in a text: send images as parts of type image_url", f"{where}.text")
            lines.append(part.text.strip())
            continue
        if message.role != "user":
            raise RefusedError(f"an image or a video in a message from {message.role}, expected it from user", where)
        kind: Kind = "image" if isinstance(part, ImagePart) else "video"
        url = part.image_url if isinstance(part, ImagePart) else part.video_url
        found.append((url.url, kind, f"{where}.{kind}_url.url"))
        lines.append(MARKERS[kind])
    return "\n".join(lines)


class Reply:
    """Answers in OpenAI's format, with the scale's name, visual tokens and milliseconds beside each.

    Args:
        id: Of the completion.
        name: Of the model.
        model: For the text of single tokens.
        prompt: The question.
        logprobs: Whether each token's log-probability is sent.
        usage: Whether a stream ends with the numbers of tokens.
        stops: Stop strings.
    """

    def __init__(
        self,
        id: str,
        name: str,
        model: Model,
        prompt: Prompt,
        logprobs: bool = False,
        usage: bool = False,
        stops: Sequence[str] = (),
    ) -> None:
        self.head = {"id": id, "created": int(time.time()), "model": name}
        self.model, self.prompt, self.with_logprobs, self.with_usage = model, prompt, logprobs, usage
        self.stops: Sequence[str] = stops
        self.lengths = {scale: model.length(prompt, scale) for scale in prompt.scales}
        self.tried: list[list[Scale]] = [[]] if prompt.chooser else [[scale] for scale in prompt.scales]
        self.told = [Streamed() for _ in self.tried]

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        self.tried = [answer.tried for answer in answers]
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.ids, answer.logprobs),
                "finish_reason": answer.finish,
                **self._figures(number, answer.first_token_seconds, answer.seconds),
            }
            for number, answer in enumerate(answers)
        ]
        usage = self.usage(sum(len(answer.logprobs) for answer in answers))
        return self.head | {"object": "chat.completion", "choices": choices, "usage": usage}

    def chunk(self, piece: Piece) -> dict[str, Any] | None:
        """What a stream says about a piece; None if there is nothing new."""
        told, self.tried[piece.number] = self.told[piece.number], piece.tried
        told.first = told.first or piece.seconds
        text = piece.text if piece.is_all else settled(piece.text, self.stops)
        if len(text) <= told.characters and not piece.is_all:
            return None
        delta = {"content": text[told.characters :]}
        new = slice(told.tokens, piece.tokens)
        choice = {
            "index": piece.number,
            "delta": delta if told.begun else {"role": "assistant", **delta},
            "logprobs": self._logprobs(piece.answer.ids[new], piece.answer.logprobs[new]),
            "finish_reason": piece.answer.finish if piece.is_all else None,
            **self._figures(piece.number, told.first, piece.seconds),
        }
        told.begun, told.characters, told.tokens = True, max(told.characters, len(text)), piece.tokens
        return self._chunk([choice], {"usage": None} if self.with_usage else {})

    def usage_chunk(self) -> dict[str, Any]:
        """The end of a stream that tells its numbers of tokens."""
        return self._chunk([], {"usage": self.usage(sum(told.tokens for told in self.told))})

    def usage(self, made: int) -> dict[str, Any]:
        """Numbers of tokens over all scales, those tried included; those made include end tokens."""
        lengths = [self.lengths[scale] for tried in self.tried for scale in tried]
        prompt, visual = (sum(own[place] for own in lengths) for place in (0, 1))
        details = {"image_tokens": visual, "text_tokens": prompt - visual}
        total = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return total | {"prompt_tokens_details": details}

    def _chunk(self, choices: list[dict[str, Any]], further: dict[str, Any]) -> dict[str, Any]:
        return self.head | {"object": "chat.completion.chunk", "choices": choices} | further

    def _figures(self, number: int, first: float, seconds: float) -> dict[str, Any]:
        times = {"first_token_ms": round(1000 * first, 1), "ms": round(1000 * seconds, 1)}
        tried = self.tried[number]
        visual = sum(self.lengths[scale][1] for scale in tried)
        names = {"tried": [str(scale) for scale in tried]} if self.prompt.chooser else {}
        return {"scale": str(tried[-1]), **names, "visual_tokens": visual, **times}

    def _logprobs(self, ids: Sequence[int], logprobs: Sequence[float]) -> dict[str, Any] | None:
        if not self.with_logprobs:
            return None
        tokens = [self.model.tokenizer.decode([token]) for token in ids]
        told = zip(tokens, logprobs, strict=False)  # the end token is not one of the ids
        return {"content": [{"token": t, "logprob": p, "bytes": None, "top_logprobs": []} for t, p in told]}


@dataclass
class Streamed:
    """What a stream has said of one answer.

    Args:
        begun: Whether it said anything.
        characters: Of its text.
        tokens: Number of them.
        first: Seconds to the first token.
    """

    begun: bool = False
    characters: int = 0
    tokens: int = 0
    first: float = 0.0
