"""What an answer takes on this machine, one at a time: encoding, the first token, each further one.

Medians and quartiles of repetitions behind a warm-up; on a GPU by CUDA events. The LLM is called step
by step with its KV cache, without what `generate` does around it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import torch
from torch import Tensor

from lit_mm.model.vlm import MatryoshkaVLM

WARM_UP, REPETITIONS = 2, 10


class Stopwatch:
    """Moments on a device's own clock. Marking one waits for nothing; on a GPU it is an event in its queue."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Now, or on a GPU when all that was asked of it so far is done."""
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    @property
    def done(self) -> bool:
        """Whether the last mark lies behind, so that it can be read without waiting."""
        return not self.on_gpu or not self.marks or self.marks[-1].query()

    def read(self) -> list[float]:
        """Milliseconds between each mark and the next."""
        if self.on_gpu:
            self.marks[-1].synchronize()
            return [first.elapsed_time(second) for first, second in zip(self.marks, self.marks[1:], strict=False)]
        return [1000 * (second - first) for first, second in zip(self.marks, self.marks[1:], strict=False)]


class AnswerTimer:
    """Times answers of a model, which is on one device as a whole.

    Args:
        vlm: The model, in evaluation mode.
        prompt: Tokens of the question.
        new_tokens: Tokens of the answer; of a single one no further token's time is known.
        repetitions: How many answers are timed.
    """

    def __init__(self, vlm: MatryoshkaVLM, prompt: int, new_tokens: int, repetitions: int = REPETITIONS) -> None:
        self.vlm, self.prompt, self.new_tokens, self.repetitions = vlm, prompt, new_tokens, repetitions
        self.device = next(vlm.parameters()).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor, visual: int) -> dict[str, Any]:
        """Figures of one scale: milliseconds, and on a GPU the peak of allocated bytes, weights included.

        Args:
            pixels: uint8 [n, 3, H, W], the images or frames that are asked about.
            visual: Visual tokens that the LLM gets of them.

        Raises:
            ValueError: The images have fewer cells.
        """
        pixels = pixels.to(self.device)
        on_gpu = self.device.type == "cuda"
        for _ in range(WARM_UP):
            self._answer(pixels, visual).read()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        further = self.new_tokens - 1
        times = [self._answer(pixels, visual).read() for _ in range(self.repetitions)]
        return {
            "encode_ms": quartiles([encode for encode, _, _ in times]),
            "first_token_ms": quartiles([encode + first for encode, first, _ in times]),
            "further_token_ms": quartiles([t / further for *_, t in times]) if further else None,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
        }

    def _answer(self, pixels: Tensor, visual: int) -> Stopwatch:
        """Marks before and behind encoding, the first token and all further ones.

        Frames are not averaged: which `visual` tokens the LLM gets makes no difference to the time."""
        watch, encoder, llm = Stopwatch(self.device), self.vlm.encoder, cast(Any, self.vlm.llm)
        watch.mark()
        cells = self.vlm.projector.layers(encoder(encoder.normalize(pixels)).permute(0, 2, 3, 1))  # [n, h, w, D]
        tokens = cells.flatten(0, 2)[None, :visual]  # [1, visual, D]
        if tokens.shape[1] != visual:
            raise ValueError(f"expected {visual} visual tokens, {len(pixels)} images have {tokens.shape[1]} cells")
        watch.mark()
        text = llm.get_input_embeddings()(torch.zeros(1, self.prompt, dtype=torch.long, device=self.device))
        prompt = torch.cat([tokens.to(text.dtype), text], dim=1)
        output = llm(inputs_embeds=prompt, use_cache=True, logits_to_keep=1)
        token, past = output.logits.argmax(-1), output.past_key_values
        watch.mark()
        for _ in range(self.new_tokens - 1):
            output = llm(input_ids=token, past_key_values=past, use_cache=True, logits_to_keep=1)
            token = output.logits.argmax(-1)
        watch.mark()
        return watch


def quartiles(times: list[float]) -> dict[str, float]:
    """Median, first and third quartile."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}
