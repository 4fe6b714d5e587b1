"""The papers' claims that are tested again, and the trainings (arms) that each compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path("experiments/evidence")
ABLATIONS = Path("experiments/ablations")


@dataclass(frozen=True)
class Arm:
    """A training and its test.

    Args:
        name: Names its folder.
        overlays: YAML files after the set's own.
        options: Further fields of the command line, for fit and test.
        scales: At which it answers, finest first.
        judged: Further fields for the test alone.
        auto: Whether a chooser is calibrated before the test.
    """

    name: str
    overlays: tuple[Path, ...]
    options: tuple[str, ...]
    scales: tuple[int, ...]
    judged: tuple[str, ...] = ()
    auto: bool = False


@dataclass(frozen=True)
class Claim:
    """What is compared.

    Args:
        title: The claim in a few words.
        paper: What the paper says.
        sides: Name -> its arms, each of which answers at other scales. The first side is what the others are
            compared with.
        note: What a reader must know of how it is tested here.
        auto: Whether the scales that a chooser takes are compared, of the only side.
    """

    title: str
    paper: str
    sides: dict[str, tuple[Arm, ...]]
    note: str = ""
    auto: bool = False

    @property
    def arms(self) -> list[Arm]:
        """All arms, each once."""
        return list(dict.fromkeys(arm for side in self.sides.values() for arm in side))


@dataclass(frozen=True)
class Set:
    """A data set with its model.

    Args:
        config: Its YAML file.
        scales: Finest first.
        side: Of its images, pixels; 0: no claim about images of half the side.
        metric: What its tables tell: exact, anls, or words, the share of an answer's words at their places.
        overlays: Variants of the model: YAML files after `config`, and before an arm's own.
        options: Further fields of the command line, such as the place of the data.
        seeded: Whether the data has a seed of its own.
        one_scale: Whether a step trains one scale, drawn at random, as the quickstart's.
    """

    config: Path
    scales: tuple[int, ...]
    side: int = 0
    metric: str = "exact"
    overlays: tuple[Path, ...] = ()
    options: tuple[str, ...] = ()
    seeded: bool = True
    one_scale: bool = False

    def arm(self, name: str, *words: str, overlay: str = "", scales: tuple[int, ...] = ()) -> Arm:
        """One arm; `overlay` is the name of an ablation."""
        asked = ("--model.scales", str([*scales])) if scales else ()
        overlays = (ABLATIONS / f"{overlay}.yaml",) if overlay else ()
        return Arm(name, overlays, (*asked, *words), scales or self.scales)

    def claims(self) -> dict[str, Claim]:
        """Letter -> claim, in the order in which they are tested."""
        finest = self.scales[0]
        nested = self.arm("nested")
        single = tuple(self.arm(f"single_{scale}", scales=(scale,)) for scale in self.scales)
        equal = (
            "A specialist sees as many images in as many steps; the nested model shares its weights among all scales."
        )
        if self.one_scale:
            equal += f" A step trains one scale, so that each has 1/{len(self.scales)} of its specialist's steps."
        pooled = replace(single[0], scales=self.scales, judged=("--model.scales", str([*self.scales])))
        found = {
            "a": Claim(
                "A nested model equals its specialists",
                "M3 (arXiv 2405.17430): one model trained on the mean loss of all scales answers at each as well as a "
                "model trained at that scale alone.",
                {"specialists": single, "nested": (nested,)},
                equal,
            ),
            "b": Claim(
                "Pooling only in the test is no substitute",
                "M3, MMBench at 576, 144, 36, 9, 1 tokens: 65.9 66.4 64.8 63.1 59.5 nested; 67.2 61.7 50.8 45.5 19.3 "
                "where a model trained at 576 is pooled only in the test.",
                {"pooled in the test": (pooled,), "nested": (nested,)},
            ),
        }
        if self.side:
            smaller = ("--data.init_args.image.size", str(self.side // 2))
            four = self.arm("four_stages", *smaller, overlay="four_stages", scales=(finest,))
            half, whole = f"four stages, {self.side // 2} pixels", f"five stages, {self.side} pixels"
            found["c"] = Claim(
                "A fifth stage buys resolution at no cost in tokens",
                "ConvLLaVA (arXiv 2405.15738): with as many tokens, five stages at twice the resolution are better "
                "than four.",
                {half: (four,), whole: (single[0],)},
                "The same tokens for the LLM; the encoder has four times the pixels, and a stage more.",
            )
        frozen = self.arm("frozen_llm", overlay="frozen_llm")
        ways = {name: (self.arm(name, overlay=f"sampling_{name}"),) for name in ("sequential", "spatial")}
        found |= {
            "d": Claim(
                "The LLM has to be trained, too",
                "ConvLLaVA trains only stage 5 and the projector first, then the LLM in both further stages.",
                {"frozen LLM": (frozen,), "trained LLM": (nested,)},
                "The LLM starts at random in sets that do not name a pretrained one: frozen, it stays random.",
            ),
            "e": Claim(
                "Means are better than a choice of tokens",
                "M3: average pooling beats sequential and spatial sampling.",
                {"mean": (nested,), **ways},
            ),
        }
        if not self.one_scale:  # consistency needs two
            found["f"] = Claim(
                "Consistency helps coarse scales",
                "EPIC (arXiv 2510.00515): without the KL term to a model with slightly more tokens the average of its "
                "benchmarks is 1.5 points lower.",
                {"without": (nested,), "with consistency": (self.arm("consistency", overlay="consistency"),)},
                "`model.consistency.weight 1.0`: the teacher is the same model at its finest scale.",
            )
        if self.metric != "words":
            found["g"] = Claim(
                "The scale can be chosen per question",
                "AVG-LLaVA (arXiv 2410.02745), ChartQA: 66.3 with a router, 66.4 at the best fixed scale, 56.8 with "
                "random scales.",
                {"nested": (replace(nested, auto=True),)},
                "Thresholds come from the validation images (`calibrate`). Tokens are those of all scales tried; the "
                "oracle pays for one.",
                auto=True,
            )
        return found


def sets(receipts: str = "", variants: Sequence[str] = ()) -> dict[str, Set]:
    """Every set that can be tested.

    Args:
        receipts: Folder that `experiments.evidence.receipts` has written; empty: there are none.
        variants: Names of YAML files in this folder that change the model, such as smollm2.
    """
    overlays = tuple(FOLDER / f"{name}.yaml" for name in variants)
    stages = "efficientnet" not in variants  # an encoder whose stages can be left out
    quickstart = Set(Path("experiments/quickstart.yaml"), (16, 4, 1), overlays=overlays, seeded=False, one_scale=True)
    found = {
        "demo": quickstart,
        "reading": Set(FOLDER / "reading.yaml", (16, 4, 1), 64 if stages else 0, "words", overlays),
        "boards": Set(FOLDER / "boards.yaml", (16, 4, 1), 64 if stages else 0, "exact", overlays),
        "documents": Set(FOLDER / "documents.yaml", (64, 16, 4, 1), 256 if stages else 0, "exact", overlays),
    }
    if receipts:
        files = {"train": "train.json", "val": "val.json", "test": "test.json", "image_root": ""}
        options = tuple(f"--data.init_args.{name}={Path(receipts, file)}" for name, file in files.items())
        found["receipts"] = Set(FOLDER / "receipts.yaml", (64, 16, 4, 1), 0, "anls", overlays, options)
    return found
