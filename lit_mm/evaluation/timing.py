"""What an answer takes on this machine: medians of repetitions, random weights, one answer at a time.

Encoding, the time to the first token (encoding, and the LLM over the prompt) and the time of each
further token are measured apart, each after a warm-up; on a GPU with CUDA events. The LLM is called
step by step with its KV cache, without what `generate` does around it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.profile.experiment import Experiment, Size

WARM_UP, REPETITIONS = 2, 10


class AnswerTimer:
    """Times answers of one experiment.

    Args:
        experiment: The experiment; its model is built with random weights.
        prompt: Tokens of the question.
        new_tokens: Tokens of the answer.
        device: Where; null: a GPU if there is one.
    """

    def __init__(self, experiment: Experiment, prompt: int, new_tokens: int, device: str | None = None) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.vlm: MatryoshkaVLM = experiment.build(self.device)
        self.frames, self.prompt, self.new_tokens = experiment.frames, prompt, new_tokens

    @torch.inference_mode()
    def __call__(self, size: Size, visual: int) -> dict[str, Any]:
        """Figures of one scale: milliseconds, and on a GPU the peak of allocated bytes."""
        pixels = torch.randint(256, (self.frames, 3, *size), dtype=torch.uint8, device=self.device)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        further = self._times(self._further, lambda: self._first(self._encode(pixels, visual)))
        return {
            "device": torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"CPU (threads: {torch.get_num_threads()})",
            "encode_ms": quartiles(self._times(lambda: self._encode(pixels, visual))),
            "first_token_ms": quartiles(self._times(lambda: self._first(self._encode(pixels, visual)))),
            "further_token_ms": quartiles([each / max(1, self.new_tokens - 1) for each in further]),
            "peak_bytes": torch.cuda.max_memory_allocated() if self.device == "cuda" else None,
        }

    def _encode(self, pixels: Tensor, visual: int) -> Tensor:
        """Pixels [n, 3, H, W] -> visual tokens [1, visual, D], as many as a scale has.

        Frames are not averaged: which tokens they are makes no difference to the time."""
        encoder, projector = self.vlm.encoder, self.vlm.projector
        cells = projector.layers(encoder(encoder.normalise(pixels)).permute(0, 2, 3, 1))
        return cells.flatten(0, 2)[None, :visual]

    def _first(self, tokens: Tensor) -> tuple[Tensor, Any]:
        """Visual tokens -> the first new token and the KV cache."""
        embed = cast(torch.nn.Module, self.vlm.llm.get_input_embeddings())
        text = embed(torch.zeros(1, self.prompt, dtype=torch.long, device=self.device))
        embeddings = torch.cat([tokens, text], dim=1)
        output = cast(Any, self.vlm.llm)(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1)
        return output.logits.argmax(-1), output.past_key_values

    def _further(self, token: Tensor, past: Any) -> None:
        for _ in range(self.new_tokens - 1):
            output = cast(Any, self.vlm.llm)(input_ids=token, past_key_values=past, use_cache=True, logits_to_keep=1)
            token = output.logits.argmax(-1)

    def _times(self, run: Callable[..., object], prepare: Callable[[], tuple[Any, ...]] = tuple) -> list[float]:
        """Milliseconds of each repetition; what `prepare` makes for each is not timed."""
        return [self._time(run, *prepare()) for _ in range(WARM_UP + REPETITIONS)][WARM_UP:]

    def _time(self, run: Callable[..., object], *prepared: Any) -> float:
        if self.device != "cuda":
            began = time.perf_counter()
            run(*prepared)
            return 1000 * (time.perf_counter() - began)
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(*prepared)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def quartiles(times: list[float]) -> dict[str, float]:
    """Median, first and third quartile."""
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}
