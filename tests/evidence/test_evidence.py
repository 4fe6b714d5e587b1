"""The driver of the evidence, with a stand-in for lit_mm and once with lit_mm itself."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments.evidence import __main__ as driver
from experiments.evidence import choosers, compare, report
from experiments.evidence.claims import sets
from experiments.evidence.runs import Runs, resolved
from lit_mm.evaluation.answer_costs import rows_by_cost
from lit_mm.evaluation.results import Judged, write_questions
from tests.helpers.command_line import forked
from tests.helpers.environment import ROOT
from tests.helpers.evidence import STAND_IN


class StandIn:
    """The driver with a stand-in for lit_mm."""

    def __init__(self, folder: Path, bad: str = "none", slow: str = "none") -> None:
        self.folder, self.script, self.log = folder, folder / "lit_mm.py", folder / "calls.txt"
        self.script.write_text(STAND_IN.format(root=str(ROOT), log=str(self.log), bad=bad, slow=slow))

    @property
    def words(self) -> list[str]:
        return ["--runs", str(self.folder / "runs"), "--to", str(self.folder / "report")]

    def __call__(self, *words: str) -> int:
        return driver.main(["--set", "boards", *self.words, *words], [sys.executable, str(self.script)])

    def calls(self, verb: str) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.is_file() else []
        return [line for line in lines if line.startswith(verb)]

    def states(self) -> dict[str, dict]:
        found = (self.folder / "runs/boards").glob("*/state.json")
        return {file.parent.name.rsplit("_", 1)[0]: json.loads(file.read_text()) for file in found}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_each_run_is_trained_once_and_found_again(tmp_path):
    evidence = StandIn(tmp_path)
    assert evidence("--claims", "a", "b") == 0
    assert len(evidence.calls("fit")) == 4, "nested and three specialists; b has none of its own"
    assert len(evidence.calls("test")) == 5, "one specialist is tested twice"
    assert not evidence.calls("calibrate")
    before = evidence.log.read_text()
    assert evidence("--claims", "b", "a") == 0
    assert evidence.log.read_text() == before
    evidence("--claims", "b", "--seeds", "1", "2")
    assert len(evidence.calls("fit")) == 6
    evidence("--claims", "b", "--trainer.max_steps", "3")
    assert len(evidence.calls("fit")) == 8, "other settings are other runs"
    assert (tmp_path / "report/boards.md").read_text().startswith("### b. ")


def test_a_test_that_did_not_end_is_repeated_without_training(tmp_path):
    evidence = StandIn(tmp_path)
    evidence("--claims", "b")
    for file in (tmp_path / "runs/boards").glob("nested*/state.json"):
        state = json.loads(file.read_text())
        del state["seconds"]["test"]
        file.write_text(json.dumps(state))
    evidence("--claims", "b")
    assert len(evidence.calls("fit")) == 2
    assert len(evidence.calls("test")) == 3


def test_a_failed_run_is_named_and_does_not_stop_the_others(tmp_path, capsys):
    evidence = StandIn(tmp_path, bad="sequential")
    assert evidence("--claims", "e", "d") == 1
    said = capsys.readouterr().out
    assert "failed: sequential_seed1_" in said
    assert "no such luck" in said
    assert "claim e: no seed has all its runs yet" in said
    assert {*evidence.states()} == {"nested_seed1", "sequential_seed1", "spatial_seed1", "frozen_llm_seed1"}
    assert (tmp_path / "report/boards.md").read_text().startswith("### d. ")
    again = StandIn(tmp_path)
    assert again("--claims", "e", "d") == 0
    assert len(again.calls("fit")) == 5, "the failed one alone is tried again"


def test_a_budget_begins_whole_claims_only(tmp_path, capsys):
    evidence = StandIn(tmp_path)
    evidence("--claims", "b")
    for file in (tmp_path / "runs/boards").glob("*/state.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": {"fit": 60, "calibrate": 1, "test": 59}}))
    evidence("--claims", "a", "d", "--budget", "3")  # two minutes a run: a lacks two runs, d one
    assert "claim a, seed 1, not begun: about 4 minutes, left are 3" in capsys.readouterr().out
    assert {*evidence.states()} == {"nested_seed1", "single_16_seed1", "frozen_llm_seed1"}


def test_the_budgets_end_stops_a_training_which_then_goes_on(tmp_path, capsys):
    evidence = StandIn(tmp_path, slow="frozen_llm")
    assert evidence("--claims", "d", "--budget", "0.15") == 0  # nine seconds; the stand-in would sleep for sixty
    assert "the budget is used up" in capsys.readouterr().out
    assert len(evidence.calls("fit")) == 1
    assert evidence("--claims", "d") == 0
    _, again, other = evidence.calls("fit")
    checkpoint = next((tmp_path / "runs/boards").glob("frozen_llm*")) / "version_0/checkpoints/last.ckpt"
    assert again.endswith(f"--ckpt_path {checkpoint}")
    assert "--ckpt_path" not in other
    assert evidence.states()["frozen_llm_seed1"]["seconds"]["fit"] >= 8, "the time before counts"


def test_ctrl_c_keeps_what_is_done(tmp_path):
    evidence = StandIn(tmp_path, slow="nested")
    code = "import sys; from experiments.evidence.__main__ import main; sys.exit(main(sys.argv[2:], sys.argv[:0] + "
    code += "[sys.executable, sys.argv[1]]))"
    command = [sys.executable, "-c", code, str(evidence.script), "--set", "boards", *evidence.words, "--claims", "d"]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # the tests may be a shell's background job
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, preexec_fn=heed)  # noqa: PLW1509
    while len(evidence.calls("fit")) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert {*evidence.states()["frozen_llm_seed1"]["seconds"]} == {"fit", "test"}
    assert len(list((tmp_path / "runs/boards").glob("nested*/version_0/checkpoints/last.ckpt"))) == 1
    assert evidence("--claims", "d") == 0


def test_claims_and_options_that_there_are_not(tmp_path, capsys):
    with pytest.raises(SystemExit):
        driver.main(["--set", "boards", "--claims", "z"])
    assert "no claim z in boards, expected some of a b c d e f g" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"expected options as --FIELD VALUE, found .*--trainer\.max_steps"):
        Runs(sets()["boards"], tmp_path, ("--trainer.max_steps",)).find(sets()["boards"].claims()["d"].arms[0], 1)


def test_settings_are_merged_as_the_command_line_does(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {scales: [4], parts: {llm: {lr: 1}}}\n")
    (tmp_path / "b.yaml").write_text("model: {parts: {llm: {frozen: true}}}\n")
    found = resolved([tmp_path / "a.yaml", tmp_path / "b.yaml"], ["--model.scales", "[2, 1]", "--model.parts.llm.lr=3"])
    assert found == {"model": {"scales": [2, 1], "parts": {"llm": {"lr": 3, "frozen": True}}}}


@pytest.mark.slow
def test_every_arm_parses(monkeypatch, capsys):
    from lit_mm.cli import LitMMCLI

    monkeypatch.setattr("sys.argv", ["lit_mm"])
    for name, chosen in sets(receipts="receipts").items():
        arms = {arm.name: arm for claim in chosen.claims().values() for arm in claim.arms}
        for arm in arms.values() if name == "boards" else [arms["nested"]]:
            run = Runs(chosen, Path("runs")).find(arm, 5)
            with pytest.raises(SystemExit) as stopped:
                LitMMCLI([*run.steps["fit"], "--print_config"])
            assert stopped.value.code == 0, (name, arm)
            assert "seed_everything: 5" in capsys.readouterr().out


def test_paired_differences_against_arithmetic():
    baseline = np.array([[1.0, 0, 1, 0], [1, 1, 1, 0]])
    scores = np.array([[1.0, 1, 1, 0], [1, 1, 0, 1]])
    mean, low, high = report.difference(scores, baseline)
    own = np.array([0, 50, -50, 50])  # of each question, the mean of two seeds, in points
    assert mean == own.mean() == 12.5
    drawn = np.random.default_rng(5).choice(own, (20000, 4)).mean(1)
    np.testing.assert_allclose([low, high], np.quantile(drawn, [0.025, 0.975]), atol=12.5)
    assert report.difference(scores, scores) == (0, 0, 0)


def test_the_table_is_what_the_answers_say(tmp_path):
    evidence = StandIn(tmp_path)
    evidence("--claims", "a", "--seeds", "1", "2")
    boards = sets()["boards"]
    runs, claim = Runs(boards, tmp_path / "runs/boards"), boards.claims()["a"]
    head, *lines = report.table(report.collect(claim, runs, [1, 2, 3], "exact"))
    assert head == ["questions", "tokens", "specialists", "nested", "nested - specialists, points"]
    # question n of 20 is right if n < scale + seed: 17 and 18 at 16 tokens, 5 and 6 at 4, of which 3 and 3 even
    assert lines[0] == ["all (20)", "16", "87.5 (85.0 to 90.0)", "87.5 (85.0 to 90.0)", "+0.0 (+0.0 to +0.0)"]
    assert lines[1][:3] == ["all (20)", "4", "27.5 (25.0 to 30.0)"]
    assert [line[:3] for line in lines if line[0].startswith("row")][1] == ["row (10)", "4", "30.0 (30.0 to 30.0)"]


def test_runs_with_other_questions_are_not_compared(tmp_path):
    evidence = StandIn(tmp_path)
    evidence("--claims", "d")
    boards = sets()["boards"]
    runs, claim = Runs(boards, tmp_path / "runs/boards"), boards.claims()["d"]
    folder = runs.find(claim.arms[0], 1).results
    questions, scales = report.read_questions(folder / "accuracy_tokens.parquet")
    write_questions(folder / "accuracy_tokens.parquet", questions[:-1], scales)
    with pytest.raises(ValueError, match="were asked different questions"):
        report.collect(claim, runs, [1], "exact")


def hard_and_easy() -> list[Judged]:
    """Ten questions: half need 4 tokens, and of six the margin is 0 at 1 token."""
    answers, scores, margins = [], [], []
    for number in range(10):
        hard = number < 5
        scores.append([1.0, float(not hard)])
        margins.append([1.0, 0.0 if hard or number == 5 else 1.0])
        answers.append(["7", "8" if hard else "7"])
    return [
        Judged(str(n), "", "?", ["7"], answers[n], scores[n], [-0.1] * 2, [4, 1], [1] * 2, [-0.1] * 2, margins[n])
        for n in range(10)
    ]


def test_any_runs_are_compared(tmp_path, capsys):
    """Two seeds: on one side 5 of 10 answers are right at 1 token, on the other 5 and 10; all are at 4."""
    better = [replace(own, scores=[1.0, 1.0]) for own in hard_and_easy()]
    for name, questions in {"a1": hard_and_easy(), "a2": hard_and_easy(), "b1": hard_and_easy(), "b2": better}.items():
        (tmp_path / name).mkdir()
        write_questions(tmp_path / name / "accuracy_tokens.parquet", questions, ["4", "1"])
    sides = [f"{name}={tmp_path / name[0]}1,{tmp_path / name[0]}2" for name in ("a side", "b side")]
    compare.main([*sides, "--picture", str(tmp_path / "gain.png")])
    head, _, finest, coarsest = capsys.readouterr().out.splitlines()
    assert head == "| questions | tokens | a side | b side | b side - a side, points |"
    assert finest.startswith("| all (10) | 4 | 100.0 (100.0 to 100.0) | 100.0 (100.0 to 100.0) | +0.0 (+0.0 to +0.0)")
    assert coarsest.startswith("| all (10) | 1 | 50.0 (50.0 to 50.0) | 75.0 (50.0 to 100.0) | +25.0 (")
    assert Image.open(tmp_path / "gain.png").width > 500
    with pytest.raises(ValueError, match=r"expected equally many runs of every side, found .*'one': 1"):
        compare.main([*sides, f"one={tmp_path / 'a1'}"])
    write_questions(tmp_path / "b1/accuracy_tokens.parquet", better[:-1], ["4", "1"])
    with pytest.raises(ValueError, match="b1: was asked different questions than the first run"):
        compare.main(sides)
    for words in (["a1"], ["a=a1", "a=a2"], ["a=a1,"], ["=", "b=a1"]):
        with pytest.raises(SystemExit):
            compare.main(words)
        assert "expected NAME=RUN,RUN for each side, each with another name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        compare.main([*(f"{name}=a1" for name in "abcd"), "--picture", "gain.png"])
    assert "--picture: expected at most 3 sides, found 4" in capsys.readouterr().err


def test_sides_with_different_scales(tmp_path, capsys):
    """No scale is left out of the table or drawn at another's place; videos' are sets of frames times tokens."""
    scales = {"a": ["2x4", "2x1"], "b": ["2x1", "1x1"]}
    for name, own in scales.items():
        (tmp_path / name).mkdir()
        write_questions(tmp_path / name / "accuracy_tokens.parquet", hard_and_easy(), own)
    compare.main([f"{name}={tmp_path / name}" for name in scales])
    lines = [[*map(str.strip, line.split("|"))] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[2:5] for line in lines] == [["2x4", "100.0", ""], ["2x1", "50.0", "100.0"], ["1x1", "", "50.0"]]
    sides = {name: [tmp_path / name] for name in scales}
    axes = Figure().subplots()
    found = compare.compared(sides, argparse.Namespace(metric="exact", title=""))
    report._bars(axes, "all", found.groups["all"])
    assert [round(bar.get_x() + bar.get_width() / 2, 6) for bar in axes.patches] == [0, 1, 1.4, 2.4]
    with pytest.raises(ValueError, match=r"b: expected the scales of .*a, \['2x4', '2x1'\], found \['2x1', '1x1'\]"):
        compare.main([f"all={tmp_path / 'a'},{tmp_path / 'b'}"])


def test_choosers_at_budgets():
    rows = rows_by_cost(hard_and_easy(), [{"scale": "4"}, {"scale": "1"}])["tokens"]
    head, _, *lines = choosers.table([(rows, rows)] * 2, [1, 3.4]).splitlines()
    found = {line.split(" | ")[0].strip("| "): line.strip("|").split(" | ")[1:] for line in lines}
    assert head == "| chooser | mean tokens ≤ 1 | mean tokens ≤ 3.4 |"
    assert [cell.strip() for cell in found["margin"]] == ["50.0 ± 0.0 at 1.0", "100.0 ± 0.0 at 3.4"]
    assert [cell.strip() for cell in found["mean"]] == ["50.0 ± 0.0 at 1.0"] * 2, "it is equal for all questions"
    assert [cell.strip() for cell in found[choosers.MIXTURE]] == ["50.0 ± 0.0"] * 2


def test_choices_against_arithmetic(tmp_path):
    """Ten questions: half need 4 tokens. The chooser tries 1, then 4 where the first answer is uncertain."""
    questions = hard_and_easy()
    write_questions(tmp_path / "accuracy_tokens.parquet", questions, ["4", "1"])
    (tmp_path / "accuracy_tokens.json").write_text(json.dumps({"scales": [{"scale": "4"}, {"scale": "1"}]}))
    rule = {"statistic": "margin", "path": ["1", "4"], "thresholds": [0.5], "accuracy": 1.0, "front": []}
    (tmp_path / "chooser.json").write_text(json.dumps(rule))
    found = {name: (scores.mean(), tokens) for name, (scores, tokens) in report.choices(tmp_path).items()}
    paid = 1 + 0.6 * 4  # six questions go on
    assert found["fixed 4"] == (1, 4)
    assert found["fixed 1"] == (0.5, 1)
    assert found["auto"] == pytest.approx((1, paid))
    assert found["random"] == pytest.approx((0.6 * 1 + 0.4 * 0.5, 0.6 * 4 + 0.4 * 1))
    assert found["best mixture"] == pytest.approx((0.5 + 0.5 * (paid - 1) / 3, paid))
    assert found["oracle"] == pytest.approx((1, 2.5))


@pytest.mark.slow
def test_lit_mm_itself(tmp_path, monkeypatch):
    """Tiny settings; auto, too. In processes that have imported everything: the stand-in's begin anew."""
    monkeypatch.setattr(Runs, "_process", lambda runs, command, log: forked([*command], log)[0])
    data = ["--data.init_args.root", str(tmp_path / "data")]
    for split, count in {"train": "32", "val": "8", "test": "4"}.items():
        data += [f"--data.init_args.{split}_images", count]
    short = ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--data.init_args.caption_epochs", "1"]
    words = [
        "--set",
        "boards",
        "--runs",
        str(tmp_path / "runs"),
        "--to",
        str(tmp_path / "report"),
        "--claims",
        "b",
        "g",
        *data,
        *short,
    ]
    assert driver.main(words) == 0
    text = (tmp_path / "report/boards.md").read_text()
    assert "| all (28) | 16 |" in text
    assert "| best mixture |" in text
    assert all((tmp_path / f"report/evidence/boards_{letter}.png").stat().st_size > 5000 for letter in "bg")
    pooled = [row for row in text.splitlines() if row.startswith("| color (4) | 1 |")]
    assert len(pooled) == 1


def test_words_are_right_at_their_places():
    references = ["blue 1234 5678"]
    answers = ["blue 1234 5679", "red 5678 1234 9", "", "blue 1234 5678"]
    question = Judged("0", "", "?", references, answers, [0.0] * 4, [0.0] * 4, [9] * 4, [1] * 4, [0.0] * 4, [0.0] * 4)
    found = report.scored([question, question], "words")
    assert {name: scores.tolist()[1] for name, scores in found.items()} == {
        "all": pytest.approx([2 / 3, 0, 0, 1]),
        "numbers": [0.5, 0, 0, 1],
        "other words": [1, 0, 0, 1],
    }


def test_variants_are_overlays_and_other_runs():
    plain, smol = (sets(variants=names)["reading"] for names in ((), ("smollm2",)))
    arm = plain.claims()["d"].arms[1]
    run, other = (Runs(each, Path("runs")).find(arm, 1) for each in (plain, smol))
    assert run.folder != other.folder
    assert "experiments/evidence/smollm2.yaml" in other.words
    assert "c" not in sets(variants=["efficientnet"])["reading"].claims(), "its stages cannot be left out"
    assert "f" not in sets()["demo"].claims(), "a step of the quickstart has one scale"


def test_auto_is_calibrated_before_its_test():
    boards = sets()["boards"]
    [arm] = boards.claims()["g"].arms
    run = Runs(boards, Path("runs")).find(arm, 1)
    assert [*run.steps] == ["fit", "calibrate", "test_auto"]
    assert run.folder == Runs(boards, Path("runs")).find(boards.claims()["e"].arms[0], 1).folder
