"""A trained run as a model of lmms-eval: `ChatModel` takes a task's messages, `SimpleModel` (--force_simple) its text
and images. Both hand the questions to `lit_mm.Model`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from lit_mm.hub.lmms_eval.requests import ask_of, pictures, settings_of
from lit_mm.hub.loading import load
from lit_mm.inference.answering import Answer, Ask


@dataclass
class Counted:
    """An answer with its numbers of tokens.

    Args:
        answer: The answer.
        prompt_tokens: Tokens of the prompt, visual tokens included; of all scales tried.
    """

    answer: Answer
    prompt_tokens: int


class SimpleModel(lmms):
    """Answers a task's text and images at one scale, or at the scale that the run's chooser chooses.

    Args:
        pretrained: A run's folder or a checkpoint, as for `lit_mm.load`.
        tokens: The scale: 36, or 8x16 for a model with time scales; auto: the run's chooser chooses for each
            question; None is the finest.
        batch_size: Questions answered at once.
        device: Where it computes; None: a GPU if there is one. With several ranks each has its own.

    Raises:
        ValueError: No such scale, or several.
    """

    is_simple = True
    settings_at = 1
    """Where a request's arguments have its generation_kwargs."""

    def __init__(
        self,
        pretrained: str,
        tokens: int | str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or not int(batch_size):
            raise ValueError(f"batch_size {batch_size}: expected a number from 1")
        self.accelerator, self.batch_size = Accelerator(), int(batch_size)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model = load(str(pretrained), str(self.accelerator.device) if self._world_size > 1 else device)
        if tokens == "all":
            raise ValueError("tokens all: lmms-eval takes one answer to a question, run it once for each scale")
        self.chooser = self.model.chooser_of(tokens)
        [self.scale] = self.model.scales_of(None if self.chooser else tokens)
        self.device = next(self.model.vlm.projector.parameters()).device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answer each request once, with its numbers of tokens."""
        found: list[Counted] = []
        start = time.perf_counter()
        for batch in self._batches(requests):
            asks = [(self._first(request), _where(request), seed) for request, seed in batch]
            found += self._answers(asks, self._settings(batch[0][0]))
        self._report(found, time.perf_counter() - start)
        return [
            GenerationResult(own.answer.text, TokenCounts(own.prompt_tokens, len(own.answer.logprobs))) for own in found
        ]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[list[str]]:
        """Answer each request, then what its task asks next, until the task ends it: the answers of all rounds."""
        start = time.perf_counter()
        found: list[Counted] = []
        replies: list[list[str]] = []
        for [(request, seed)] in self._batches(requests, 1):
            outputs: list[str] = []
            ask: Ask | None = self._first(request)
            info, number = None, 0
            while ask is not None:
                number += 1
                where = f"{_where(request)}, round {number}"
                [counted] = self._answers([(ask, where, seed)], self._settings(request))
                found.append(counted)
                outputs = [*outputs, counted.answer.text]
                ask, outputs, info = self._next(request, number, outputs, info)
            replies.append(outputs)
        self._report(found, time.perf_counter() - start)
        return replies

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The loss of each given answer, and whether it is the greedy one.

        lmms-eval's tasks take the least as the best, as its own models return LLaVA's loss: minus the mean
        log-probability of the answer's tokens, the end token included. White space around an answer is left out, as
        in training. The pairs are in GenerationResult, as lmms-eval 0.7.3 makes texts of bare ones.
        """
        found = []
        if self.chooser:
            raise ValueError("tokens auto: likelihoods of given answers are read at one scale, name it")
        for _, options in groupby(self._progress(requests), _question):
            asked = list(options)
            ask, where = SimpleModel._first(self, asked[0]), _where(asked[0])
            answers = [self._target(request).strip() for request in asked]
            logprobs = self.model.logprobs(ask.images, ask.question, answers, self.scale)[str(self.scale)]
            longest = max(map(len, logprobs))
            [greedy] = self._answers([(ask, where, 0)], {"do_sample": False, "max_new_tokens": longest})
            text = greedy.answer.text if greedy.answer.finish == "stop" else None
            pairs = [(-float(each.mean()), own == text) for own, each in zip(answers, logprobs, strict=True)]
            found += [GenerationResult(cast(Any, pair)) for pair in pairs]
        return found

    def clean(self) -> None:
        """Make room for the model that judges the answers, if there is one."""
        del self.model
        super().clean()

    def _first(self, request: Instance) -> Ask:
        """The question of (text, generation_kwargs or target, doc_to_visual, …, document, task, split)."""
        text, _, doc_to_visual, *_ = request.args
        return Ask(text, pictures(doc_to_visual(self._document(request)), _where(request)))

    def _next(self, request: Instance, number: int, outputs: list[str], info: Any) -> tuple[Ask | None, list[str], Any]:
        """The task's next question, None at the end; the outputs so far, which it may change; its own notes."""
        doc_to_text = request.args[3]
        told = {"round_idx": number, "previous_output": outputs, "previous_round_info": info}
        visuals, text, is_end, changed, info = doc_to_text(self._document(request), **told)
        ask = None if is_end else Ask(text, pictures(visuals, _where(request)))
        return ask, list(changed or outputs), info

    def _answers(self, asks: Sequence[tuple[Ask, str, int]], options: dict[str, Any]) -> list[Counted]:
        """Answer (question, what errors call it, seed) in one batch."""
        scales = self.chooser or [self.scale]
        prompts = [self.model.prompt(ask, scales, seed, where) for ask, where, seed in asks]
        answers = [answer for own in self.model.answers_to(prompts, **options) for answer in own.values()]
        for (_, where, _), answer in zip(asks, answers, strict=True):
            if answer.finish == "error":
                raise ValueError(f"{where}: the model's logits at scale {answer.scale} are not finite")
        lengths = [
            sum(self.model.length(prompt, scale)[0] for scale in answer.tried)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return [Counted(*pair) for pair in zip(answers, lengths, strict=True)]

    def _batches(self, requests: Sequence[Instance], size: int = 0) -> Iterator[list[tuple[Instance, int]]]:
        """Requests with equal settings, and a seed for each time that one is repeated."""
        seen: Counter[int] = Counter()
        pairs = []
        for request in requests:
            pairs.append((request, request.args[self.settings_at].get("seed", 0) + seen[id(request)]))
            seen[id(request)] += 1
        size = size or self.batch_size
        with self._progress(range(len(pairs))) as progress:
            for _, own in groupby(pairs, lambda pair: self._settings(pair[0])):
                same = list(own)
                for start in range(0, len(same), size):
                    yield same[start : start + size]
                    progress.update(len(same[start : start + size]))

    def _progress(self, requests: Sequence[Any]) -> tqdm:
        tokens = "auto" if self.chooser else f"{self.scale} tokens"
        return tqdm(requests, desc=f"lit_mm at {tokens}", disable=self.rank != 0)

    def _report(self, found: Sequence[Counted], seconds: float) -> None:
        """Sums for the results' `throughput`."""
        made = sum(len(own.answer.logprobs) for own in found)
        visual = sum(own.answer.visual_tokens for own in found) / max(1, len(found))
        log_metrics(seconds, made, made / seconds, {"visual_tokens": visual, "total_requests": len(found)})

    def _settings(self, request: Instance) -> dict[str, Any]:
        return settings_of(request.args[self.settings_at])

    def _document(self, request: Instance) -> Any:
        *_, document, task, split = request.args
        return self.task_dict[task][split][document]

    def _target(self, request: Instance) -> str:
        target = request.args[1]
        return target if isinstance(target, str) else str(target(self._document(request)))


class ChatModel(SimpleModel):
    """Answers a task's messages. Multiple choice by likelihood needs --force_simple."""

    is_simple = False
    settings_at = 2

    def _first(self, request: Instance) -> Ask:
        return ask_of(request.args[1](self._document(request)), _where(request))

    def _next(self, request: Instance, number: int, outputs: list[str], info: Any) -> tuple[Ask | None, list[str], Any]:
        told = {"round_idx": number, "previous_output": outputs, "previous_round_info": info}
        reply = request.args[1](self._document(request), **told)
        if not isinstance(reply, tuple):  # messages that do not depend on the round
            return None, outputs, info
        messages, is_end, changed, info = reply
        return None if is_end else ask_of(messages, _where(request)), list(changed or outputs), info


def _where(request: Instance) -> str:
    *_, document, task, split = request.args
    return f"{task}, {split}, document {document}"


def _question(request: Instance) -> tuple[Any, ...]:
    """What the answers of multiple choice have in common.

    Raises:
        ValueError: There is no question, as acc_mutual_info wants.
    """
    if not str(request.args[0]).strip():
        raise ValueError(f"{request.task_name}: answers without a question have no likelihood here (acc_mutual_info)")
    text, _, _, *place = request.args
    return (text, *place)
