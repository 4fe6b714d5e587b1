"""A trained model that answers questions about images and videos: `lit_mm.load(…).answer("photo.jpg", "…")`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lit_mm.data.chat import Conversation
from lit_mm.data.collate import Sample, Visual, collate
from lit_mm.data.media import MediaFolder
from lit_mm.data.pixels import ImageOptions
from lit_mm.data.records import (
    MARKERS,
    Media,
    Record,
    RecordError,
    checked_text,
    image_first,
    marked_kinds,
    refuse_markers,
)
from lit_mm.data.video import VideoOptions
from lit_mm.inference.choosers import Chooser
from lit_mm.inference.decoding import Decoding, settings
from lit_mm.inference.generation import Asked, Generated, Past, generate_each
from lit_mm.inference.memory import Memory
from lit_mm.inference.pictures import Picture, listed, media_of
from lit_mm.inference.prompts import prompt_length
from lit_mm.inference.scoring import score
from lit_mm.model.batch import Images, Question
from lit_mm.model.llm import positions_of
from lit_mm.model.scales import Scale, nested_shapes
from lit_mm.model.vlm import MatryoshkaVLM

Tokens = int | str | Scale | list[int | str | Scale] | Chooser | None
"""What names scales; see `Model.answer`."""


@dataclass
class Ask:
    """One question.

    Args:
        question: Its text. `<image>` and `<video>` mark where images and videos stand; without markers they
            stand in front.
        images: Images and videos of the history and of the question, in order.
        history: Earlier questions and answers in turn.
        system: System message.
    """

    question: str
    images: Picture | Sequence[Picture] = ()
    history: Sequence[str] = ()
    system: str | None = None


@dataclass
class Prompt:
    """A question that is ready to be answered.

    Args:
        sample: Its images in pixels and its text in ids.
        scales: Where it is answered, or with a chooser, may be.
        seed: Of sampling.
        chooser: Chooses one of the scales; None: it is answered at all of them.
    """

    sample: Sample
    scales: list[Scale]
    seed: int = 0
    chooser: Chooser | None = None

    @property
    def num_answers(self) -> int:
        """How many answers are made at once: one for each scale, or one that a chooser chooses."""
        return 1 if self.chooser else len(self.scales)


@dataclass
class Answer:
    """One answer.

    Args:
        text: The answer.
        scale: The scale at which it was given.
        visual_tokens: Visual tokens in its prompt, and in the prompts of the scales tried before.
        ids: Its token ids, without the end token.
        logprobs: Log-probability of each id, and of the end token if there is one.
        margin: Log-probability of the likeliest first token minus that of the second likeliest.
        finish: `stop` at an end token or stop string, `length` at max_new_tokens, `dropped` or `error`.
        first_token_seconds: From the call to the first token, encoding included.
        seconds: From the call to the last token. Both times include the scales tried before.
        tried: The scales at which the question was answered, this one last.
        router: See `Generated.router`.
    """

    text: str
    scale: Scale
    visual_tokens: int
    ids: list[int]
    logprobs: list[float]
    margin: float
    finish: Literal["stop", "length", "dropped", "error"]
    first_token_seconds: float
    seconds: float
    tried: list[Scale]
    router: dict[Scale, float] = field(default_factory=dict)

    @property
    def logprob(self) -> float:
        """Log-probability of the whole answer."""
        return sum(self.logprobs)

    def __str__(self) -> str:
        return self.text


class Model:
    """A trained model with its tokenizer and the way it takes images.

    Args:
        vlm: In evaluation mode, on its device.
        tokenizer: With its chat template set.
        image: How images are brought to size.
        video: Which frames of a video are shown; None: videos are refused.
        frame: How frames are brought to size; None: as images.
        image_first: Whether the marker of an only image goes before its turn's text.
        max_new_tokens: The longest answer, unless a call says otherwise.
        decoding: greedy, or own for the settings of the LLM's generation_config.
        chooser: Chooses the scale where a call says tokens="auto"; None: such calls are refused.
        trained_scales: The scales that it was trained at; None: all that it answers at.
    """

    def __init__(
        self,
        vlm: MatryoshkaVLM,
        tokenizer: PreTrainedTokenizerBase,
        image: ImageOptions,
        video: VideoOptions | None = None,
        frame: ImageOptions | None = None,
        image_first: bool = False,
        max_new_tokens: int = 64,
        decoding: Decoding = "greedy",
        chooser: Chooser | None = None,
        trained_scales: Sequence[Scale] | None = None,
    ) -> None:
        self.vlm, self.tokenizer, self.image_first = vlm.eval(), tokenizer, image_first
        self.max_new_tokens, self.decoding, self.chooser = max_new_tokens, decoding, chooser
        self.conversation = Conversation(tokenizer, vlm.time_scales)
        red, green, blue = (int(255 * value) for value in vlm.encoder.mean)
        self.media = MediaFolder(Path(), image, (red, green, blue), video, frame)
        self.trained_scales = self.scales if trained_scales is None else list(trained_scales)

    @property
    def scales(self) -> list[Scale]:
        """What the model answers at, finest first."""
        return self.vlm.all_scales

    def scales_of(self, tokens: Tokens) -> list[Scale]:
        """The scales that `tokens` names.

        Raises:
            ValueError: It names none; the message lists those that there are.
        """
        known = {str(scale): scale for scale in self.scales}
        if isinstance(tokens, list) and tokens:
            return list(dict.fromkeys(scale for each in tokens for scale in self.scales_of(each)))
        if tokens is None:
            return self.scales[:1]
        if tokens == "all":
            return self.scales
        if str(tokens) not in known:
            raise ValueError(f"tokens {tokens}: expected all or one of the model's scales {', '.join(known)}")
        return [known[str(tokens)]]

    def chooser_of(self, tokens: Any) -> Chooser | None:
        """The chooser that `tokens` is, or that "auto" names; None: it names scales.

        Raises:
            ValueError: "auto", and the model has none.
        """
        if tokens == "auto" and self.chooser is None:
            raise ValueError("tokens auto: this model has no chooser, `python -m lit_mm calibrate RUN` makes one")
        return self.chooser if tokens == "auto" else tokens if isinstance(tokens, Chooser) else None

    def answer(
        self,
        images: Picture | Sequence[Picture] | None,
        question: str,
        tokens: Tokens = None,
        history: Sequence[str] = (),
        system: str | None = None,
        **options: Any,
    ) -> Any:
        """Answer one question.

        Args:
            images: An image or a video, or several; None for a question about text.
            question: See `Ask`.
            tokens: The scale: 36, or "8x16" for a model with time scales; "all" answers at every scale in one
                batch, and a list at each of its scales; "auto" lets the model's chooser decide, or give another
                chooser; None is the finest.
            history: Earlier questions and answers in turn.
            system: System message.
            options: seed, and settings of `decoding.settings`: max_new_tokens, temperature, num_beams, ….

        Returns:
            An `Answer`; for "all" or a list a dict with one for each scale, by its name.

        Raises:
            ValueError: No such scale or setting, a prompt and an answer that are longer than the LLM's positions, or
                logits that are not finite.
            RecordError: Texts that are empty or not Unicode, images that cannot be read, or that do not match the
                question's markers.
        """
        shown = listed(images)
        [answers] = self.answers([Ask(question, shown, history, system)], tokens, **options)
        if broken := [answer for answer in answers.values() if answer.finish == "error"]:
            raise ValueError(f"the model's logits at scale {broken[0].scale} are not finite")
        return answers if tokens == "all" or isinstance(tokens, list) else next(iter(answers.values()))

    def answers(
        self,
        asks: Sequence[Ask],
        tokens: Tokens = None,
        seed: int = 0,
        emit: Callable[[int, Scale, Generated, bool], bool | None] | None = None,
        memory: Memory | None = None,
        **options: Any,
    ) -> list[dict[str, Answer]]:
        """Answer many questions in one batch; equal images are encoded once.

        Args:
            asks: The questions.
            tokens: As for `answer`; every question is answered at each scale.
            seed: Of sampling.
            emit: Called after every token with the question's number, the scale, the answer so far, and whether
                that is all. Returning False drops this answer. As long as a chooser may replace an answer by one at
                another scale, an empty answer is passed.
            memory: What a conversation keeps between its questions; only for one question, at one scale or with a
                chooser.
            options: As for `answer`.

        Returns:
            For each question its answers by the name of the scale.
        """
        start = time.perf_counter()
        chosen = self.chooser_of(tokens) or self.scales_of(tokens)
        prompts = [self.prompt(ask, chosen, seed, f"question {number}", memory) for number, ask in enumerate(asks, 1)]
        return self.answers_to(prompts, emit, start, memory, **options)

    def prompt(
        self,
        ask: Ask,
        scales: Sequence[Scale] | Chooser | None = None,
        seed: int = 0,
        where: str = "question 1",
        memory: Memory | None = None,
    ) -> Prompt:
        """Make a question ready to be answered: decode its images, encode its text.

        Args:
            ask: The question.
            scales: Where it will be answered, or what chooses; None: at the finest scale.
            seed: Of sampling.
            where: What errors call it.
            memory: As for `answers`.

        Raises:
            RecordError: An empty question, a history without all answers, images that cannot be read, that the scales
                do not fit, or that do not match the question's markers.
        """
        sample = self._sample(self._record(ask, where), memory)
        for number, visual in enumerate(sample.visuals, 1):
            height, width = visual.pixels.shape[-2:]
            try:
                self.grids(height, width)
            except ValueError as error:
                detail = f"image {number} of {height}×{width} pixels (height × width): {error}"
                raise RecordError(where, "scales", detail) from None
        if isinstance(scales, Chooser):
            if unknown := [scale for scale in scales.scales if scale not in self.scales]:
                known = ", ".join(map(str, self.scales))
                raise ValueError(f"the chooser tries scale {unknown[0]!r}: expected some of the model's {known}")
            return Prompt(sample, list(scales.scales), seed, scales)
        return Prompt(sample, list(scales or self.scales[:1]), seed)

    def length(self, prompt: Prompt, scale: Scale) -> tuple[int, int]:
        """Tokens of a prompt at a scale, and how many of them are visual tokens."""
        return prompt_length(self.vlm, prompt.sample.questions[0], scale)

    def check_length(self, prompt: int, answer: int) -> None:
        """Check that the LLM has enough positions for so many tokens of a prompt and of its answer.

        Raises:
            ValueError: It has fewer.
        """
        known = positions_of(self.vlm.llm.config)
        if known and prompt + answer > known.most:
            sizes = f"{prompt} tokens of the prompt and {answer} of the answer"
            raise ValueError(f"{sizes}: the LLM has {known.most} positions")

    def grids(self, height: int, width: int) -> dict[str, tuple[int, int]]:
        """Rows and columns of the visual tokens of an image of height × width pixels, by the name of the scale.

        Raises:
            ValueError: One of the scales does not fit.
        """
        projector, grid = self.vlm.projector, self.vlm.encoder.grid(height, width)
        shapes = nested_shapes(*grid, tuple(projector.scales), projector.sampling, projector.pooling)
        return {str(scale): shapes[number % len(shapes)] for number, scale in enumerate(self.scales)}

    def answers_to(
        self,
        prompts: Sequence[Prompt],
        emit: Callable[[int, Scale, Generated, bool], bool | None] | None = None,
        start: float | None = None,
        memory: Memory | None = None,
        **options: Any,
    ) -> list[dict[str, Answer]]:
        """Answer prompts in one batch, each at its own scales. Those with choosers are answered in rounds, each round
        in one batch, until every chooser accepts its last answer; the images are encoded once.

        Args:
            prompts: As `prompt` makes them.
            emit: As for `answers`.
            start: Where times begin, by `time.perf_counter`; None: now.
            memory: As for `answers`.
            options: As for `answer`.

        Returns:
            For each prompt its answers by the name of the scale.

        Raises:
            ValueError: A setting that is not honored, or a chooser that names a scale twice.
        """
        start = time.perf_counter() if start is None else start
        config = settings(self.vlm.llm, self.decoding, **{"max_new_tokens": self.max_new_tokens, **options})
        for prompt in prompts:
            for scale in prompt.scales:
                self.check_length(self.length(prompt, scale)[0], config.max_new_tokens)
        return Rounds(self, prompts, config, emit, start, memory).run()

    def score(
        self,
        images: Picture | Sequence[Picture] | None,
        question: str,
        answers: Sequence[str],
        tokens: Tokens = "all",
        history: Sequence[str] = (),
        system: str | None = None,
    ) -> dict[str, list[float]]:
        """Log-likelihoods of given answers, their end tokens included, from one run of the LLM.

        Args:
            images: As for `answer`.
            question: As for `answer`.
            answers: Possible answers, such as the options of a multiple choice.
            tokens: As for `answer`.
            history: Earlier questions and answers in turn.
            system: System message.

        Returns:
            For each scale, by its name, the log-likelihood of every answer.

        Raises:
            ValueError: As `answer`.
            RecordError: As `answer`.
        """
        found = self.logprobs(images, question, answers, tokens, history, system)
        return {scale: [float(own.sum()) for own in each] for scale, each in found.items()}

    def logprobs(
        self,
        images: Picture | Sequence[Picture] | None,
        question: str,
        answers: Sequence[str],
        tokens: Tokens = "all",
        history: Sequence[str] = (),
        system: str | None = None,
    ) -> dict[str, list[Tensor]]:
        """Like `score`, but for each answer the log-probabilities [t] of its tokens, the end token last."""
        scales, record = self.scales_of(tokens), self._record(Ask(question, listed(images), history, system))
        sample = self._sample(record)
        shown, questions = self.on_device([sample])
        labels, length = [visual.labels for visual in sample.visuals], len(questions[0].input_ids)
        if isinstance(answers, str):
            raise ValueError(f"score: expected a list of answers, found the text {answers!r:.80}")
        for number, answer in enumerate(answers):
            refuse_markers("score", f"answers[{number}]", answer, "in an answer", "in an answer")
        replies = [replace(record, turns=(*record.turns, answer)) for answer in answers]
        ids = [self.conversation.encode(reply, labels).ids[length:] for reply in replies]
        for scale in scales:
            self.check_length(prompt_length(self.vlm, questions[0], scale)[0], max(map(len, ids), default=0))
        [found] = score(self.vlm, shown, questions, [ids], scales)
        return {str(scale): own for scale, own in zip(scales, found, strict=True)}

    def chat(self, images: Picture | Sequence[Picture] | None = None, system: str | None = None) -> Chat:
        """A conversation, whose earlier turns are part of every further question."""
        return Chat(self, listed(images), system=system)

    def _record(self, ask: Ask, where: str = "question 1") -> Record:
        """A question with its media and with markers where they stand."""
        turns, system = _texts(ask, where)
        media = media_of(listed(ask.images))
        record = Record(where, tuple(media), tuple(_with_markers(turns, media, where)), where, system)
        return image_first(record) if self.image_first else record

    def _sample(self, record: Record, memory: Memory | None = None) -> Sample:
        visuals = self._visuals(record, memory.visuals if memory else {})
        labels = [visual.labels for visual in visuals]
        *history, text = record.turns
        made = self.conversation.prompt(text, record.where, labels, record.system, history)
        ids, _, time_scale = made.tensors(bool(self.vlm.time_scales))
        index = list(range(sum(len(visual.pixels) for visual in visuals)))
        return Sample(visuals, questions=[Question(record.id, text, ids, index, time_scale=time_scale)])

    def _visuals(self, record: Record, known: dict[Hashable, Visual]) -> list[Visual]:
        """The record's images and videos; unknown ones are decoded and become known."""
        keys = [hashlib.blake2b(medium.data or b"", digest_size=16).digest() for medium in record.media]
        new = {key: medium for key, medium in zip(keys, record.media, strict=True) if key not in known}
        made = self.media.visuals(replace(record, media=tuple(new.values())))
        known |= {key: replace(visual, key=key) for key, visual in zip(new, made, strict=True)}
        return [known[key] for key in keys]

    def on_device(self, samples: Sequence[Sample]) -> tuple[Images, list[Question]]:
        """The samples' images, equal ones once, and their questions."""
        batch = collate(samples, self.vlm.time_scales)
        device = next(self.vlm.projector.parameters()).device
        return apply_to_collection((batch.images, batch.questions), Tensor, Tensor.to, device)


class Rounds:
    """Answers prompts: first all of them, then again and again those whose chooser wants another scale.

    Args:
        model: Answers.
        prompts: What is asked.
        config: Of decoding.
        emit: As for `Model.answers`.
        start: Where times begin, by `time.perf_counter`.
        memory: As for `Model.answers`.
    """

    def __init__(
        self,
        model: Model,
        prompts: Sequence[Prompt],
        config: GenerationConfig,
        emit: Callable[[int, Scale, Generated, bool], bool | None] | None,
        start: float,
        memory: Memory | None,
    ) -> None:
        self.model, self.prompts, self.config, self.emit, self.start = model, prompts, config, emit, start
        self.memory = memory
        self.images, self.questions = model.on_device([prompt.sample for prompt in prompts])
        self.answers: list[list[Answer]] = [[] for _ in prompts]
        self.left = set[int]()  # prompts whose chooser goes on before their last answer has ended
        self.past = Past() if len(prompts) == 1 and prompts[0].chooser else None  # of the text before the image

    def run(self) -> list[dict[str, Answer]]:
        """For each prompt its answers by the name of the scale, of those with a chooser the last."""
        nested = self._encoded()
        places = [(number, scale) for number in range(len(self.prompts)) for scale in self._first(number)]
        while places:
            places = self._round(places, nested)
        for prompt, own in zip(self.prompts, self.answers, strict=True):
            if prompt.chooser:
                visual, tried = sum(answer.visual_tokens for answer in own), [answer.scale for answer in own]
                own[:] = [replace(own[-1], visual_tokens=visual, tried=tried, router=own[0].router)]
        return [{str(answer.scale): answer for answer in own} for own in self.answers]

    def _encoded(self) -> Tensor | None:
        """The images' nested tokens; None: they are needed once, and `generate_each` encodes them."""
        if self.memory:
            return self.memory.encoded(self.model.vlm, self.prompts[0].sample.visuals)
        if any(prompt.chooser for prompt in self.prompts):
            with torch.no_grad():
                return self.model.vlm.encode(self.images)
        return None

    def _first(self, number: int) -> Sequence[Scale]:
        prompt = self.prompts[number]
        if prompt.chooser is None:
            return prompt.scales
        if (first := prompt.chooser.next(self.questions[number], [])) is None:
            raise ValueError("the chooser names no scale to begin with")
        return [first]

    def _round(self, places: Sequence[tuple[int, Scale]], nested: Tensor | None) -> list[tuple[int, Scale]]:
        """Answer prompts at scales; return what is to be tried next."""
        asked = [Asked(self.questions[number], scale, self.prompts[number].seed) for number, scale in places]
        times: list[list[float]] = [[] for _ in asked]

        def note(place: int, answer: Generated, is_all: bool) -> bool | None:
            times[place].append(time.perf_counter() - self.start)
            return self._tell(*places[place], answer, is_all)

        model, past = self.model, self.memory.past(asked[0].scale) if self.memory else self.past
        ends = [model.conversation.end_id]
        found = generate_each(
            model.vlm, self.images, asked, self.config, ends, model.tokenizer, nested, note, past=past
        )
        following: list[tuple[int, Scale]] = []
        for (number, scale), made, own in zip(places, found, times, strict=True):
            self.answers[number].append(_answer(made, scale, own))
            further = self._next(number)
            if further is not None:
                following.append((number, further))
            elif self._may_change(number, scale) and self.emit:
                self.emit(number, scale, made, True)
        return following

    def _tell(self, number: int, scale: Scale, answer: Generated, is_all: bool) -> bool | None:
        if not self._may_change(number, scale):
            return self.emit(number, scale, answer, is_all) if self.emit else None
        if self.emit and self.emit(number, scale, Generated(), False) is False:
            return False
        chooser = self.prompts[number].chooser
        if chooser and not is_all and chooser.goes_on(len(self.answers[number]), answer):
            self.left.add(number)
            return False
        return None

    def _may_change(self, number: int, scale: Scale) -> bool:
        """Whether an answer at this scale may be replaced by another one. A question without images is the same
        prompt at every scale."""
        prompt = self.prompts[number]
        return bool(prompt.chooser and prompt.sample.visuals and scale != prompt.scales[-1])

    def _next(self, number: int) -> Scale | None:
        """The scale to try next; None: the last answer is taken.

        Raises:
            ValueError: The chooser names a scale that was tried.
        """
        prompt, answers = self.prompts[number], self.answers[number]
        last = answers[-1]
        given_up = last.finish == "dropped" and number not in self.left
        self.left.discard(number)
        if prompt.chooser is None or given_up or not self._may_change(number, last.scale):
            return None
        scale = prompt.chooser.next(self.questions[number], answers)
        if scale in [answer.scale for answer in answers]:
            raise ValueError(f"the chooser names scale {scale} again: it was tried")
        return scale


@dataclass
class Chat:
    """A conversation about images.

    Args:
        model: Who answers.
        images: Images and videos so far.
        turns: Questions and answers so far.
        system: System message.
        memory: Encoded images, and keys and values, of the turns so far.
    """

    model: Model
    images: list[Picture]
    turns: list[str] = field(default_factory=list)
    system: str | None = None
    memory: Memory = field(default_factory=Memory, repr=False)

    def ask(
        self,
        question: str,
        images: Picture | Sequence[Picture] | None = None,
        tokens: Tokens = None,
        **options: Any,
    ) -> Answer:
        """Answer the next question; `images` are new ones, in front of it unless it marks their places."""
        images = listed(images)
        media = [*([] if self.turns else media_of(self.images)), *media_of(images)]
        if not marked_kinds(question):
            question = "".join(f"{MARKERS[medium.kind]}\n" for medium in media) + question.strip()
        shown = [*self.images, *images]
        if tokens == "all" or isinstance(tokens, list):
            raise ValueError(f"tokens {tokens}: a conversation goes on from one answer, name one scale")
        options["memory"] = self.memory
        answer: Answer = self.model.answer(shown, question, tokens, self.turns, self.system, **options)
        self.images, self.turns = shown, [*self.turns, question, answer.text]
        return answer


def _texts(ask: Ask, where: str) -> tuple[list[str], str | None]:
    """The turns of a question, and its system message, checked as those of records are.

    Raises:
        RecordError: A text is empty or not Unicode, history is not questions and answers in turn, or there is a
            marker in an answer or in the system message.
    """
    turns, system = [], None
    if isinstance(ask.history, str) or len(ask.history) % 2:
        found = "a text" if isinstance(ask.history, str) else f"{len(ask.history)} of them"
        raise RecordError(where, "history", f"expected a list of questions and their answers in turn, found {found}")
    for number, text in enumerate(ask.history):
        turns.append("" if text == "" else checked_text(where, f"history[{number}]", text))  # a model may say nothing
        if number % 2:
            refuse_markers(where, f"history[{number}]", turns[-1], "in an answer", "in an answer")
    if ask.system:
        system = checked_text(where, "system", ask.system)
        refuse_markers(where, "system", system, "in a system message", "in a system message")
    return [*turns, checked_text(where, "question", ask.question)], system


def _with_markers(turns: list[str], media: Sequence[Media], where: str) -> list[str]:
    """Turns in which every image and video has its marker; without any they stand in front of the first."""
    found = [kind for turn in turns for kind in marked_kinds(turn)]
    if not found and media:
        first = "".join(f"{MARKERS[medium.kind]}\n" for medium in media) + turns[0].strip()
        return [first, *turns[1:]]
    if found != [medium.kind for medium in media]:
        given = ", ".join(medium.kind for medium in media) or "none"
        detail = f"the text has markers for {', '.join(found) or 'none'}, given are {given}"
        raise RecordError(where, "markers and images differ", detail)
    return turns


def _answer(made: Generated, scale: Scale, times: Sequence[float]) -> Answer:
    told = made.text, scale, made.visual_tokens, made.ids, made.logprobs, made.margin, made.finish
    return Answer(*told, first_token_seconds=times[0], seconds=times[-1], tried=[scale], router=made.router)
