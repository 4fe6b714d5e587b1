"""The server lets the model's chooser decide, and tells and counts every scale that was tried."""

import json
import shutil

import numpy as np
import pytest

from lit_mm import load
from tests.helpers.browser import page, until  # noqa: F401 (a fixture)
from tests.helpers.command_line import forked
from tests.helpers.serving import Serving, asked, data_url, image_part, tokens, trained_run

QUESTIONS = ["what is this?", "which color?", "how many?", "is it a circle?", "where?", "why?"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server, the model with its chooser, and a picture; about half of the questions go on to the second scale."""
    folder = tmp_path_factory.mktemp("set")
    trained = trained_run(folder)
    run = folder / "served/version_0"
    shutil.copytree(trained, run)
    picture = sorted(folder.rglob("*.png"))[0]
    plain = load(run)
    means = [np.mean(plain.answer(picture, text, 1).logprobs) for text in QUESTIONS]
    middle = float(np.sort(means)[2:4].mean())
    told = {"statistic": "mean", "path": ["1", "16"], "thresholds": [middle], "front": []}
    told["calibrated_on"] = {"step": json.loads((run / "accuracy_tokens_val.json").read_text())["step"]}
    (run / "chooser.json").write_text(json.dumps(told))
    with Serving(run, folder / "log") as server:
        yield server, load(run), picture


@pytest.mark.parametrize("how", ["auto", "detail"])
def test_the_chooser_decides(served, how):
    server, model, picture = served
    lengths = set()
    for text in QUESTIONS:
        part = image_part(data_url(picture.read_bytes()), **({"detail": "auto"} if how == "detail" else {}))
        status, reply = server.post(asked(part, text, **(tokens("auto") if how == "auto" else {})))
        expected = model.answer(picture, text, "auto")
        [choice] = reply["choices"]
        assert status == 200 and choice["message"]["content"] == expected.text
        assert choice["tried"] == [str(scale) for scale in expected.tried]
        assert choice["scale"] == str(expected.scale)
        assert choice["visual_tokens"] == sum(expected.tried) == expected.visual_tokens
        assert reply["usage"]["prompt_tokens_details"]["image_tokens"] == expected.visual_tokens
        lengths.add(len(expected.tried))
    assert lengths == {1, 2}


def test_without_a_word_it_is_the_finest(served):
    server, _, picture = served
    _, reply = server.post(asked(image_part(data_url(picture.read_bytes())), QUESTIONS[0]))
    assert (reply["choices"][0]["scale"], "tried" in reply["choices"][0]) == ("16", False)


def test_a_stream_shows_the_answer_that_stands_only(served):
    server, model, picture = served
    for text in QUESTIONS:
        body = asked(image_part(data_url(picture.read_bytes())), text, stream=True, **tokens("auto"))
        connection = server.begin(body | {"stream_options": {"include_usage": True}})
        received = b""
        while b"[DONE]" not in received:
            received += connection.recv(65536)
        connection.close()
        events = [json.loads(line[6:]) for line in received.decode().splitlines() if line.startswith("data: {")]
        expected = model.answer(picture, text, "auto")
        choices = [choice for event in events for choice in event["choices"]]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == expected.text
        assert {choice["scale"] for choice in choices} == {str(expected.scale)}
        assert choices[-1]["tried"] == [str(scale) for scale in expected.tried]
        assert events[-1]["usage"]["prompt_tokens_details"]["image_tokens"] == expected.visual_tokens


def test_the_page_tells_what_the_chooser_does(served, page):  # noqa: F811
    server, model, picture = served
    page.goto(server.url)
    until(lambda: page.is_enabled("#scale"))
    page.set_input_files("#file", str(picture))
    page.wait_for_selector("#drop canvas")
    for text in QUESTIONS:
        page.fill("#question", text)
        page.press("#question", "Enter")
        until(lambda: page.is_enabled("#go"))
        expected = model.answer(picture, text, "auto")
        told = page.inner_text("#answers article:first-child p")
        tried = " after trying 1" if len(expected.tried) > 1 else ""
        assert told.startswith(f"auto answers with {expected.scale}{tried}: {expected.text}".rstrip())
        assert f"({expected.visual_tokens} visual tokens, " in told


def test_ask_tells_the_scales_tried(served, tmp_path):
    server, model, picture = served
    run = str(server.run)
    for text in QUESTIONS[:2]:
        expected = model.answer(picture, text, "auto")
        status, printed = forked(["ask", "--ckpt_path", run, "--tokens", "auto", str(picture), text], tmp_path / "log")
        scales = f"scale{'s' * (len(expected.tried) - 1)} {', '.join(map(str, expected.tried))}"
        assert status == 0 and f"{expected.visual_tokens} visual tokens at {scales}, " in printed
    status, printed = forked(["ask", "--ckpt_path", run, "--mean_tokens", "3", "--tokens", "4", text], tmp_path / "log")
    assert status and "--mean_tokens" in printed
