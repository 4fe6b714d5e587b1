"""Theory and measurement: does the time of an answer follow its FLOPs, and what is the minimum?

    python experiments/benchmarks/latency.py                     # CPU sizes
    python experiments/benchmarks/latency.py --size balanced     # encoder and LLM in ConvLLaVA-7B's proportion
    python experiments/benchmarks/latency.py --device cuda --size 7b --dtype bfloat16 --pixels 1536

A five-stage ConvNeXt and a Llama with random weights answer one question about one square image, at every scale of
its grid and without visual tokens, with greedy decoding and a KV cache. Timed separately:

- encode: encoder and projector, from pixels to nested tokens, the same at every scale;
- prefill: the LLM on visual tokens and prompt, up to the first new token;
- decode: one further token, averaged over the answer.

The roofline is measured on the same device in the same alternation: FLOP/s of a large matrix product in the same
dtype, and bytes/s of a large copy or a matrix-vector product, whichever is faster. The limit of a part is the larger of
FLOPs / (FLOP/s) and bytes / (bytes/s). FLOPs are those of `lit_mm.costs.flops`; bytes are the weights, read once, and
the KV cache. The activations of the encoder are not counted, so its limit is optimistic. A least-squares line through
the prefills gives their FLOP/s and their constant time.

Times are medians of repetitions in alternating order after one warm-up. On a shared machine, use OMP_NUM_THREADS=1 and
--cpu-time to count only the CPU time of the process. This leaves out waiting for a core, but not the effects of others
on caches and memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from nested_step import hardware, measure
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from lit_mm.costs.flops import AnswerCost, Costs, causal_pairs
from lit_mm.costs.llm_shapes import published
from lit_mm.model.batch import Images
from lit_mm.model.encoder import ConvNeXtEncoder, ExtraStage
from lit_mm.model.projector import MatryoshkaProjector
from lit_mm.model.vlm import MatryoshkaVLM
from lit_mm.profile.experiment import pooled_again

MATRIX = {"cpu": 2048, "cuda": 8192}
"""Side of the square matrices whose product is timed."""
COPIED = 2**28
"""Bytes that are copied, more than caches hold."""


@dataclass
class Size:
    """A ConvNeXt of timm, the depth and width of its fifth stage, and an LLM."""

    backbone: str
    depth: int
    width: int
    llm: PretrainedConfig


TRIAL = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=1000)
SMOLLM2 = published("HuggingFaceTB/SmolLM2-135M-Instruct")
SIZES = {
    "tiny": Size("convnext_atto", 1, 64, TRIAL),  # for trying the script out
    "small": Size("convnext_tiny", 3, 1536, SMOLLM2),
    "balanced": Size("convnext_atto", 3, 768, SMOLLM2),
    "1b": Size("convnext_large_mlp", 6, 3072, published("meta-llama/Llama-3.2-1B-Instruct")),
    "7b": Size("convnext_large_mlp", 6, 3072, published("lmsys/vicuna-7b-v1.5")),
}


@dataclass
class Roof:
    """What the device can do: FLOP/s of a matrix product, bytes/s to and from memory."""

    flops: float
    bandwidth: float


@dataclass
class Part:
    """One part of an answer, as the JSON holds it.

    Args:
        name: encode, prefill or decode.
        visual_tokens: Beside the prompt; None where they make no difference.
        flops: What it must compute.
        bytes: What it must read or write.
        seconds: Measured; of decode, one token's.
        by_flops: Seconds that the FLOPs take at the roof.
        by_bytes: Seconds that the bytes take at the roof.
    """

    name: str
    visual_tokens: int | None
    flops: float
    bytes: float
    seconds: float
    by_flops: float
    by_bytes: float

    @property
    def limit(self) -> float:
        """Seconds that it can not stay below."""
        return max(self.by_flops, self.by_bytes)


class Answering:
    """A model with random weights, and one answer of its taken to pieces.

    Args:
        arguments: The command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.prompt, self.new_tokens = arguments.device, arguments.prompt, arguments.new_tokens
        self.size, self.dtype = (arguments.pixels, arguments.pixels), getattr(torch, arguments.dtype)
        self.vlm = build(SIZES[arguments.size], self.size, self.device, self.dtype)
        self.scales = [*self.vlm.projector.scales, 0]
        pixels = torch.randint(256, (1, 3, *self.size), dtype=torch.uint8, device=self.device)
        self.images = Images([pixels], torch.zeros(1, dtype=torch.long, device=self.device))

    def steps(self) -> dict[str, Callable[[], Any]]:
        """The pieces, to be timed."""
        width = self.vlm.llm.config.hidden_size
        tokens = {n: torch.randn(1, n + self.prompt, width, dtype=self.dtype, device=self.device) for n in self.scales}
        caches = {n: self.prefill(tokens[n]).past_key_values for n in self.scales}
        found: dict[str, Callable[[], Any]] = {"encode": lambda: self.vlm.encode(self.images)}
        for n in self.scales:
            found[f"prefill {n}"] = lambda n=n: self.prefill(tokens[n])
            found[f"decode {n}"] = lambda n=n: self.decode(caches[n])
        return found

    def prefill(self, embeddings: torch.Tensor) -> Any:
        """Embeddings [1, T, D] of the prompt -> logits of the first new token, KV cache."""
        return self.vlm.llm(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1)

    def decode(self, cache: Any) -> None:
        """All further tokens of an answer; the cache is left as it was."""
        before, token = cache.get_seq_length(), torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for _ in range(self.new_tokens - 1):
            token = self.vlm.llm(input_ids=token, past_key_values=cache, use_cache=True).logits.argmax(-1)
        cache.crop(before - cache.get_seq_length())

    def parts(self, seconds: dict[str, float], roof: Roof) -> list[Part]:
        """What was measured beside what must be computed and read."""
        costs, width, further = Costs(self.vlm), self.dtype.itemsize, self.new_tokens - 1
        answers = {n: costs.answer(self.size, n, self.prompt, self.new_tokens, width=width) for n in self.scales}
        counts = {name: count * width for name, count in costs.parameters.items()}
        image = answers[0].prefill
        flops = image.encoder.forward + image.projector.forward
        found = [part("encode", None, flops, counts["encoder"] + counts["projector"], seconds["encode"], roof)]
        weights = counts["llm"] - unread_bytes(self.vlm)
        for n, answer in answers.items():
            flops = answer.prefill.llm.forward + answer.prefill.head.forward
            found.append(part("prefill", n, flops, weights + answer.cache, seconds[f"prefill {n}"], roof))
        for n, answer in answers.items():
            read, each = weights + mean_cache(answer), seconds[f"decode {n}"] / further
            found.append(part("decode", n, answer.decode_per_token, read, each, roof))
        return found


def build(size: Size, pixels: tuple[int, int], device: str, dtype: torch.dtype) -> MatryoshkaVLM:
    torch.manual_seed(0)
    with torch.device(device):
        encoder = ConvNeXtEncoder(size.backbone, [ExtraStage(size.depth, size.width)]).to(dtype)
        scales = pooled_again(*encoder.grid(*pixels))
        projector = MatryoshkaProjector(encoder.num_features, size.llm.hidden_size, scales).to(dtype)
        llm = AutoModelForCausalLM.from_config(size.llm, dtype=dtype)
    return MatryoshkaVLM(encoder, projector, llm).eval()


def part(name: str, visual: int | None, flops: float, read: float, seconds: float, roof: Roof) -> Part:
    return Part(name, visual, flops, read, seconds, flops / roof.flops, read / roof.bandwidth)


def unread_bytes(vlm: MatryoshkaVLM) -> int:
    """Of the table of embeddings, of which only a prompt's rows are read, unless the head is the same."""
    table, head = vlm.llm.get_input_embeddings().weight, vlm.llm.get_output_embeddings().weight
    return 0 if table is head else table.numel() * table.itemsize


def mean_cache(answer: AnswerCost) -> float:
    """Bytes of keys and values that a further token reads or writes."""
    pairs = causal_pairs(answer.further, before=answer.prompt_tokens) / answer.further
    return pairs * answer.cache / answer.prompt_tokens


def roof_steps(device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """What the device does best."""
    side, rows = MATRIX[device], COPIED // 4096 // dtype.itemsize
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    product, there = torch.empty_like(left), torch.randn(rows, 4096, dtype=dtype, device=device)
    here, vector = torch.empty_like(there), torch.randn(4096, dtype=dtype, device=device)
    return {
        "product": lambda: torch.mm(left, right, out=product),
        "copy": lambda: here.copy_(there),
        "vector": lambda: torch.mv(there, vector),
    }


def roof_of(seconds: dict[str, float], device: str) -> Roof:
    bandwidth = max(2 * COPIED / seconds["copy"], COPIED / seconds["vector"])
    return Roof(2 * MATRIX[device] ** 3 / seconds["product"], bandwidth)


def impossible(parts: Sequence[Part], device: str) -> list[str]:
    """Parts that took less than a CPU needs for their FLOPs, or for bytes that its caches do not hold, by more
    than a fifth. On a GPU the matrix product that is timed need not be the fastest."""
    found = []
    for own in parts if device == "cpu" else ():
        limit = own.limit if own.bytes > COPIED else own.by_flops
        if own.seconds < 0.8 * limit:
            tokens = "" if own.visual_tokens is None else f" at {own.visual_tokens} visual tokens"
            found.append(f"{own.name}{tokens}: {1000 * own.seconds:.4g} ms, the limit is {1000 * limit:.4g} ms")
    return found


def line_through(prefills: Sequence[Part]) -> dict[str, float]:
    """Least squares: seconds = beside + FLOPs / rate, and how far off the worst is."""
    flops, seconds = np.array([p.flops for p in prefills]), np.array([p.seconds for p in prefills])
    slope, beside = np.polyfit(flops / flops.max(), seconds, 1)
    off = np.abs(beside + slope * flops / flops.max() - seconds) / seconds
    return {"beside": float(beside), "rate": float(flops.max() / slope), "worst": float(off.max())}


def sooner(parts: list[Part], new_tokens: int) -> list[dict[str, Any]]:
    """How many times less each scale takes than the finest, by the limits and measured."""
    encode, *others = parts
    prefills = [p for p in others if p.name == "prefill"]
    rows = []
    for first, further in zip(prefills, others[len(prefills) :], strict=True):
        row = {"visual_tokens": first.visual_tokens, "flops": first.flops, "prefill": first.seconds}
        row["first_token"], row["limit"] = encode.seconds + first.seconds, encode.limit + first.limit
        rows.append(row | {"answer": row["first_token"] + (new_tokens - 1) * further.seconds})
    return [row | {f"{name}_times": rows[0][name] / row[name] for name in TIMES} for row in rows]


TIMES = ("flops", "prefill", "limit", "first_token", "answer")


def show_parts(parts: list[Part], line: dict[str, float], roof: Roof, console: Console) -> None:
    table = Table(
        title=f"Parts against the roof: {roof.flops / 1e9:,.1f} GFLOP/s, {roof.bandwidth / 1e9:,.2f} GB/s",
        title_justify="left",
    )
    for column in ("part", "visual tokens", "GFLOPs", "MB", "limit ms", "set by", "measured ms", "measured / limit"):
        table.add_column(column, justify="left" if column in ("part", "set by") else "right")
    for own in parts:
        table.add_row(
            own.name,
            "" if own.visual_tokens is None else str(own.visual_tokens),
            f"{own.flops / 1e9:,.2f}",
            f"{own.bytes / 1e6:,.0f}",
            f"{1000 * own.limit:,.4g}",
            "FLOPs" if own.by_flops > own.by_bytes else "bytes",
            f"{1000 * own.seconds:,.4g}",
            f"{own.seconds / own.limit:.2f}",
        )
    console.print(table)
    if line["rate"] < 0:
        console.print("no line through the prefills: more tokens did not take longer, noise is all that was measured")
        return
    console.print(
        f"prefill = {1000 * line['beside']:.3g} ms + FLOPs at {line['rate'] / 1e9:,.1f} GFLOP/s "
        f"({line['rate'] / roof.flops:.0%} of the roof); the worst scale is {line['worst']:.1%} off; "
        f"a further token takes {1000 * parts[-1].seconds:.3g} ms"
    )


def show_sooner(rows: list[dict[str, Any]], new_tokens: int, console: Console) -> None:
    table = Table(title="What fewer tokens buy: times less than at the finest scale", title_justify="left")
    names = ("LLM FLOPs", "prefill", "first token, by the limits", "first token", f"answer of {new_tokens}")
    for column in ("visual tokens", *names, "first token ms", "answer ms"):
        table.add_column(column, justify="right")
    for row in rows:
        less = [f"{row[f'{name}_times']:.2f}" for name in TIMES]
        times = [f"{1000 * row[name]:,.4g}" for name in ("first_token", "answer")]
        table.add_row(str(row["visual_tokens"]), *less, *times)
    console.print(table)


def show_floor(parts: list[Part], rows: list[dict[str, Any]], arguments: argparse.Namespace, console: Console) -> None:
    weights, nothing = next(p for p in parts if p.name == "decode"), rows[-1]
    console.print(
        f"The floor: encoding takes {1000 * parts[0].seconds:,.4g} ms at every scale, the prompt's own "
        f"{arguments.prompt} tokens {1000 * nothing['prefill']:,.4g} ms, and reading weights and cache "
        f"{1000 * weights.by_bytes:,.4g} ms for each further token.",
        f"So fewer visual tokens, down to none, bring the first token at most {nothing['first_token_times']:.2f} times "
        f"sooner, an answer of {arguments.new_tokens} tokens {nothing['answer_times']:.2f} times, though the LLM's "
        f"prefill needs {nothing['flops_times']:.2f} times fewer FLOPs.",
        sep="\n",
    )


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--pixels", type=int, default=768, help="side of the image")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of text in the prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of the answer, at least 2")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="count the process's own time, of one CPU thread")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    made = parser.parse_args(words)
    if made.new_tokens < 2:
        parser.error(f"--new-tokens: found {made.new_tokens}, expected 2 or more: decode is the time of a further one")
    if made.cpu_time and (made.device != "cpu" or torch.get_num_threads() > 1):
        parser.error(f"--cpu-time: found {hardware(made.device)}, expected one thread of a CPU (OMP_NUM_THREADS=1)")
    return made


@torch.inference_mode()
def main(words: Sequence[str] | None = None) -> None:
    arguments, console = parsed(words), Console(width=120)
    answering = Answering(arguments)
    steps = roof_steps(arguments.device, answering.dtype) | answering.steps()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    seconds = measure(steps, arguments.repetitions, arguments.device, clock)
    roof = roof_of(seconds, arguments.device)
    parts = answering.parts(seconds, roof)
    line, rows = line_through([p for p in parts if p.name == "prefill"]), sooner(parts, arguments.new_tokens)
    versions: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    setting = f"{arguments.size}, {arguments.dtype}, {arguments.pixels} px, {clock.__name__}"
    console.print(f"{hardware(arguments.device)}; {versions}; {setting}", soft_wrap=True)
    show_parts(parts, line, roof, console)
    show_sooner(rows, arguments.new_tokens, console)
    show_floor(parts, rows, arguments, console)
    if wrong := impossible(parts, arguments.device):
        sys.exit("refused, these figures cannot be:\n" + "\n".join(wrong))
    if arguments.json:
        result = {"hardware": hardware(arguments.device), "versions": versions, "setting": setting}
        result |= {"roof": asdict(roof), "parts": [asdict(p) for p in parts], "prefill": line, "scales": rows}
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
