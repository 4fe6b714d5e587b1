"""The server's page, driven in a browser: an image, a question, answers at every scale, and the grid over the image."""

import re

import pytest
from PIL import Image

from lit_mm import load
from tests.helpers.browser import page, until  # noqa: F401 (a fixture)
from tests.helpers.serving import Serving, trained_run

pytest.importorskip("fastapi")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained_run(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def address(run, tmp_path_factory):
    with Serving(run, tmp_path_factory.mktemp("log") / "log.txt") as server:
        yield server.url


@pytest.fixture
def opened(page, address):  # noqa: F811
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address)
    until(lambda: page.is_enabled("#scale"))
    yield page
    assert page.errors == []


def show(page, file):  # noqa: F811
    page.set_input_files("#file", str(file))
    page.wait_for_selector("#drop canvas")


def ask(page, question):  # noqa: F811
    """Rows of (tokens, answer, first token, whole answer) of a question, once all are there."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector("#answers article")
    until(lambda: page.is_enabled("#go"))
    rows = page.query_selector_all("#answers article:first-child tbody tr")
    return [[cell.inner_text() for cell in row.query_selector_all("td")] for row in rows]


def test_answers_of_all_scales_stand_beside_each_other(opened, run):
    picture = sorted(run.parent.parent.rglob("*.png"))[0]
    show(opened, picture)
    rows = ask(opened, "what is this?")
    answers = load(run).answer(picture, "what is this?", tokens="all")
    found = [(tokens, text.strip()) for tokens, text, *_ in rows]
    assert found == [(str(answer.visual_tokens), answer.text) for answer in answers.values()]
    assert all(re.fullmatch(r"\d+ ms", time) for *_, first, whole in rows for time in (first, whole))
    assert opened.inner_text("#answers h2") == "what is this?"


def lines_at(page, count):  # noqa: F811
    """How much darker the canvas is along the inner lines of a grid of count × count cells than in its cells."""
    script = """count => {
        const canvas = document.querySelector("#drop canvas"), pen = canvas.getContext("2d");
        const mean = (x, y) => pen.getImageData(Math.round(x * canvas.width), Math.round(y * canvas.height), 1, 1)
            .data.slice(0, 3).reduce((a, b) => a + b) / 3;
        const along = [...Array(64).keys()].map(i => (i + 0.5) / 64).filter(t => (t * count) % 1 > 0.2);
        const inner = [...Array(count - 1).keys()].map(i => (i + 1) / count);
        return inner.flatMap(x => along.map(t => mean(x, t))).concat(inner.flatMap(x => along.map(t => mean(t, x))));
    }"""
    return page.evaluate(script, count)


def test_the_slider_draws_the_grid_of_its_scale(opened, tmp_path):
    file = tmp_path / "gray.png"
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file)
    show(opened, file)
    assert opened.inner_text("#told") == "16 visual tokens, 4 × 4"
    assert all(abs(value - 128) > 40 for value in lines_at(opened, 4))  # white with black beside it, on gray
    opened.fill("#scale", "1")
    assert opened.inner_text("#told") == "4 visual tokens, 2 × 2"
    assert all(abs(value - 128) > 40 for value in lines_at(opened, 2))
    assert any(abs(value - 128) < 5 for value in lines_at(opened, 4))
    opened.fill("#scale", "0")
    assert opened.inner_text("#told") == "1 visual token, 1 × 1"
    assert "64 × 64 pixels" in opened.inner_text("#note")


def test_a_row_chooses_its_scale(opened, run):
    show(opened, sorted(run.parent.parent.rglob("*.png"))[0])
    ask(opened, "what is this?")
    opened.click("#answers tbody tr:nth-child(3)")
    assert opened.inner_text("#told").startswith("1 visual token")
    assert opened.get_attribute("#answers tbody tr:nth-child(3)", "class") == "chosen"


def test_what_is_wrong_is_said(opened, tmp_path):
    opened.press("#question", "Enter")
    assert opened.inner_text("#error") == "Type a question first."
    (tmp_path / "bad.png").write_text("no image")
    opened.set_input_files("#file", str(tmp_path / "bad.png"))
    until(lambda: "not an image" in opened.inner_text("#error"))
    opened.fill("#question", "word " * 20_000)
    opened.press("#question", "Enter")
    until(lambda: "tokens" in opened.inner_text("#error"))
    assert opened.query_selector("#answers article") is None


def test_text_is_never_taken_for_html(opened):
    rows = ask(opened, "<img src=x onerror=alert(1)>")
    assert len(rows) == 3
    assert opened.query_selector("#answers h2 img") is None
