"""Questions -> answers, at one scale or at all of them in one batch.

    encode every image once -> pack the prompts of all questions and scales (prompts.py) -> run the LLM once
    -> copy each prompt's keys and values into a batch of sequences -> decode token by token; an answer that
    has ended leaves the batch

LLMs that cannot be packed, and beam search, go through transformers' own `generate` instead.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)
from transformers.cache_utils import DynamicLayer

from lit_mm.inference.decoding import end_ids, processors
from lit_mm.inference.prompts import embed, logits_of, pack_prompts, prompt_codes, run
from lit_mm.model.attention import NAME
from lit_mm.model.batch import Images, Question
from lit_mm.model.router import mean_of
from lit_mm.model.scales import Scale
from lit_mm.model.vlm import MatryoshkaVLM


@dataclass
class Generated:
    """One generated answer.

    Args:
        ids: New token ids, without the end token.
        logprobs: Log-probability of each id under the model's own distribution, before any setting changes it;
            the end token's, if there is one, comes last.
        margin: Log-probability of the likeliest first token minus that of the second likeliest, under the
            model's own distribution.
        finish: `stop` at an end token or a stop string, `length` at max_new_tokens, `dropped` when its asker
            gave up, `error` where the model's logits were not finite.
        visual_tokens: Visual tokens in its prompt.
        text: The answer as text, cut before a stop string; empty without a tokenizer.
        seconds: From the call to its last token, with encoding and the rest of the batch.
        router: At the coarsest scale, the score of each scale by the model's router, if it has one.
    """

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margin: float = 0.0
    finish: Literal["stop", "length", "dropped", "error"] = "length"
    visual_tokens: int = 0
    text: str = ""
    seconds: float = 0.0
    router: dict[Scale, float] = field(default_factory=dict)


Emit = Callable[[int, Generated, bool], bool | None]
"""Called with a prompt's number, its answer so far and whether that is all; returning False drops the prompt."""


def generate(
    vlm: MatryoshkaVLM,
    images: Images,
    questions: Sequence[Question],
    scales: Sequence[Scale],
    config: GenerationConfig,
    ends: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    nested: Tensor | None = None,
    seed: int = 0,
    emit: Emit | None = None,
    encodings: int = 0,
) -> list[list[Generated]]:
    """Answer every question at every one of the scales.

    Args:
        vlm: The model, in evaluation mode.
        images: What the questions are about.
        questions: Prompts with the places of their images.
        scales: Some of the model's scales.
        config: As `decoding.settings` makes it.
        ends: Token ids that end an answer; the LLM's own end tokens always do.
        tokenizer: For texts and stop strings; without it, answers are ids.
        nested: Output of `vlm.encode` for the images, to skip the encoder.
        seed: Of sampling. An answer depends on it, its question and its scale, not on the rest of the batch.
        emit: Called after every token of every answer, as number = question × len(scales) + scale.
        encodings: As for `vlm.encode`.

    Returns:
        Answers by question, then scale.

    Raises:
        ValueError: The model does not have one of the scales, or no end token is known.
    """
    asked = [Asked(question, scale, seed) for question in questions for scale in scales]
    answers = generate_each(vlm, images, asked, config, ends, tokenizer, nested, emit, encodings)
    return [answers[n * len(scales) : (n + 1) * len(scales)] for n in range(len(questions))]


@dataclass
class Asked:
    """A question at one scale, with the seed of its sampling."""

    question: Question
    scale: Scale
    seed: int = 0


@dataclass
class Past:
    """Keys and values of a prompt and its answer, for the next prompt that begins alike.

    Args:
        codes: [T] the prompt and the answer, as `prompts.prompt_codes` makes them.
        cache: Their keys and values; None: there are none yet.
    """

    codes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    cache: Cache | None = None

    def take(self, codes: Tensor) -> tuple[Cache | None, int]:
        """Take out the keys and values of what a prompt [T] has in common with this past, at most all before its last
        position, and their number. The decoder puts them back, with those of the new tokens, when it is done."""
        cache, self.cache = self.cache, None
        most = min(len(self.codes), len(codes) - 1)
        differ = (self.codes[:most] != codes[:most]).nonzero()
        length = int(differ[0]) if len(differ) else most
        if cache is None or not length:
            return None, 0
        cache.crop(length)
        return cache, length


@torch.no_grad()  # tensors of inference mode do not work with sharded parameters
def generate_each(
    vlm: MatryoshkaVLM,
    images: Images,
    asked: Sequence[Asked],
    config: GenerationConfig,
    ends: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    nested: Tensor | None = None,
    emit: Emit | None = None,
    encodings: int = 0,
    past: Past | None = None,
) -> list[Generated]:
    """Answer questions in one batch, each at its own scale; otherwise like `generate`.

    A single question may come with a past: what its prompt has in common with it is not computed again, and afterwards
    it holds the prompt and the answer. LLMs that cannot be packed do not use it."""
    if not asked and not vlm.sharded:
        return []
    if unknown := [str(own.scale) for own in asked if own.scale not in vlm.all_scales]:
        raise ValueError(f"scale {unknown[0]} is not one of the model's {', '.join(map(str, vlm.all_scales))}")
    start = time.perf_counter()
    nested = vlm.encode(images, encodings) if nested is None else nested
    all_ends = end_ids(vlm.llm, ends)
    nothing = Question("", "", torch.tensor([all_ends[0]], device=nested.device), [])
    decoded = list(asked) or [Asked(nothing, vlm.all_scales[0])]
    codes = [torch.from_numpy(prompt_codes(vlm, images, own.question, own.scale)) for own in decoded]
    decoder = Decoder(vlm, nested, codes, list(map(_seed_of, decoded)), config, all_ends, tokenizer, emit, start, past)
    return vlm.run(lambda _: decoder.run())[: len(asked)]


def _seed_of(asked: Asked) -> int:
    scale = asked.scale if asked.question.image_index else None  # a text is the same prompt at every scale
    told = f"{asked.seed} {scale} {asked.question.input_ids.tolist()}"
    return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=7).digest(), "big")


class Decoder:
    """Decodes a batch of prompts.

    Args:
        vlm: The model.
        nested: [M, sum of scales, D] output of `MatryoshkaVLM.encode`.
        codes: [T] for each prompt, as `prompts.prompt_codes` makes them.
        seeds: Of each prompt, for sampling.
        config: Settings.
        ends: Token ids that end an answer.
        tokenizer: For texts and stop strings.
        emit: See `Emit`.
        start: When the call began, by `time.perf_counter`.
        past: Keys and values that may serve for the beginning of a single prompt.
    """

    def __init__(
        self,
        vlm: MatryoshkaVLM,
        nested: Tensor,
        codes: Sequence[Tensor],
        seeds: Sequence[int],
        config: GenerationConfig,
        ends: Sequence[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
        emit: Emit | None = None,
        start: float = 0.0,
        past: Past | None = None,
    ) -> None:
        if past is not None and len(codes) != 1:
            raise ValueError(f"a past goes with one prompt, found {len(codes)}")
        self.start, self.past = start, past
        self.vlm, self.nested, self.config, self.ends, self.tokenizer = vlm, nested, config, list(ends), tokenizer
        self.emit, self.stops, self.device = emit, list(config.stop_strings or []), nested.device
        if self.stops and tokenizer is None:
            raise ValueError("stop_strings: without a tokenizer nothing can be compared with them")
        # equal prompts, such as a text at every scale, are decoded once
        firsts: dict[tuple[bytes, int], int] = {}
        prompts = [(own.numpy().tobytes(), seed) for own, seed in zip(codes, seeds, strict=True)]
        self.first = [firsts.setdefault(prompt, number) for number, prompt in enumerate(prompts)]
        self.codes, self.numbers = codes, sorted(set(self.first))
        self.answers = [Generated(visual_tokens=int((own < 0).sum())) for own in codes]
        self.generators = {n: torch.Generator(self.device).manual_seed(seeds[n]) for n in self.numbers}
        self.processors = processors(config, self.ends, self.device)

    def run(self) -> list[Generated]:
        """The answers, in the prompts' order."""
        if (self.config.num_beams or 1) > 1 or self.vlm.llm.config._attn_implementation != NAME:
            self._by_transformers()
        else:
            self._decode()
        for number, first in enumerate(self.first):
            if number != first:
                self.answers[number] = self.answers[first]
        return self.answers

    def _decode(self) -> None:
        self.made = torch.zeros(len(self.numbers), 0, dtype=torch.long, device=self.device)  # [B, t]
        logits = self._prefill()  # [B, vocabulary]
        for remaining in reversed(range(int(self.config.max_new_tokens or 1))):
            if self.numbers:
                self._keep(self._take(logits))
            if not remaining or not self._any_rank_goes_on():
                break
            logits = self._step() if self.numbers else self._idle()
        for number in self.numbers:
            self._end(number, "length")
        if self.past and self.answers[0].finish != "error":
            self.past.codes = torch.cat([self.codes[0], self.made[0, :-1].cpu()])  # the last token has no keys yet
            self.past.cache = self.cache

    def _prefill(self) -> Tensor:
        """Run all prompts at once; keep each one's keys and values, padded on the left; return its next logits."""
        cache, length = self.past.take(self.codes[0]) if self.past else (None, 0)
        if cache is not None:
            codes = self.codes[0][None].to(self.device)  # [1, T]
            self.mask, self.cache = torch.ones_like(codes), cache
            return self._logits(self._run(codes[:, length:]))
        packed = pack_prompts([self.codes[number].numpy() for number in self.numbers])
        packed.codes, packed.position_ids = packed.codes.to(self.device), packed.position_ids.to(self.device)
        packed.layout = apply_to_collection(packed.layout, Tensor, Tensor.to, self.device)
        new = DynamicCache()
        hidden = run(self.vlm, self.nested, packed, new)
        left: Any = {"batch_first": True, "padding_side": "left"}
        self.mask = pad_sequence([torch.ones_like(own) for own in packed.index], **left).to(self.device)  # [B, T]
        # [B, T] positions in the packed sequence; padding repeats the prompt's own first one, as the keys and values
        # of another prompt could be NaN, and 0 × NaN is NaN
        index = pad_sequence([own - own[0] for own in packed.index], **left)
        index = (index + torch.stack([own[0] for own in packed.index])[:, None]).to(self.device)
        self.cache = each_layer(new, lambda x: x[0][:, index].transpose(0, 1))  # [1, heads, L, d] -> [B, heads, T, d]
        return self._logits(hidden[index[:, -1]])

    def _logits(self, last: Tensor) -> Tensor:
        """States [B, D] at the ends of the prompts -> next logits; the router reads these states."""
        self._route(self.numbers, last)
        return logits_of(self.vlm, last)

    def _route(self, numbers: Sequence[int], last: Tensor) -> None:
        """Note the router's scores for those of the prompts that show images at the coarsest scale."""
        scales, shown = self.vlm.projector.scales, [-1 - self.codes[n][self.codes[n] < 0] for n in numbers]
        coarsest = [len(own) > 0 and int(own[0]) % sum(scales) >= sum(scales[:-1]) for own in shown]
        if self.vlm.router is None or not any(coarsest):
            return
        asked = list(compress(range(len(numbers)), coarsest))
        index = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(shown[place]) for place in asked]))
        tokens = self.nested.flatten(0, 1)[torch.cat([shown[place] for place in asked]).to(self.device)]
        visual = mean_of(tokens, index.to(self.device), len(asked))
        scores = self.vlm.router.scores(visual, last[asked])  # [A, scales]
        for place, own in zip(asked, scores.tolist(), strict=True):
            self.answers[numbers[place]].router = dict(zip(self.vlm.all_scales, own, strict=True))

    def _take(self, logits: Tensor) -> list[int]:
        """Choose every sequence's next token; return the places in the batch of those that go on."""
        scores = self.processors(cast(torch.LongTensor, self.made), cast(Any, logits))
        chosen = self._choose(scores)
        logprobs = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
        if not self.made.shape[1]:
            for number, margin in zip(self.numbers, margins(logits).tolist(), strict=True):
                self.answers[number].margin = margin
        self.made = torch.cat([self.made, chosen[:, None]], dim=1)
        found = zip(self.numbers, chosen.tolist(), logprobs.tolist(), strict=True)
        return [place for place, each in enumerate(found) if self._goes_on(*each)]

    def _choose(self, scores: Tensor) -> Tensor:
        """Scores [B, vocabulary] -> token ids [B]."""
        if not self.config.do_sample:
            return scores.argmax(-1)
        shares = scores.softmax(-1).nan_to_num(1.0)
        pairs = zip(shares, self.numbers, strict=True)
        return torch.cat([torch.multinomial(own, 1, generator=self.generators[n]) for own, n in pairs])

    def _goes_on(self, number: int, token: int, logprob: float) -> bool:
        answer = self.answers[number]
        if math.isnan(logprob):
            return self._end(number, "error")
        answer.logprobs.append(logprob)
        if token in self.ends:
            return self._end(number, "stop")
        answer.ids.append(token)
        if self.emit:
            answer.text = self._text(answer.ids)
        if self._has_stop(answer.ids):
            return self._end(number, "stop")
        if self._told(number, False):
            return self._end(number, "dropped")
        return True

    def _end(self, number: int, why: Literal["stop", "length", "dropped", "error"]) -> Literal[False]:
        answer = self.answers[number]
        answer.finish, answer.text = why, self._text(answer.ids).strip()
        answer.seconds = time.perf_counter() - self.start
        self._told(number, True)
        return False

    def _told(self, number: int, is_all: bool) -> bool:
        """Pass the answer to `emit` for this prompt and all equal ones; whether all of them are dropped."""
        if self.emit is None:
            return False
        asked = [n for n, first in enumerate(self.first) if first == number]
        replies = [self.emit(n, self.answers[number], is_all) for n in asked]
        return all(reply is False for reply in replies)

    def _has_stop(self, ids: Sequence[int]) -> bool:
        if not self.stops or self.tokenizer is None:
            return False
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return any(stop in text for stop in self.stops)

    def _text(self, ids: Sequence[int]) -> str:
        if self.tokenizer is None:
            return ""
        text = str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
        return text[: min([text.find(stop) for stop in self.stops if stop in text], default=len(text))]

    def _keep(self, places: Sequence[int]) -> None:
        """Drop the sequences that ended, and the padding that only they needed."""
        if len(places) == len(self.numbers):
            return
        self.numbers = [self.numbers[place] for place in places]
        if self.numbers:
            kept = torch.tensor(places, device=self.device)
            self.mask, self.made = self.mask[kept], self.made[kept]
            padding = int(self.mask.argmax(1).min())
            self.mask = self.mask[:, padding:]
            self.cache = each_layer(self.cache, lambda x: x[kept, :, padding:])

    def _any_rank_goes_on(self) -> bool:
        """With sharded parameters, all ranks must run the LLM equally often."""
        if not self.vlm.sharded:
            return bool(self.numbers)
        flag = torch.tensor([bool(self.numbers)], dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _step(self) -> Tensor:
        """Run the LLM on every sequence's last token; return the next logits [B, vocabulary]."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)  # [B, T + 1]
        return logits_of(self.vlm, self._run(self.made[:, -1:]))

    def _run(self, codes: Tensor) -> Tensor:
        """Run the LLM on what follows the cache, [B, t] of the mask's [B, T]; return the last states [B, D]."""
        output = cast(Any, self.vlm.llm).base_model(
            inputs_embeds=embed(self.vlm, self.nested, codes),
            position_ids=self.mask.cumsum(1)[:, -codes.shape[1] :] - 1,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def _idle(self) -> Tensor:
        """A step without a sequence on this rank, while another rank goes on."""
        embeddings = embed(self.vlm, self.nested, torch.tensor([[self.ends[0]]], device=self.device))
        output = cast(Any, self.vlm.llm).base_model(inputs_embeds=embeddings, use_cache=False)
        return logits_of(self.vlm, output.last_hidden_state[:, -1])

    def _by_transformers(self) -> None:
        """Groups of prompts through transformers' own `generate`."""
        llm: Any = self.vlm.llm
        config, ends = deepcopy(self.config), {"eos_token_id": self.ends, "pad_token_id": self.ends[0]}
        config.update(**ends, stop_strings=None, output_logits=True, return_dict_in_generate=True)
        groups = self._groups()
        rounds = torch.tensor(len(groups), device=self.device)
        if self.vlm.sharded:  # all ranks must generate equally often: those with fewer groups repeat their last one
            dist.all_reduce(rounds, dist.ReduceOp.MAX)
        left: Any = {"batch_first": True, "padding_side": "left"}
        for place in range(int(rounds)):
            group = groups[min(place, len(groups) - 1)]
            codes = pad_sequence([self.codes[n] for n in group], **left).to(self.device)  # [B, T]
            mask = pad_sequence([torch.ones_like(self.codes[n]) for n in group], **left).to(self.device)
            with without_own_settings(llm), first_states(llm) as states, torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.generators[group[0]].initial_seed())
                output = llm.generate(
                    inputs_embeds=embed(self.vlm, self.nested, codes),
                    attention_mask=mask,
                    generation_config=config,
                    stopping_criteria=[StopStrings(self._has_stop)] if self.stops else None,
                    synced_gpus=self.vlm.sharded,
                )
            if place < len(groups):
                self._route(group, states[0][:: len(states[0]) // len(group)])  # beams of a prompt are neighbors
                for row, number in enumerate(group):
                    self._note(number, output, row)

    def _groups(self) -> list[list[int]]:
        """Prompts of similar length for greedy answers; each alone for sampling, whose seed is its own, and for beam
        search, which does not give the same answers in a padded batch."""
        if self.config.do_sample or (self.config.num_beams or 1) > 1:
            return [[number] for number in self.numbers]
        groups: list[list[int]] = []
        for number in sorted(self.numbers, key=lambda n: len(self.codes[n]), reverse=True):
            if groups and 2 * len(self.codes[number]) >= len(self.codes[groups[-1][0]]):
                groups[-1].append(number)
            else:
                groups.append([number])
        return groups

    def _note(self, number: int, output: Any, row: int) -> None:
        """Take an answer over from a row of transformers' output."""
        ids, answer = output.sequences[row].tolist(), self.answers[number]
        ended = next((place for place, token in enumerate(ids) if token in self.ends), None)
        answer.ids, finish = ids[:ended], "length" if ended is None else "stop"
        beams = [row] * len(ids)
        if getattr(output, "beam_indices", None) is not None:
            beams = [beam for beam in output.beam_indices[row].tolist() if beam >= 0]
        told = ids if ended is None else ids[: ended + 1]
        lengths = range(1, len(answer.ids) + 1) if self.stops else ()
        if stopped := next((length for length in lengths if self._has_stop(ids[:length])), None):
            answer.ids, told, finish = ids[:stopped], ids[:stopped], "stop"
        for logits, beam, token in zip(output.logits, beams, told, strict=False):
            answer.logprobs.append(float(logits[beam].float().log_softmax(-1)[token]))
        answer.margin = float(margins(output.logits[0][beams[0]].float()))
        if any(math.isnan(each) for each in answer.logprobs):
            finish = "error"
        self._end(number, cast(Any, finish))


class StopStrings(StoppingCriteria):
    """Ends the answers whose ids have a stop string in their text."""

    def __init__(self, has_stop: Callable[[Sequence[int]], bool]) -> None:
        self.has_stop = has_stop

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Any:
        """New ids [B, t] -> [B] whether each answer has ended."""
        return torch.tensor([self.has_stop(row) for row in input_ids.tolist()], device=input_ids.device)


def margins(logits: Tensor) -> Tensor:
    """[..., vocabulary] -> [...] how far the likeliest token is above the second likeliest, as log-probabilities."""
    first, second = logits.topk(2).values.unbind(-1)
    return first - second


def settled(text: str, stops: Sequence[str] = ()) -> str:
    """The part of an unfinished answer's text that further tokens do not change: without spaces at its ends, half a
    character, or what may be the beginning of a stop string."""
    text = text.rstrip("\ufffd")
    begun = (n for stop in stops for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n]))
    return text[: len(text) - max(begun, default=0)].strip()


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, T, d] in buffers with room for more; DynamicLayer copies all for every new token."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers, self.length = [keys, values], keys.shape[-2]
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; return all keys and values."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.buffers[0].shape[-2]:
            room = self.length - start + max(32, self.length // 4)
            self.buffers = [F.pad(buffer[:, :, :start], (0, 0, 0, room)) for buffer in self.buffers]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.length] = new
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def crop(self, max_length: int) -> None:
        """Keep the first tokens."""
        self.length = min(self.length, max_length)
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)


def each_layer(cache: Cache, change: Callable[[Tensor], Tensor]) -> Cache:
    """A cache with every layer's keys and values changed, and with room for more tokens."""
    return Cache(layers=[RoomyLayer(change(layer.keys), change(layer.values)) for layer in cast(Any, cache).layers])


@contextmanager
def without_own_settings(llm: PreTrainedModel) -> Iterator[None]:
    """Meanwhile the LLM has no generation_config of its own, from which transformers would take what a call leaves
    unset, such as a repetition penalty, banned n-grams or beams."""
    own = llm.generation_config
    llm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        llm.generation_config = own


@contextmanager
def first_states(llm: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Meanwhile the last states [B, D] at the end of the LLM's first run, which is that of the prompts, are noted."""
    found: list[Tensor] = []
    note = lambda _, __, output: None if found else found.append(output.last_hidden_state[:, -1])  # noqa: E731
    handle = llm.base_model.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()
