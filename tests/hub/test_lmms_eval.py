"""lmms-eval with the plugin answers, scores and counts as `Model` and `python -m lit_mm test` do."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lit_mm import load
from lit_mm.data.records import Record
from lit_mm.evaluation.results import read_questions
from lit_mm.hub.lmms_eval.requests import ask_of, pictures, settings_of
from lit_mm.inference.answering import Ask, Model
from lit_mm.inference.decoding import settings
from lit_mm.model.batch import IGNORE_INDEX
from tests.helpers.command_line import OFFLINE, lit_mm
from tests.helpers.environment import ROOT
from tests.helpers.lmms_tasks import write_tasks
from tests.helpers.records import conversation
from tests.helpers.serving import trained_run

RED, BLUE = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))
OPTIONS = ["red", "green", "no", "a long answer"]


def message(role: str, *parts: Any) -> dict[str, Any]:
    """As lmms-eval writes it: texts and images."""
    kinds = [("text", "text") if isinstance(part, str) else ("image", "url") for part in parts]
    content = [{"type": kind, name: part} for (kind, name), part in zip(kinds, parts, strict=True)]
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return trained_run(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def model(run) -> Model:
    return load(run)


def test_messages_are_questions():
    assert ask_of([message("user", RED, BLUE, "which?")], "x") == Ask("<image>\n<image>\nwhich?", [RED, BLUE], [])
    turns = [
        message("system", "be brief"),
        message("user", "left:", RED, "right:", BLUE, "same?"),
        message("assistant", "no"),
        {"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "and this?"}]},
    ]
    history = ["left:\n<image>\nright:\n<image>\nsame?", "no"]
    assert ask_of(turns, "x") == Ask("<video>\nand this?", [RED, BLUE, "a.mp4"], history, "be brief")
    with_markers = [message("user", RED, BLUE, "is <image> like <image>?")]
    assert ask_of(with_markers, "x") == Ask("is <image> like <image>?", [RED, BLUE], [])


def test_messages_are_answered_like_questions(model):
    found = model.answers([ask_of([message("user", RED, BLUE, "which?")], "x")], 4)
    assert found[0]["4"].ids == model.answer([RED, BLUE], "which?", 4).ids


CLIP = {"type": "video", "url": "a.mp4", "start_time": 3.0}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "from nobody, expected user"),
        ([message("system", "hi")], "from nobody, expected user"),
        ([message("user", "a"), message("assistant", "b")], "from user, assistant, expected .* user at the end"),
        ([message("user", "a"), message("user", "b"), message("user", "c")], "from user, user, user"),
        ([message("user", "a"), message("assistant", RED), message("user", "c")], "image in a message from assistant"),
        ([message("system", RED), message("user", "c")], "image in a message from system"),
        ([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "part of type audio"),
        ([{"role": "user", "content": [CLIP]}], "start_time of a video is not supported"),
        ([{"role": "user", "content": [{"type": "image", "url": {"bytes": b""}}]}], "image is a dict with bytes"),
    ],
)
def test_messages_that_are_refused(messages, said):
    with pytest.raises(ValueError, match=f"task, test, document 7: .*{said}"):
        ask_of(messages, "task, test, document 7")


def test_pictures_are_images_and_paths():
    assert pictures(None, "x") == pictures([], "x") == []
    assert pictures([RED, "a.mp4"], "x") == [RED, "a.mp4"]
    for wrong, said in ((None, "NoneType"), ({"array": 0, "sampling_rate": 1}, "dict with array, sampling_rate")):
        with pytest.raises(ValueError, match=f"x: visual 2 is .*{said}"):
            pictures([RED, wrong], "x")


def test_settings_are_honored_or_refused_by_name(model):
    given = {
        "max_new_tokens": 16,
        "temperature": 0,
        "top_p": 1.0,
        "num_beams": 1,
        "do_sample": False,
        "until": ["\n\n"],
    }
    greedy = settings(model.vlm.llm, **settings_of(given))
    assert (greedy.max_new_tokens, greedy.do_sample, greedy.stop_strings) == (16, False, ["\n\n"])
    assert not settings(model.vlm.llm, **settings_of({"temperature": 0.0, "do_sample": True})).do_sample
    sampled = settings(model.vlm.llm, **settings_of({"temperature": 0.7, "do_sample": True, "top_p": 0.9, "seed": 3}))
    assert (sampled.do_sample, sampled.temperature, sampled.top_p) == (True, 0.7, 0.9)
    assert settings_of({"until": "Q:", "stop_sequences": ["A:", None]}) == {"stop_strings": ["Q:", "A:"]}
    assert settings_of({"until": None}) == settings_of({"until": [None]}) == {}
    with pytest.warns(UserWarning, match="image_aspect_ratio original has no effect"):
        assert settings_of({"image_aspect_ratio": "original"}) == {}
    with pytest.raises(ValueError, match="visual_cot: not a setting"):
        settings(model.vlm.llm, **settings_of({"visual_cot": True}))


def test_the_plugin_is_declared():
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed: pip install '.[eval]'")
    [point] = entry_points(group="lmms_eval.models", name="lit_mm")
    found = point.load()()
    assert found.simple_class_path == "lit_mm.hub.lmms_eval.models.SimpleModel"
    assert found.chat_class_path == "lit_mm.hub.lmms_eval.models.ChatModel"


def rows_of(model: Model, folder: Path) -> list[dict[str, Any]]:
    """Six questions about four images; what the model answers at 16 or at 4 tokens is right for some."""
    texts = ["what color is the shape?", "is there a circle?", "red?", "blue?", "why?", "who is it?"]
    rows: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        file = folder / f"images/{number % 4}.png"
        scale = {0: 16, 1: 4}.get(number % 3)
        answer = model.answer(file, text, scale).text.strip() if scale else ""
        rows.append(
            {"image": file.read_bytes(), "question": text, "answer": answer or "none of these", "options": OPTIONS}
        )
    return rows


@pytest.fixture(scope="module")
def tasks(run, model):
    """Tasks for lmms-eval, and the same questions for `test`."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install '.[eval]'")
    folder = run.parent.parent
    rows = rows_of(model, folder)
    items = [
        {
            "id": str(number),
            "image": f"images/{number % 4}.png",
            "conversations": conversation((f"<image>\n{row['question']}", row["answer"])),
        }
        for number, row in enumerate(rows)
    ]
    (folder / "asked.json").write_text(json.dumps(items))
    return write_tasks(folder / "tasks", rows, 3), rows


def lmms_eval(run: Path, tasks: Path, out: Path, model_args: str, *options: str, ranks: int = 1) -> tuple[Any, Any]:
    """The results, and each task's documents in order."""
    launch = ["accelerate.commands.launch", "--cpu", "--num_processes", str(ranks), "-m"] if ranks > 1 else []
    command = [sys.executable, "-m", *launch, "lmms_eval", "--model", "lit_mm", "--include_path", str(tasks)]
    command += ["--model_args", f"pretrained={run},{model_args}", "--log_samples", "--output_path", str(out), *options]
    env = OFFLINE | {"HF_HOME": str(out / "hf"), "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = list(out.rglob("*_results.json"))
    assert written, done.stdout[-3000:] + done.stderr[-3000:]
    samples = {}
    for file in out.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        samples[file.stem.rpartition("lit_mm_")[2]] = sorted(lines, key=lambda line: line["doc_id"])
    return json.loads(written[0].read_text()), samples


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [16, 4])
def test_answers_and_scores_are_those_of_test(run, model, tasks, tmp_path, tokens):
    folder, rows = tasks
    results, samples = lmms_eval(
        run, folder, tmp_path, f"tokens={tokens}", "--tasks", "lit_mm_answers,lit_mm_rounds", "--batch_size", "4"
    )
    root = run.parent.parent
    judged = ["--data.test", str(root / "asked.json"), "--trainer.default_root_dir", str(tmp_path / "ours")]
    lit_mm("test", "--config", str(root / "exp.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt"), *judged)
    [parquet] = (tmp_path / "ours").rglob("*.parquet")
    questions, scales = read_questions(parquet)
    place = scales.index(str(tokens))
    ours = {question.id: question for question in questions}
    assert [sample["filtered_resps"].strip() for sample in samples["answers"]] == [
        ours[str(number)].answers[place].strip() for number in range(len(rows))
    ]
    scores = [ours[str(number)].scores[place] for number in range(len(rows))]
    assert 0 < sum(scores) < len(rows)
    assert results["results"]["lit_mm_answers"]["right,none"] == pytest.approx(np.mean(scores))
    assert results["throughput"]["avg_visual_tokens"] == tokens
    _check_counts(model, rows, samples["answers"], tokens)
    _check_rounds(model, rows, samples["rounds"], tokens)


def _check_counts(model, rows, samples, tokens):
    for row, sample in zip(rows, samples, strict=True):
        prompt = model.prompt(Ask(row["question"], [row["image"]]))
        answer = model.answer(row["image"], row["question"], tokens)
        [counts] = sample["token_counts"]
        assert counts["input_tokens"] == len(prompt.sample.questions[0].input_ids) - 1 + tokens
        assert counts["output_tokens"] == len(answer.ids) + (answer.finish == "stop")


def _labels(model, question, answer) -> int:
    """How many tokens of the answer are supervised in training."""
    encoded = model.conversation.encode(Record("x", (), (question, answer), "x"))
    return sum(label != IGNORE_INDEX for label in encoded.labels)


def _check_rounds(model, rows, samples, tokens):
    for row, sample in zip(rows, samples, strict=True):
        first = model.answer(row["image"], row["question"], tokens).text
        second = model.answer(row["image"], f"{row['question']} you said {first}, and now?", tokens).text
        assert sample["filtered_resps"] == [first, second]


@pytest.mark.slow
def test_simple_models_score_options_on_two_ranks(run, model, tasks, tmp_path):
    folder, rows = tasks
    names = ["--tasks", "lit_mm_answers,lit_mm_choice,lit_mm_rounds", "--batch_size", "2", "--force_simple"]
    results, samples = lmms_eval(run, folder, tmp_path, "tokens=4", *names, ranks=2)
    for row, sample, chosen in zip(rows, samples["answers"], samples["choice"], strict=True):
        answer = model.answer(row["image"], row["question"], 4)
        assert sample["filtered_resps"] == answer.text
        sums = model.score(row["image"], row["question"], OPTIONS, 4)["4"]
        lengths = [_labels(model, row["question"], option) for option in OPTIONS]
        losses = [float(loss) for loss, _ in chosen["filtered_resps"]]
        assert losses == pytest.approx([-own / length for own, length in zip(sums, lengths, strict=True)], rel=1e-4)
        greedy = [str(answer.finish == "stop" and answer.text == option) for option in OPTIONS]
        assert [told for _, told in chosen["filtered_resps"]] == greedy
    _check_rounds(model, rows, samples["rounds"], 4)
    assert results["config"]["model_backend"] == "lit_mm.hub.lmms_eval.models.SimpleModel (simple)"


def request_of(kind: str, *arguments: Any, repeats: int = 1) -> Any:
    """A request of lmms-eval about a red image."""
    from lmms_eval.api.instance import Instance

    told = (*arguments, lambda document: [RED], 0, "colors", "test")
    return Instance(kind, told, 0, {"task": "colors", "doc_id": 0, "repeats": repeats})


def test_the_chooser_chooses(run, tmp_path):
    """Answers and counts of "auto" are those of `Model.answer`; half of the questions go on to a second scale."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install '.[eval]'")
    from lit_mm.hub.lmms_eval.models import SimpleModel

    folder = shutil.copytree(run, tmp_path / "run")
    plain, texts = load(run), ["what is this?", "which color?", "how many?", "is it a circle?"]
    middle = float(np.median([np.mean(plain.answer(RED, text, 1).logprobs) for text in texts]))
    told = {"statistic": "mean", "path": ["1", "16"], "thresholds": [middle], "front": []}
    told["calibrated_on"] = {"step": json.loads((run / "accuracy_tokens_val.json").read_text())["step"]}
    (folder / "chooser.json").write_text(json.dumps(told))
    auto, model = SimpleModel(str(folder), "auto", batch_size=3), load(folder)
    auto.task_dict = {"colors": {"test": [{}]}}
    found = auto.generate_until([request_of("generate_until", text, {}) for text in texts])
    for text, own in zip(texts, found, strict=True):
        expected, prompt = model.answer(RED, text, "auto"), model.prompt(Ask(text, RED))
        assert own.text == expected.text
        assert own.token_counts.input_tokens == sum(model.length(prompt, scale)[0] for scale in expected.tried)
    assert {len(model.answer(RED, text, "auto").tried) for text in texts} == {1, 2}
    with pytest.raises(ValueError, match="likelihoods of given answers are read at one scale"):
        auto.loglikelihood([request_of("loglikelihood", "why?", "red")])


@pytest.fixture
def simple(run):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install '.[eval]'")
    from lit_mm.hub.lmms_eval.models import SimpleModel

    found = SimpleModel(str(run), 4, batch_size=2)
    found.task_dict = {"colors": {"test": [{}]}}
    return found


def test_repeated_questions_get_other_seeds(simple, model):
    hot = {"temperature": 20.0, "do_sample": True, "max_new_tokens": 3, "seed": 5}
    repeated = request_of("generate_until", "why?", hot, repeats=3)
    other = request_of("generate_until", "why?", {"max_new_tokens": 2, "temperature": 0})
    found = [each.text for each in simple.generate_until([repeated, repeated, repeated, other])]
    sampled = [model.answer(RED, "why?", 4, temperature=20.0, max_new_tokens=3, seed=seed).text for seed in (5, 6, 7)]
    assert found == [*sampled, model.answer(RED, "why?", 4, max_new_tokens=2).text]
    assert len({*sampled}) == 3


def test_requests_that_are_refused(simple):
    with pytest.raises(ValueError, match="max_thoughts: not a setting"):
        simple.generate_until([request_of("generate_until", "why?", {"max_thoughts": 3})])
    with pytest.raises(ValueError, match=r"colors: answers without a question .*acc_mutual_info"):
        simple.loglikelihood([request_of("loglikelihood", "", " red")])
    with pytest.raises(ValueError, match="colors, test, document 0: empty text"):
        simple.generate_until([request_of("generate_until", " ", {})])


@pytest.mark.parametrize(
    ("model_args", "said"),
    [
        ({"tokens": "all"}, "run it once for each scale"),
        ({"tokens": 7}, "tokens 7: expected all or one of the model's scales 16, 4, 1"),
        ({"batch_size": "auto"}, "batch_size auto: expected a number from 1"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_model_args_that_are_refused(run, model_args, said):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install '.[eval]'")
    from lit_mm.hub.lmms_eval.models import ChatModel

    with pytest.raises(ValueError, match=said):
        ChatModel(str(run), **model_args)
