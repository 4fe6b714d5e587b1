"""python -m lit_mm ask: questions about images and videos from the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import registered_extensions
from rich.console import Console
from rich.table import Table

from lit_mm.hub.loading import load
from lit_mm.inference.answering import Answer, Ask, Chat, Model
from lit_mm.inference.generation import Generated, settled
from lit_mm.inference.pictures import VIDEOS, file_of

PROGRAM = "python -m lit_mm ask"
USAGE = f"""{PROGRAM} --ckpt_path last photo.jpg "What is it?"
       {PROGRAM} --ckpt_path runs/mine --tokens all a.jpg b.jpg "What differs?"
       {PROGRAM} --ckpt_path last photo.jpg - < questions.txt      one question a line
       {PROGRAM} --ckpt_path last photo.jpg                        a conversation"""
SUFFIXES = {*registered_extensions(), *VIDEOS}
HELP = """/tokens 9 changes the scale, /image FILE adds an image, /new begins again
Ctrl-C stops an answer, /quit or Ctrl-D ends"""


def main(arguments: Sequence[str]) -> None:
    """Answer what the command line asks.

    Raises:
        ValueError: A wrong option, scale or setting.
        FileNotFoundError: No such checkpoint, image or video.
    """
    options = _parser().parse_args(arguments)
    files, questions = _split(options.words)
    settings = {
        name: getattr(options, name)
        for name in ("max_new_tokens", "temperature", "top_p", "num_beams", "seed")
        if getattr(options, name) is not None
    }
    if questions is None and options.json:
        raise ValueError("--json: expected a question, or - for questions from standard input")
    if options.mean_tokens is not None and options.tokens not in (None, "auto"):
        raise ValueError(f"--mean_tokens goes with --tokens auto, found --tokens {options.tokens}")
    model = load(options.ckpt_path, options.device, mean_tokens=options.mean_tokens)
    tokens = options.tokens or ("auto" if options.mean_tokens is not None else str(model.scales[0]))
    check(model, tokens)  # a wrong one is named before a question is typed
    if questions is None:
        converse(model, files, tokens, settings)
        return
    for question in questions:
        answers = model.answer(files, question, tokens, **settings)
        show(question, answers if tokens == "all" else {str(answers.scale): answers}, options.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, USAGE, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="FILE … QUESTION", help="images, videos, and the question; - reads")
    parser.add_argument(
        "--ckpt_path",
        default="last",
        help="a checkpoint, a folder of a run or of export, a hub name, or last: the newest in runs",
    )
    parser.add_argument("--tokens", help="visual tokens per image: 36, 8x16, all, or auto (default: the finest)")
    parser.add_argument("--mean_tokens", type=float, help="auto, with so many visual tokens a question on average")
    parser.add_argument("--json", action="store_true", help="one JSON object per question")
    parser.add_argument("--device", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--max_new_tokens", type=int, help="length of the longest answer (default: the model's)")
    parser.add_argument("--temperature", type=float, help="sample with this temperature; default: the likeliest token")
    parser.add_argument("--top_p", type=float, help="sample from the likeliest tokens of this total probability")
    parser.add_argument("--num_beams", type=int, help="beam search")
    parser.add_argument("--seed", type=int, help="of sampling (0)")
    return parser


def _split(words: Sequence[str]) -> tuple[list[Path | str], Iterator[str] | None]:
    """Images and videos, and the questions; None for a conversation."""
    files: list[Path | str] = [word for word in words if word != "-" and file_of(word)]
    others = [word for word in words if word not in files]
    if len(others) > 1:
        raise FileNotFoundError(f"ask: {others[0]!r} is not a file, and the question is {others[-1]!r}")
    if others and " " not in others[0] and Path(others[0]).suffix.lower() in SUFFIXES:
        raise FileNotFoundError(f"ask: no file {others[0]}")  # a mistyped name, not a question
    if not others:
        return files, None
    return files, (line.strip() for line in sys.stdin if line.strip()) if others == ["-"] else iter(others)


def check(model: Model, tokens: str) -> None:
    """Check that `tokens` names scales, or is auto and the model has a chooser; raises ValueError if not."""
    if not model.chooser_of(tokens):
        model.scales_of(tokens)


def show(question: str, answers: dict[str, Answer], as_json: bool) -> None:
    """Print the answers to one question, by scale."""
    if as_json:
        rows = {scale: _figures(answer) for scale, answer in answers.items()}
        print(json.dumps({"question": question, "answers": rows}, ensure_ascii=False), flush=True)
        return
    if len(answers) == 1:
        [answer] = answers.values()
        print(answer.text, flush=True)
        print(f"({_cost(answer)})", file=sys.stderr, flush=True)
        return
    caption = "All scales ran in one batch, so the times include the others; a process's first batch takes longer."
    table = Table(title=question, title_justify="left", caption=caption, caption_justify="left")
    for name in ("scale", "visual tokens", "first token", "whole answer"):
        table.add_column(name, justify="right")
    table.add_column("answer", overflow="fold")
    for scale, answer in answers.items():
        times = (f"{1000 * seconds:.0f} ms" for seconds in (answer.first_token_seconds, answer.seconds))
        table.add_row(scale, str(answer.visual_tokens), *times, answer.text)
    Console().print(table)


def _figures(answer: Answer) -> dict[str, Any]:
    figures = {"text": answer.text, "visual_tokens": answer.visual_tokens, "tokens": len(answer.ids)}
    times = {"first_token_ms": 1000 * answer.first_token_seconds, "ms": 1000 * answer.seconds}
    figures |= {"tried": [str(scale) for scale in answer.tried]}
    return {**figures, "logprob": answer.logprob, "finish": answer.finish} | {n: round(t, 1) for n, t in times.items()}


def _cost(answer: Answer) -> str:
    scales = f"scale{'s' * (len(answer.tried) > 1)} {', '.join(map(str, answer.tried))}"
    return f"{answer.visual_tokens} visual tokens at {scales}, {1000 * answer.seconds:.0f} ms"


def converse(model: Model, files: Sequence[Path | str], tokens: str, settings: dict[str, Any]) -> None:
    """A conversation in the terminal, with answers as they are made."""
    print(f"{HELP}\nscales: {', '.join(map(str, model.scales))}", file=sys.stderr)
    tokens = _one_scale(model, tokens)
    model.prompt(Ask("what?", files))  # a bad image is named before a question is typed
    chat, new = model.chat(list(files)), list[str]()
    while (line := _read()) is not None:
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        try:
            if command == "/tokens":
                tokens = _one_scale(model, rest)
            elif command == "/image":
                model.prompt(Ask("what?", rest))  # a bad one is not added
                new = [*new, rest]
                print("(goes with the next question)", file=sys.stderr)
            elif command == "/new":
                chat, new = model.chat(list(files)), []
            elif command.startswith("/"):
                print(HELP, file=sys.stderr)
            elif line:
                chat, new = _turn(chat, line, new, tokens, settings), []
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # ends the answer; while a question is typed, it ends the conversation
            print("\n(stopped; this question is forgotten)", file=sys.stderr)


def _one_scale(model: Model, tokens: str) -> str:
    """A scale for one answer.

    Raises:
        ValueError: It is none of the model's.
    """
    scales = ", ".join(map(str, model.scales))
    if tokens == "all":
        raise ValueError(f"tokens all: a conversation goes on from one answer, expected one of {scales}")
    if not tokens:
        raise ValueError(f"/tokens: expected one of {scales}")
    check(model, tokens)
    return tokens


def _turn(chat: Chat, question: str, new: list[str], tokens: str, settings: dict[str, Any]) -> Chat:
    written = 0

    def write(number: int, scale: Any, answer: Generated, is_all: bool) -> None:
        nonlocal written
        ready = answer.text if is_all else settled(answer.text)
        print(ready[written:], end="", flush=True)
        written = max(written, len(ready))

    answer = chat.ask(question, new, tokens, emit=write, **settings)
    print(f"\n({_cost(answer)})", file=sys.stderr, flush=True)
    return chat


def _read() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None
