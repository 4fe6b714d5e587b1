"""A trained run, opened without its config, answers about files, arrays and videos, in Python and in the terminal."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_mm import load
from lit_mm.data.records import RecordError
from lit_mm.inference import ask
from lit_mm.inference.answering import Ask
from lit_mm.inference.generation import Decoder
from tests.helpers.command_line import forked, lit_mm
from tests.helpers.environment import ROOT
from tests.helpers.serving import trained_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An instruction set and a run that was trained on it by the command line."""
    return trained_run(tmp_path_factory.mktemp("set")).parent.parent


@pytest.fixture(scope="module")
def picture(folder) -> Path:
    return sorted(folder.rglob("*.png"))[0]


@pytest.fixture(scope="module")
def model(folder):
    return load(folder / "runs/version_0")


def test_answers_are_those_of_predict(folder, model, picture):
    asked = {"question_id": 1, "image": str(picture.relative_to(folder)), "text": "what is this?"}
    (folder / "ask.jsonl").write_text(json.dumps(asked) + "\n")
    lit_mm("predict", "--config", str(folder / "exp.yaml"), "--ckpt_path", "last")
    [written] = (folder / "runs/version_0").glob("answers_*/answers.jsonl")
    lines = {line["scale"]: line for line in map(json.loads, written.read_text().splitlines())}
    answers = model.answer(picture, "what is this?", tokens="all")
    assert list(answers) == list(lines) == ["16", "4", "1"]
    for scale, answer in answers.items():
        assert answer.text == lines[scale]["text"]
        assert answer.logprob == pytest.approx(lines[scale]["logprob"], abs=1e-4)
        assert answer.visual_tokens == lines[scale]["visual_tokens"]
        assert 0 < answer.first_token_seconds <= answer.seconds


def test_every_kind_of_picture_is_the_same_picture(model, picture):
    opened = Image.open(picture).convert("RGB")
    array = np.array(opened)
    kinds = [picture, str(picture), picture.read_bytes(), opened, array, torch.from_numpy(array).permute(2, 0, 1)]
    answers = [model.answer(kind, "what is this?", tokens=4, temperature=2.0, seed=7) for kind in kinds]
    assert len({tuple(answer.ids) for answer in answers}) == 1
    assert {answer.visual_tokens for answer in answers} == {4}


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "PA", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16"])
def test_an_opened_image_of_any_mode_is_its_rgb(model, picture, mode):
    """Against Pillow's own conversion; PNG and TIFF do not have all of these modes."""
    image = Image.open(picture).convert("RGB")
    image = image.convert("RGBA").convert(mode) if mode in ("LA", "PA", "RGBA", "RGBa") else image.convert(mode)
    values = np.asarray(image) >> 8 if mode == "I;16" else None
    plain = Image.fromarray(values.astype(np.uint8)) if mode == "I;16" else image
    expected = np.asarray(plain.convert("RGBA").convert("RGB") if mode in ("RGBa", "PA") else plain.convert("RGB"))
    assert (pixels(model, image) == pixels(model, expected.copy())).all()


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_an_opened_photo_is_as_upright_as_its_file(model, tmp_path, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    draw = np.random.default_rng(0).integers(0, 255, (32, 128, 3), np.uint8)
    Image.fromarray(draw).save(tmp_path / "photo.png", exif=exif)
    assert torch.equal(pixels(model, tmp_path / "photo.png"), pixels(model, Image.open(tmp_path / "photo.png")))


def pixels(model, image) -> torch.Tensor:
    return model.prompt(Ask("what?", image)).sample.visuals[0].pixels


def test_equal_pictures_are_encoded_once(model, picture):
    sizes = []
    handle = model.vlm.encoder.register_forward_hook(lambda _, pixels, __: sizes.append(len(pixels[0])))
    found = model.answers([Ask(text, [picture]) for text in ("a?", "b?", "c?")], ["16", 1])
    handle.remove()
    assert sizes == [1]
    assert [list(own) for own in found] == [["16", "1"]] * 3
    assert [own["1"].text for own in found] == [model.answer(picture, text, 1).text for text in ("a?", "b?", "c?")]


def test_a_conversation_repeats_its_turns(model, picture):
    chat = model.chat(picture)
    first = chat.ask("what is this?", tokens=4)
    second = chat.ask(" and the color? ", picture, tokens=4)
    turns = ["<image>\nwhat is this?", first.text, "<image>\nand the color?"]
    assert chat.turns == [*turns, second.text]
    again = model.answer([picture, picture], turns[2], 4, history=turns[:2])
    assert (again.ids, again.visual_tokens) == (second.ids, 8)


def test_scores_of_given_answers(model, picture):
    """Together they are what each is alone, at every scale."""
    together = model.score(picture, "what is this?", ["red", "blue", "a circle"])
    for scale, scores in together.items():
        alone = [model.score(picture, "what is this?", [text], scale)[scale][0] for text in ("red", "blue", "a circle")]
        assert scores == pytest.approx(alone, abs=1e-4)
        assert all(own < 0 for own in scores)


def test_stretched_positions_can_be_used(model, monkeypatch):
    """As in training: see test_stretched_positions_count."""
    config = model.vlm.llm.config
    stretched = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    monkeypatch.setattr(config, "rope_parameters", stretched)
    most = 4 * config.max_position_embeddings
    model.check_length(most - 3, 3)
    with pytest.raises(ValueError, match=f"the LLM has {most} positions"):
        model.check_length(most - 3, 4)


def test_given_answers_that_cannot_be_scored(model, picture):
    for answers, message in [
        ("red", "expected a list of answers, found the text 'red'"),
        (["<image>"], r"answers\[0\]: <image> in an answer"),
        (["red " * 5000], "of the answer: the LLM has .* positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.score(picture, "what is this?", answers)
    assert model.score(picture, "what is this?", []) == {"16": [], "4": [], "1": []}


def test_several_scales(model, picture):
    found = model.answer(picture, "what is this?", [1, "16"])
    assert {scale: answer.ids for scale, answer in found.items()} == {
        scale: model.answer(picture, "what is this?", scale).ids for scale in ("1", "16")
    }
    assert list(model.score(picture, "what is this?", ["red"], [1, "16"])) == ["1", "16"]


def test_text_alone_and_tokens_by_default(model):
    assert model.answer(None, "hello?").visual_tokens == 0
    assert {answer.text for answer in model.answer(None, "hello?", "all").values()} == {
        model.answer(None, "hello?").text
    }


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("what?", 5), {}, ValueError, "tokens 5: expected all or one of the model's scales 16, 4, 1"),
        (("what?", []), {}, ValueError, r"tokens \[\]: expected all or one of the model's scales 16, 4, 1"),
        ((" ", 4), {}, RecordError, "question: expected text, found ' '"),
        ((None, 4), {}, RecordError, "question: expected text, found None"),
        ((3, 4), {}, RecordError, "question: expected text, found int 3"),
        (("a\ud800", 4), {}, RecordError, "question: expected Unicode text"),
        (("what?", 4), {"history": ["red?"]}, RecordError, "questions and their answers in turn, found 1 of them"),
        (("what?", 4), {"history": "red?"}, RecordError, "questions and their answers in turn, found a text"),
        (("what?", 4), {"history": ["red?", "<image>"]}, RecordError, r"history\[1\]: <image> in an answer"),
        (("what?", 4), {"history": ["red?", "a\ud800"]}, RecordError, r"history\[1\]: expected Unicode text"),
        (("what?", 4), {"system": "<image>"}, RecordError, "system: <image> in a system message"),
        (("what? " * 3000, 4), {}, ValueError, "tokens of the prompt and 3 of the answer: the LLM has .* positions"),
        (("what?", 4), {"max_new_tokens": 99999}, ValueError, "and 99999 of the answer: the LLM has .* positions"),
        (("<image> or <image>?", 4), {}, RecordError, "markers for image, image, given are image"),
        (("what?", 4), {"temprature": 1.0}, ValueError, "temprature: not a setting"),
        (("what?", 4), {"max_new_tokens": -1}, ValueError, "max_new_tokens"),
        (("<|end|>", 4), {}, RecordError, "reserved text"),
    ],
)
def test_mistakes_are_named(model, picture, arguments, options, error, message):
    with pytest.raises(error, match=message):
        model.answer(picture, *arguments, **options)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("nowhere.png", FileNotFoundError, "image 1: no file 'nowhere.png'"),
        ("", FileNotFoundError, "image 1: no file ''"),
        ("x" * 300, FileNotFoundError, "image 1: no file 'xxx"),
        (".", FileNotFoundError, "image 1: no file '.'"),
        (np.zeros((4, 4)), ValueError, r"expected uint8 \[height, width, 3\], found float64 \[4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"expected uint8 \[height, width, 3\], found uint8 \[0, 4, 3\]"),
        (torch.zeros(8, 4, 3), ValueError, r"expected uint8 \[3, height, width\], found float32 \[8, 4, 3\]"),
        (torch.zeros(3, 8, 4).bfloat16(), ValueError, r"found bfloat16 \[3, 8, 4\]"),
        (torch.zeros(3, 8, 4, requires_grad=True), ValueError, r"found float32 \[3, 8, 4\]"),
        (5, ValueError, "image 1: expected a path, bytes, a PIL image, an array or a tensor, found int"),
        ([None], ValueError, "found NoneType"),
        (Image.new("F", (8, 8)), ValueError, "image 1: mode F, expected 8 or 16 bits per channel"),
        (b"", RecordError, "not an image"),
        (b"no image", RecordError, "not an image"),
    ],
)
def test_bad_pictures_are_named(model, image, error, message):
    with pytest.raises(error, match=message):
        model.answer(image, "what?")


def test_a_run_is_opened_without_what_trained_it(folder, model, picture, tmp_path):
    """Neither its config nor the tokenizer's folder is needed."""
    shutil.copytree(folder / "runs/version_0", tmp_path / "version_0")
    (tmp_path / "version_0/config.yaml").unlink()
    file = tmp_path / "version_0/checkpoints/last.ckpt"
    saved = torch.load(file, weights_only=True)
    saved["hyper_parameters"]["llm"]["tokenizer"] = "gone"
    torch.save(saved, file)
    moved = load(tmp_path / "version_0")
    assert moved.media.image == model.media.image and moved.media.image.mode == "keep"
    assert moved.answer(picture, "what is this?", 1).ids == model.answer(picture, "what is this?", 1).ids


def test_a_run_with_adapters_or_quantized_is_opened_plainly_and_says_so(folder, model, picture, tmp_path):
    """An adapter of zeros changes nothing, neither do 4 bits that the checkpoint's weights do not have."""
    shutil.copytree(folder / "runs/version_0", tmp_path / "version_0")
    file = tmp_path / "version_0/checkpoints/last.ckpt"
    saved = torch.load(file, weights_only=True)
    saved["hyper_parameters"]["llm"]["quantize"] = "4bit"
    saved["hyper_parameters"]["parts"]["llm"]["lora"] = {"r": 2, "lora_alpha": 4}
    torch.save(saved, file)
    with pytest.warns(UserWarning, match="load: ") as warned:
        moved = load(tmp_path / "version_0")
    said = [str(each.message) for each in warned if "load: " in str(each.message)]
    assert said == [
        "load: the LLM was trained in 4bit and is opened in float32: it takes more memory",
        "load: the LLM's adapters (LoRA) are merged into its weights",
    ]
    assert moved.answer(picture, "what is this?", 1).ids == model.answer(picture, "what is this?", 1).ids


def test_the_readmes_ten_lines(folder, model, picture, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [code] = [block for block in blocks if "import load\n" in block]
    exec(code.replace("runs/quickstart", str(folder / "runs")).replace("photo.jpg", str(picture)), {})
    first, *lines = capsys.readouterr().out.splitlines()
    asked = "what color is the shape?"
    assert first.startswith(model.answer(picture, asked, 4).text)
    assert lines[:3] == [f"{scale} {own.text}" for scale, own in model.answer(picture, asked, "all").items()]


def test_what_is_no_run_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="load: no checkpoint"):
        load(tmp_path / "nowhere")
    whole = (folder / "runs/version_0/checkpoints/last.ckpt").read_bytes()
    for size in (0, 1000, len(whole) // 2):
        (tmp_path / "part.ckpt").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"part.ckpt is not a checkpoint, or a truncated one \({size} bytes\)"):
            load(tmp_path / "part.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match="does not describe its model"):
        load(tmp_path / "bare.ckpt")
    torch.save({"state_dict": Path}, tmp_path / "pickled.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load(tmp_path / "pickled.ckpt")


def test_ask_in_the_terminal(folder, model, picture, tmp_path):
    run = ["ask", "--ckpt_path", str(folder / "runs")]
    status, printed = forked([*run, "--tokens", "all", "--json", str(picture), "what is this?"], tmp_path / "log")
    told = json.loads(printed.splitlines()[-1])
    expected = model.answer(picture, "what is this?", "all")
    assert status == 0 and {scale: own["text"] for scale, own in told["answers"].items()} == {
        scale: answer.text for scale, answer in expected.items()
    }
    status, printed = forked([*run, "--tokens", "7", str(picture), "what?"], tmp_path / "log")
    assert status and "expected all or one of the model's scales 16, 4, 1" in printed
    status, printed = forked([*run, "nowhere.png", "what?"], tmp_path / "log")
    assert status and "'nowhere.png' is not a file" in printed
    long = "what is this and " * 30
    status, printed = forked([*run, "--tokens", "4", str(picture), long], tmp_path / "log")
    assert status == 0 and model.answer(picture, long, 4).text in printed
    for words, message in [
        (["nowhere.png"], "no file nowhere.png"),
        (["--tokens", "all", str(picture)], "tokens all: a conversation goes on from one answer"),
        (["--json", str(picture)], "--json: expected a question"),
        (["--device", "cuda:99", str(picture), "what?"], "device cuda:99"),
        (["--device", "toaster", str(picture), "what?"], "device toaster"),
    ]:
        status, printed = forked([*run, *words], tmp_path / "log")
        assert status and message in printed.splitlines()[-1], printed


def test_mistakes_in_a_conversation_do_not_end_it(folder, model, picture, tmp_path, monkeypatch, capsys):
    """They are named, and nothing of them is kept."""
    (tmp_path / "bad.png").write_bytes(picture.read_bytes()[:60])
    wrong = ["/tokens", "/tokens all", "/tokens 5", "/image", f"/image {tmp_path}", "/image " + "x" * 300, "/image bad"]
    wrong += [f"/image {tmp_path / 'bad.png'}", "<image><image> what?", "caf\udce9?"]
    given = iter([*wrong, "/tokens 4", "what is this?"])
    monkeypatch.setattr("builtins.input", lambda _: next(given, "/quit"))
    ask.main(["--ckpt_path", str(folder / "runs"), str(picture)])
    printed, told = capsys.readouterr()
    assert told.count("error: ") == len(wrong)
    assert "/tokens: expected one of 16, 4, 1" in told
    assert model.answer(picture, "what is this?", 4).text in printed


def test_ctrl_c_ends_an_answer_and_not_the_conversation(folder, model, picture, monkeypatch, capsys):
    given, chosen = iter(["what is this?", "what is this?"]), Decoder._choose
    interrupted = iter([True])

    def choose(decoder, scores):
        if next(interrupted, False):
            raise KeyboardInterrupt
        return chosen(decoder, scores)

    monkeypatch.setattr(Decoder, "_choose", choose)
    monkeypatch.setattr("builtins.input", lambda _: next(given, "/quit"))
    ask.main(["--ckpt_path", str(folder / "runs"), str(picture)])
    printed, told = capsys.readouterr()
    assert "stopped" in told
    assert printed.strip() == model.answer(picture, "what is this?").text
