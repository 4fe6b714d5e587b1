"""Times answers on this machine, one at a time: encoding, the first token, each further token.

Gives medians and quartiles over repetitions after a warm-up, measured with CUDA events on a GPU. The LLM
is called token by token with its KV cache, without the overhead of `generate`.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, cast

import torch
from torch import Tensor

from lit_mm.model.router import Router
from lit_mm.model.vlm import MatryoshkaVLM

WARM_UP, REPETITIONS = 2, 10


class Stopwatch:
    """Marks moments on a device's clock without waiting; on a GPU a mark is an event in its queue."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Mark now, or on a GPU the moment when all work queued so far is done."""
        if not self.on_gpu:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    @property
    def done(self) -> bool:
        """Whether the device has passed the last mark, so that `read` will not wait."""
        return not self.on_gpu or not self.marks or self.marks[-1].query()

    def read(self) -> list[float]:
        """Milliseconds between each mark and the next."""
        if self.on_gpu:
            self.marks[-1].synchronize()
            return [first.elapsed_time(second) for first, second in zip(self.marks, self.marks[1:], strict=False)]
        return [1000 * (second - first) for first, second in zip(self.marks, self.marks[1:], strict=False)]


class AnswerTimer:
    """Times the answers of a model that is entirely on one device.

    Args:
        vlm: The model, in evaluation mode.
        prompt: Tokens of the question.
        new_tokens: Tokens of the answer; with 1, no time per further token is measured.
        repetitions: Number of answers to time.
    """

    def __init__(self, vlm: MatryoshkaVLM, prompt: int, new_tokens: int, repetitions: int = REPETITIONS) -> None:
        self.vlm, self.prompt, self.new_tokens, self.repetitions = vlm, prompt, new_tokens, repetitions
        self.device = next(vlm.parameters()).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor, visual: int) -> dict[str, Any]:
        """Figures of one scale: milliseconds, and on a GPU the peak of allocated bytes including weights.

        Args:
            pixels: uint8 [n, 3, H, W], the images or frames to ask about.
            visual: Number of visual tokens that the LLM gets.

        Raises:
            ValueError: The images have fewer grid cells than that.
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
        """Marks before and after encoding, the first token and all further tokens.

        The LLM gets the first `visual` grid cells without pooling: which tokens it gets does not affect the time."""
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


@torch.no_grad()
def router_times(router: Router, repetitions: int) -> dict[str, float]:
    """Milliseconds of one question's scores: quartiles over the repetitions, after a warm-up."""
    state = torch.zeros(1, router.width, device=next(router.parameters()).device)
    watch = Stopwatch(state.device)
    for _ in range(WARM_UP + repetitions + 1):
        watch.mark()
        router.scores(state, state)
    return quartiles(watch.read()[WARM_UP:])


def quartiles(times: list[float]) -> dict[str, float]:
    """Median, first and third quartile."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}
