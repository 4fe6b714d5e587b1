"""A run is calibrated on its validation, and answers by its chooser from then on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from lit_mm import load
from lit_mm.evaluation.answer_costs import rows_by_cost
from lit_mm.evaluation.results import Judged, read_questions
from lit_mm.inference.choosers import Confidence
from tests.helpers.command_line import lit_mm
from tests.helpers.serving import trained_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("set"))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """With a validation in which the coarsest scale is right where its answer's tokens are likely."""
    folder = tmp_path / "runs/version_0"
    shutil.copytree(trained, folder)
    rng, count = np.random.default_rng(0), 200
    likely, columns = rng.uniform(-2, 0, count), {}
    for scale, right in (("16", np.ones(count)), ("4", rng.integers(0, 2, count)), ("1", likely > -0.5)):
        columns |= {f"answer@{scale}": [f"{own}" for own in right], f"score@{scale}": np.array(right, float)}
        columns |= {
            f"logprob@{scale}": 2 * likely,
            f"least_logprob@{scale}": likely,
            f"margin@{scale}": rng.random(count),
        }
        columns |= {f"tokens@{scale}": [2] * count, f"visual_tokens@{scale}": [int(scale)] * count}
    texts = {"question_id": [str(n) for n in range(count)], "type": [""] * count, "question": ["?"] * count}
    table = pyarrow.table(texts | {"references": [["a"]] * count} | columns)
    pyarrow.parquet.write_table(table, folder / "accuracy_tokens_val.parquet")
    return folder


def test_a_run_is_calibrated_and_answers_by_its_chooser(run, trained):
    printed = lit_mm("calibrate", str(run), "--max_loss", "0")
    told = json.loads((run / "chooser.json").read_text())
    assert told["path"] == ["1", "16"] and told["accuracy"] == 1
    assert told["statistic"] in ("mean", "least") and -0.75 < told["thresholds"][0] < -0.5 + 0.1
    assert "held out" in printed and f"{told['statistic']}, taken" in printed and "oracle" in printed
    model = load(run)
    assert model.chooser == Confidence([1, 16], told["thresholds"], told["statistic"])
    picture = sorted(trained.parent.parent.rglob("*.png"))[0]
    answer = model.answer(picture, "what is this?", "auto")
    assert answer.tried in ([1], [1, 16]) and answer.visual_tokens == sum(answer.tried)
    assert answer.ids == model.answer(picture, "what is this?", answer.scale).ids
    assert load(run, mean_tokens=1).chooser == Confidence([1], [], told["statistic"])


def test_another_targets_chooser_is_another(run):
    lit_mm("calibrate", str(run), "--mean_tokens", "3", "--statistic", "margin")
    told = json.loads((run / "chooser.json").read_text())
    assert (
        told["mean_tokens"] <= 3 and told["statistic"] == "margin" and told["target"] == {"cost": "tokens", "mean": 3}
    )
    lit_mm("calibrate", str(run), "--mean_gflops", "1", "--statistic", "least")
    assert json.loads((run / "chooser.json").read_text())["target"] == {"cost": "flops", "mean": 1e9}


def test_other_weights_are_told(run):
    lit_mm("calibrate", str(run))
    file = run / "chooser.json"
    file.write_text(file.read_text().replace('"step": ', '"step": 1'))
    with pytest.warns(UserWarning, match="validate and calibrate again"):
        load(run)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mean_tokens", "0.5"), "no chooser has a mean cost of 0.5: expected 1"),
        (("--mean_tokens", "3", "--max_loss", "0.1"), "expected one of --mean_tokens"),
        (("--mean_tokens", "3", "--cost", "ms"), "--cost ms goes with --max_loss"),
    ],
)
def test_wrong_targets_are_named(run, arguments, said):
    with pytest.raises(AssertionError, match=said):
        lit_mm("calibrate", str(run), *arguments)
    assert not (run / "chooser.json").exists()


def test_a_run_without_a_validation_is_named(run):
    (run / "accuracy_tokens_val.parquet").unlink()
    with pytest.raises(AssertionError, match=r"no .*accuracy_tokens_val.parquet: run `validate` first"):
        lit_mm("calibrate", str(run))
    with pytest.raises(FileNotFoundError, match="mean_tokens 3: no"):
        load(run, mean_tokens=3)


def test_costs_by_hand():
    question = Judged("1", "", "?", ["a"], ["x", "y"], [1, 0], [-1, -1], [32, 2], [3, 1], [-1, -1], [1, 1])
    times = {"encode_ms": {"median": 10}, "first_token_ms": {"median": 14}, "further_token_ms": {"median": 2}}
    quick = times | {"first_token_ms": {"median": 11}}
    rows = [
        {"scale": "16", "encode_flops": 100.0, "prefill_flops": 50.0, "measured": times},
        {"scale": "1", "encode_flops": 100.0, "prefill_flops": 5.0, "measured": quick},
    ]
    found = rows_by_cost([question], rows)
    assert {name: (own.costs.tolist(), own.once) for name, own in found.items()} == {
        "tokens": ([[32, 2]], 0),
        "flops": ([[50, 5]], 100),
        "ms": ([[4 + 2 * 2, 1]], 10),
    }
    assert all("router" not in own.statistics for own in found.values())
    question.router = [-0.5, -1.0]
    rows[1] |= {"router_flops": 7.0, "measured": quick | {"router_ms": {"median": 0.5}}}
    routed = {name: own.routed.tolist() for name, own in rows_by_cost([question], rows).items()}
    assert routed == {"tokens": [[34, 2]], "flops": [[50 + 5 + 7, 5 + 7]], "ms": [[8 + 1 + 0.5, 1 + 0.5]]}
    question.tokens = [3, 4]  # an answer at the coarsest scale that is left after its first token
    assert rows_by_cost([question], rows)["ms"].routed.tolist() == [[8 + 1 + 0.5, 1 + 3 * 2 + 0.5]]
    assert list(rows_by_cost([question], [{"scale": "16"}, {"scale": "1", "measured": None}])) == ["tokens"]


def test_a_test_is_judged_with_thresholds_of_validation_only(trained, run):
    """Two tests with other questions use the chooser's file as it is, and their figures follow from their rows."""
    lit_mm("calibrate", str(run), "--max_loss", "0")
    told = (run / "chooser.json").read_bytes()
    config = trained.parent.parent / "exp.yaml"
    for name in ("val", "train"):
        common = ("--config", str(config), "--ckpt_path", str(run / "checkpoints/last.ckpt"))
        root = ("--trainer.default_root_dir", str(run.parent))
        printed = lit_mm("test", *common, *root, "--data.test", str(trained.parent.parent / f"{name}.json"))
        assert (run / "chooser.json").read_bytes() == told
        assert "The scale chosen per question" in printed
        found = json.loads((run / "accuracy_tokens.json").read_text())["chooser"]
        questions, scales = read_questions(run / "accuracy_tokens.parquet")
        threshold, rule = json.loads(told)["thresholds"][0], json.loads(told)["statistic"]
        place, scores, tokens = scales.index("1"), [], []
        for question in questions:
            mean = question.logprobs[place] / question.tokens[place]
            stands = (question.least_logprobs[place] if rule == "least" else mean) >= threshold
            scores.append(question.scores[place if stands else 0])
            tokens.append(question.visual_tokens[place] + (0 if stands else question.visual_tokens[0]))
        auto = found["costs"]["tokens"]["auto"]
        assert (auto["accuracy"], auto["cost"]) == pytest.approx((np.mean(scores), np.mean(tokens)))
        assert (run / "accuracy_tokens_chooser.png").read_bytes().startswith(b"\x89PNG")


def test_a_validation_has_no_auto(trained):
    assert "chooser" not in json.loads((trained / "accuracy_tokens_val.json").read_text())


def test_predict_writes_the_chosen_answers(trained, run, tmp_path):
    """Those of `tokens="auto"`, asked by themselves."""
    root, pictures = trained.parent.parent, sorted((trained.parent.parent / "images").rglob("*.png"))[:3]
    asked = [
        {"question_id": n, "image": str(p.relative_to(root)), "text": f"what {n}?"} for n, p in enumerate(pictures)
    ]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    lit_mm("calibrate", str(run), "--max_loss", "0", "--statistic", "mean")
    told, model = json.loads((run / "chooser.json").read_text()), load(run)
    means = [np.mean(model.answer(p, each["text"], 1).logprobs) for p, each in zip(pictures, asked, strict=True)]
    told["thresholds"] = [float(np.sort(means)[:2].mean())]
    (run / "chooser.json").write_text(json.dumps(told))
    files = ("--data.predict", str(tmp_path / "ask.jsonl"), "--trainer.default_root_dir", str(run.parent))
    common = ("--config", str(root / "exp.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt"), *files)
    lit_mm("predict", *common)
    lines = [json.loads(line) for line in (run / "answers_0/answers.jsonl").read_text().splitlines()]
    chosen, model = [line for line in lines if line["scale"] == "auto"], load(run)
    answers = [model.answer(p, each["text"], "auto") for p, each in zip(pictures, asked, strict=True)]
    assert [(line["text"], line["visual_tokens"]) for line in chosen] == [(a.text, a.visual_tokens) for a in answers]
    assert sorted(line["visual_tokens"] for line in chosen) == [1, 1, 17]
    assert len((run / "answers_0/answers@auto.jsonl").read_text().splitlines()) == 3
    lit_mm("predict", *common, "--scales", "4")
    assert not (run / "answers_1/answers@auto.jsonl").exists()
    with pytest.raises(AssertionError, match="the chooser tries scale 1, which is not asked"):
        lit_mm("predict", *common, "--scales", "4", "--answers.mean_tokens", "17")
