"""Test the papers' claims again: train every arm once, and write a table, a picture and a section for each claim.

    python -m experiments.evidence                                   # reading, seed 1, all claims
    python -m experiments.evidence --budget 60 --seeds 1 2 3         # whole claims at one seed first, then more seeds
    python -m experiments.evidence --set documents --claims a b

Run it from the repository's root; OMP_NUM_THREADS limits the threads. What is done is kept in --runs and not repeated;
Ctrl-C and the end of the budget keep a training's steps, too. A run that fails is named and tried again the next time.
Further fields of the command line, such as --trainer.max_steps 50, go to every arm, whose runs are then others.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.evidence import efficientnet, report
from experiments.evidence.claims import Claim, sets
from experiments.evidence.runs import LIT_MM, Failed, OutOfTime, Runs


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(
        "python -m experiments.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add(
        "--set",
        default="reading",
        choices=[*sets("FOLDER")],
        help="the data set",
    )
    add("--claims", nargs="+", default=[], metavar="a", help="letters of claims (default: all)")
    add("--seeds", nargs="+", type=int, default=[1], metavar="1")
    add("--budget", type=float, metavar="MINUTES", help="start no claim that does not fit; stop after this time")
    add("--receipts", default="", metavar="FOLDER", help="folder written by experiments.evidence.receipts")
    add(
        "--variants", nargs="+", default=[], choices=["smollm2", "efficientnet"], help="pretrained parts; slow on a CPU"
    )
    add("--metric", choices=["exact", "anls", "words"], help="metric of the tables (default: the set's)")
    add("--runs", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    add("--to", type=Path, default=Path("runs/evidence/report"), help="folder of the report")
    return found


def main(words: Sequence[str] | None = None, program: Sequence[str] = LIT_MM) -> int:
    """Run what is missing and write the report.

    Args:
        words: Of the command line.
        program: What trains and tests.

    Returns:
        0, 1 if a run failed, 130 after Ctrl-C.
    """
    options, further = parser().parse_known_args(words)
    found = sets(options.receipts, options.variants)
    if options.set not in found:
        parser().error("--set receipts: name their folder with --receipts")
    if "efficientnet" in options.variants:
        efficientnet.write()
    chosen = found[options.set]
    claims = chosen.claims()
    if unknown := set(options.claims) - set(claims):
        parser().error(
            f"--claims: no claim {', '.join(sorted(unknown))} in {options.set}, expected some of {' '.join(claims)}"
        )
    wanted = {letter: claims[letter] for letter in options.claims or claims}
    name = "_".join([options.set, *options.variants])
    deadline = time.monotonic() + 60 * options.budget if options.budget is not None else float("inf")
    runs = Runs(chosen, options.runs / name, tuple(further), deadline, program)
    status = work(runs, wanted, options.seeds)
    write(runs, wanted, options, name, further)
    return status


def work(runs: Runs, claims: dict[str, Claim], seeds: Sequence[int]) -> int:
    """Make all runs that the budget allows, seed after seed and claim after claim."""
    failures: dict[Path, str] = {}
    try:
        for seed in seeds:
            for letter, claim in claims.items():
                left, needed = runs.deadline - time.monotonic(), runs.expected(claim.arms, seed)
                if needed > max(left, 0):
                    minutes = f"about {needed / 60:.0f} minutes, left are {left / 60:.0f}"
                    say(f"claim {letter}, seed {seed}, not begun: {minutes}")
                    continue
                for arm in claim.arms:
                    run = runs.find(arm, seed)
                    if not run.missing or run.folder in failures:
                        continue
                    say(f"claim {letter}, seed {seed}, {arm.name}: {', '.join(run.missing)}")
                    try:
                        runs.make(run)
                    except Failed as failure:
                        failures[run.folder] = str(failure)
                        say(f"failed: {failure}")
    except OutOfTime:
        say("the budget is used up; the same command with more goes on")
    except KeyboardInterrupt:
        say("interrupted; the same command goes on")
        return 130
    for failure in failures.values():
        say(f"failed: {failure}")
    return int(bool(failures))


def write(runs: Runs, claims: dict[str, Claim], options: argparse.Namespace, name: str, further: list[str]) -> None:
    """The report of all claims that have results: NAME.md, and pictures in the folder evidence beside it."""
    metric = options.metric or runs.set.metric
    sections: list[str] = []
    asked = ["--set", options.set, *(["--variants", *options.variants] if options.variants else [])]
    asked += ["--metric", options.metric] if options.metric else []
    for letter, claim in claims.items():
        if found := report.collect(claim, runs, options.seeds, metric):
            picture = f"evidence/{name}_{letter}.png"
            report.draw(found, options.to / picture)
            judged = "exact" if claim.auto else metric  # a chooser is judged as `test` does
            own = [*asked, "--claims", letter, "--seeds", *map(str, found.seeds), *further]
            command = shlex.join(["python", "-m", "experiments.evidence", *own])
            sections.append(report.section(found, letter, command, judged, picture))
        else:
            say(f"claim {letter}: no seed has all its runs yet")
    if sections:
        (options.to / f"{name}.md").write_text("\n".join(sections))
        say(f"{len(sections)} claims: {options.to / name}.md")


def say(text: str) -> None:
    """Print with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    sys.exit(main())
