"""A stand-in for lit_mm: a program that writes what a fit, a calibration and a test leave, at once."""

import json
from pathlib import Path

from lit_mm.evaluation.results import Judged, write_questions

STAND_IN = """
import json, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
words = sys.argv[1:]
with Path({log!r}).open("a") as log:
    print(" ".join(words), file=log)
told = dict(zip(words, words[1:]))
if words[0] == "calibrate":
    Path(words[1], "chooser.json").write_text("{{}}")
    sys.exit()
folder = Path(told["--trainer.default_root_dir"], "version_0")
if words[0] == "fit":
    if {bad!r} in str(folder):
        sys.exit("error: no such luck")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if {slow!r} in str(folder) and "--ckpt_path" not in words:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            (folder / "checkpoints/last.ckpt").touch()
            sys.exit(130)
    (folder / "checkpoints/last.ckpt").touch()
    sys.exit()
from tests.helpers.evidence import answered
scales = [value for name, value in zip(words, words[1:]) if name == "--model.scales"] or ["[16, 4, 1]"]
answered(folder, json.loads(scales[-1]), int(told["--seed_everything"]))
"""


def answered(folder: Path, scales: list[int], seed: int) -> None:
    """What a test of 20 questions writes; the finer the scale and the larger the seed, the more are right."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(scale) for scale in scales]
    questions = [
        Judged(
            str(number),
            "cell" if number % 2 else "row",
            "?",
            ["7"],
            ["7"] * len(scales),
            [float(number < scale + seed) for scale in scales],
            [-0.1] * len(scales),
            scales,
            [1] * len(scales),
            [-0.1] * len(scales),
            [1.0] * len(scales),
        )
        for number in range(20)
    ]
    write_questions(folder / "accuracy_tokens.parquet", questions, names)
    run = {"device": "a machine", "versions": {"torch": "1", "transformers": "2"}}
    (folder / "accuracy_tokens.json").write_text(
        json.dumps({"run": run, "scales": [{"scale": name} for name in names]})
    )
