"""`python -m lit_mm serve`: a real process, asked by OpenAI's client and by raw requests, compared with the model."""

import base64
import http.server
import io
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_mm import load
from lit_mm.data.images import ImageOptions
from lit_mm.data.video import VideoOptions
from lit_mm.inference.answering import Ask
from lit_mm.inference.serve import main as serve
from tests.helpers.browser import until
from tests.helpers.environment import ROOT
from tests.helpers.media import noise, render, saved
from tests.helpers.serving import Serving, asked, data_url, image_part, tokens, trained_run, user

openai = pytest.importorskip("openai", reason="openai is not installed (make install brings it)")
pytest.importorskip("fastapi", reason="fastapi is not installed (make install brings it)")

NAN = "~"
"""A character whose embedding is NaN."""
LONG = 20_000
"""Tokens of an answer that does not end while a test runs."""
QUESTION = "what is this?"
LIMITS = {"max_batch": 8, "max_requests": 30, "max_bytes": 300_000, "max_pixels": 20_000, "max_images": 3}
LIMITS |= {"max_tokens": 30_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run whose model rarely ends an answer, takes videos, and has no numbers for one character."""
    run = trained_run(tmp_path_factory.mktemp("set"), max_position_embeddings=40_000)
    folder = run.parents[1]
    file = run / "checkpoints/last.ckpt"
    saved = torch.load(file, weights_only=True)
    plain = load(run)
    change_ends({name.rpartition("llm.")[2]: value for name, value in saved["state_dict"].items()}, plain)
    saved["answering"]["video"] = asdict(VideoOptions(max_frames=2))
    torch.save(saved, file)
    return folder


def change_ends(weights, model):
    """The first feature of the LLM's one layer becomes a positive constant, through which a logit can be a constant."""
    embeddings, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"model.layers.0.{name}.weight"][0] = 0
    embeddings[:, 0] = 1
    [nan], end = model.tokenizer.encode(NAN), model.conversation.end_id
    head[[nan, end]] = 0
    head[nan, 0] = -1e4
    embeddings[nan] = float("nan")


@pytest.fixture(scope="module")
def model(folder):
    return load(folder / "runs")


@pytest.fixture(scope="module")
def impatient(folder):
    """Another server, which starts while the first one does."""
    options = "--timeout", "2", "--grace", "1", "--model_name", "mine"
    found = Serving(folder / "runs", folder / "impatient.txt", *options)
    yield found
    found.process.kill()  # where its test was not run
    found.process.join()


@pytest.fixture(scope="module")
def server(folder, impatient):
    options = [word for name, value in LIMITS.items() for word in (f"--{name}", str(value))]
    with Serving(folder / "runs", folder / "log.txt", "--allow_files", str(folder / "images"), *options) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def pictures(folder) -> list[bytes]:
    return [(folder / f"images/{number}.png").read_bytes() for number in range(4)]


@pytest.fixture(scope="module")
def shown(pictures) -> list[dict]:
    """Parts of messages."""
    return [image_part(data_url(picture)) for picture in pictures]


def create(client, *messages, **options):
    return client.chat.completions.create(model="runs/version_0", messages=list(messages), **options)


@pytest.mark.parametrize("scale", [16, 4, "1", None, "all"])
def test_answers_are_the_models(client, model, pictures, shown, scale):
    body = {} if scale is None else tokens(scale)
    reply = create(client, user(shown[0], QUESTION), extra_body=body, logprobs=True)
    answers = model.answer(pictures[0], QUESTION, scale)
    answers = list(answers.values()) if scale == "all" else [answers]
    assert [choice.scale for choice in reply.choices] == [str(own.scale) for own in answers]
    for number, (choice, answer) in enumerate(zip(reply.choices, answers, strict=True)):
        assert (choice.index, choice.message.role, choice.message.content) == (number, "assistant", answer.text)
        assert (choice.finish_reason, choice.visual_tokens) == (answer.finish, answer.visual_tokens)
        assert [token.logprob for token in choice.logprobs.content] == pytest.approx(answer.logprobs, abs=1e-4)
        assert 0 < choice.first_token_ms <= choice.ms
    text = len(model.tokenizer.encode(f"\n{QUESTION}"))
    assert reply.usage.prompt_tokens_details.image_tokens == sum(own.visual_tokens for own in answers)
    assert reply.usage.prompt_tokens == sum(own.visual_tokens + text for own in answers)
    assert reply.usage.completion_tokens == sum(len(own.ids) for own in answers) == 3 * len(answers)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_conversations_with_images_in_every_turn(client, model, pictures, shown):
    turns = [user(shown[0], "one?"), {"role": "assistant", "content": "a square"}, user("two?", shown[1], "well?")]
    reply = create(client, {"role": "system", "content": "Be short."}, *turns, extra_body=tokens(4))
    history = ["<image>\none?", "a square"]
    answer = model.answer(pictures[:2], "two?\n<image>\nwell?", 4, history, "Be short.")
    assert reply.choices[0].message.content == answer.text
    assert reply.choices[0].visual_tokens == 8
    # as a client sends back what it got, and without text in the answer
    said = {"role": "assistant", "content": "", "refusal": None, "tool_calls": None}
    reply = create(client, turns[0], said, user("two?"), extra_body=tokens(4))
    assert reply.choices[0].message.content == model.answer(pictures[0], "two?", 4, ["<image>\none?", ""]).text


@pytest.mark.parametrize(("detail", "scale"), [("low", "1"), ("high", "16"), ("auto", "16")])
def test_detail_chooses_a_scale(client, pictures, detail, scale):
    reply = create(client, user(image_part(data_url(pictures[0]), detail=detail), QUESTION))
    assert reply.choices[0].scale == scale


def test_a_video_is_shown_by_its_frames(client, model, folder):
    encoded = render(folder / "a.mp4", height=64).read_bytes()
    part = {"type": "video_url", "video_url": {"url": data_url(encoded, "video/mp4")}}
    reply = create(client, user(part, QUESTION), extra_body=tokens(4))
    assert reply.choices[0].message.content == model.answer(encoded, QUESTION, 4).text
    assert reply.choices[0].visual_tokens == reply.usage.prompt_tokens_details.image_tokens == 8


SETTINGS = [
    {"temperature": 2.0, "seed": 1, "max_tokens": 80},
    {"temperature": 2.0, "seed": 2, "max_completion_tokens": 80, "top_p": 0.9},
    {"max_tokens": 20},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("stop", [None, ["\n", "e"]])
def test_a_stream_is_the_whole_in_pieces(client, model, pictures, shown, settings, stop):
    """Random bytes: half characters, spaces at the ends, and what may become a stop string."""
    messages, options = [user(shown[1], QUESTION)], {**settings, "stop": stop, "logprobs": True}
    whole = create(client, *messages, **options, extra_body=tokens("all"))
    usage = {"include_usage": True}
    *chunks, last = create(client, *messages, **options, stream=True, stream_options=usage, extra_body=tokens("all"))
    assert last.usage == whole.usage and last.choices == []
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(piece.delta.content for piece in own) == choice.message.content
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert [piece.delta.role for piece in own] == ["assistant"] + [None] * (len(own) - 1)
        assert {(piece.scale, piece.visual_tokens) for piece in own} == {(choice.scale, choice.visual_tokens)}
        assert 0 < own[-1].first_token_ms <= own[-1].ms
        logprobs = [token.logprob for piece in own for token in piece.logprobs.content]
        assert logprobs == [token.logprob for token in choice.logprobs.content]
    assert stop or len(chunks) > 2 * len(whole.choices)
    new = settings.get("max_tokens", 80)
    sampling = {name: settings[name] for name in ("temperature", "top_p", "seed") if name in settings}
    answers = model.answer(pictures[1], QUESTION, "all", max_new_tokens=new, stop_strings=stop, **sampling)
    assert [choice.message.content for choice in whole.choices] == [own.text for own in answers.values()]


def test_an_end_token_counts(client, model):
    options = {"temperature": 2.0, "seed": 5, "max_tokens": 3000}
    reply = create(client, user("hello"), **options)
    assert reply.choices[0].finish_reason == "stop"
    answer = model.answer(None, "hello", temperature=2.0, seed=5, max_new_tokens=3000)
    assert reply.usage.completion_tokens == len(answer.ids) + 1 == len(answer.logprobs)


def test_without_a_seed_samples_differ(client):
    found = {create(client, user("hello"), temperature=1.5).choices[0].message.content for _ in range(5)}
    assert len(found) > 1


def test_what_waits_is_answered_together_whatever_its_scale(server, client, model, pictures, shown):
    """Also with other settings, beside requests that are wrong, and beside one whose logits are no numbers."""
    count = server.metric("lit_mm_batch_size_count")
    size = server.metric("lit_mm_batch_size_sum")
    first = begun(server, asked("hello", max_tokens=LONG))
    cases = [(n, scale, new) for n in range(4) for scale in (16, 4, "all") for new in (5, 6)]

    def ask(case):
        n, scale, new = case
        reply = create(client, user(shown[n], f"{QUESTION}{n}"), max_tokens=new, extra_body=tokens(scale))
        return [choice.message.content for choice in reply.choices]

    with ThreadPoolExecutor(30) as pool:
        replies = pool.map(ask, cases)
        broken = [pool.submit(server.post, asked(shown[0], NAN, stream=stream)) for stream in (False, True)]
        wrong = [pool.submit(server.post, asked(image_part(data_url(b"?")), "what?")) for _ in range(2)]
        server_waits(server, len(cases) + 2)
        first.close()
        found = list(replies)
    for (n, scale, new), texts in zip(cases, found, strict=True):
        answers = model.answer(pictures[n], f"{QUESTION}{n}", scale, max_new_tokens=new)
        assert texts == [own.text for own in (answers.values() if scale == "all" else [answers])]
    for each in broken:
        status, reply = each.result()
        assert status == 500 and "not finite" in reply["error"]["message"]
    assert {each.result()[0] for each in wrong} == {400}
    batches = server.metric("lit_mm_batch_size_count") - count
    assert (server.metric("lit_mm_batch_size_sum") - size) / batches > 4


def server_waits(server, requests):
    until(lambda: server.metric("lit_mm_waiting_requests") == requests, 20)


def begun(server, body) -> socket.socket:
    """A request that is being answered."""
    batches = server.metric("lit_mm_batch_size_count")
    connection = server.begin(body)
    until(lambda: server.metric("lit_mm_batch_size_count") > batches, 20)
    return connection


@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_of_a_client_that_hangs_up_is_dropped(server, client, stream):
    before = len(server.log.read_text())
    begun(server, asked("hello", max_tokens=LONG, stream=stream)).close()
    server.logged(r"POST /v1/chat/completions 499: ", after=before)
    start = time.monotonic()
    create(client, user("hello"))
    assert time.monotonic() - start < 15  # the long answer would take longer


PIXEL = data_url(saved("PNG", noise(8, 8)))
ODD = data_url(saved("PNG", noise(130, 70)))
BOMB = data_url(saved("PNG", Image.new("RGB", (5000, 5000))))
ANIMATED = data_url(saved("GIF", noise(8, 8), noise(9, 9)), "image/gif")
BAD = {
    "no JSON": (b"{", 400, r"the body is not JSON: .* at character 1"),
    "deep JSON": (b"[" * 100_000, 400, "parsing the body"),
    "no object": (b"[]", 400, "expected a JSON object"),
    "no body": (b"", 400, "expected a JSON object"),
    "no messages": ({}, 400, "messages: Field required"),
    "empty messages": ({"messages": []}, 400, "messages: List should have at least 1 item"),
    "no question": (asked(" "), 400, "there is no question"),
    "an image alone": (asked(image_part(PIXEL)), 400, "there is no question"),
    "no user": ({"messages": [{"role": "system", "content": "x"}]}, 400, "expected a user message at the end"),
    "order": ({"messages": [user("x"), user("y")]}, 400, "expected assistant, found user"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, r"messages\[0\]\.role: .*'system', 'user' or"),
    "part": (asked({"type": "input_audio"}), 400, r"messages\[0\]\.content\[0\]: .*'image_url', 'video_url'"),
    "marker": (asked("<image>"), 400, "<image> in a text: send images as parts"),
    "control token": (asked("<|end|>"), 400, "reserved text"),
    "surrogate": (asked("\ud800"), 400, "expected Unicode text"),
    "model": (asked("x", model="gpt-\ud800"), 404, "no model .* there is 'runs/version_0'"),
    "n": (asked("x", n=2), 400, "n: 2 is not supported"),
    "tools": (asked("x", tools=[{"type": "function"}]), 400, "tools: .* is not supported"),
    "penalty": (asked("x", presence_penalty=0.5), 400, r"presence_penalty: 0\.5 is not supported"),
    "format": (asked("x", response_format={"type": "json_object"}), 400, "response_format: .* is not supported"),
    "unknown": (asked("x", temprature=1), 400, "temprature: 1 is not supported"),
    "inner": ({"messages": [{**user("x"), "name": "me"}]}, 400, r"messages\[0\]\.name: 'me' is not supported"),
    "processor": (asked("x", mm_processor_kwargs={"size": 3}), 400, "mm_processor_kwargs.size: 3 is not supported"),
    "temperature": (asked("x", temperature=float("nan")), 400, "temperature: .*finite"),
    "two lengths": (asked("x", max_tokens=1, max_completion_tokens=2), 400, "expected one of max_tokens"),
    "stop": (asked("x", stop=""), 400, "stop: expected a text that is not empty, or a list of those, found ''"),
    "stop's type": (asked("x", stop=["a", 1]), 400, r"stop: expected a text .* found \['a', 1\]"),
    "stops": (asked("x", stop=["a"] * 17), 400, "stop: expected at most 16 texts, found 17"),
    "stream": (asked("x", stream_options={"include_usage": True}), 400, "expected stream to be true"),
    "scale": (asked("x", **tokens(7)), 400, "num_visual_tokens 7: expected all or one of the model's scales 16, 4, 1"),
    "scale's type": (
        asked("x", **tokens(True)),
        400,
        r"^mm_processor_kwargs\.num_visual_tokens: expected a number of tokens, .*, found True",
    ),
    "no content": (
        {"messages": [{"role": "user", "content": None}]},
        400,
        r"^messages\[0\]\.content: expected a text or a list of parts, found None",
    ),
    "text's type": (asked({"type": "text", "text": 3}), 400, r"^messages\[0\]\.content\[0\]\.text: .*, found 3"),
    "length": (asked("x", max_tokens=0), 400, "^max_tokens: .* greater than or equal to 1, found 0"),
    "two scales": (asked(image_part(PIXEL, detail="low"), "x", **tokens(16)), 400, "expected one scale for all images"),
    "detail": (asked(image_part(PIXEL, detail="big"), "x"), 400, r"content\[0\]\.image_url\.detail: .*'low' or 'high'"),
    "base64": (asked(image_part("data:image/png;base64,x!"), "x"), 400, r"image_url\.url: the base64 is broken"),
    "no URL": (asked(image_part("a.png"), "x"), 400, "expected data:image/….*found 'a.png'"),
    "remote": (asked(image_part("http://localhost/a.png"), "x"), 400, "fetches no URLs.*--allow_urls"),
    "outside": (asked(image_part("file:///etc/passwd"), "x"), 400, "is not a file below"),
    "escaped": (asked(image_part("file:///{images}/../train.json"), "x"), 400, "is not a file below"),
    "no image": (asked(image_part(data_url(b"text")), "x"), 400, "not an image: image 1: none of Pillow's formats"),
    "broken image": (asked(image_part(PIXEL[:120]), "x"), 400, "truncated image|base64 is broken"),
    "animated": (asked(image_part(ANIMATED), "x"), 400, "several frames"),
    "bomb": (asked(image_part(BOMB), "x"), 400, "too many pixels: .*the limit is 20000"),
    "no scale fits": (
        asked(image_part(data_url(saved("PNG", noise(130, 70)))), "x"),
        400,
        "image 1 of 70×130 pixels .*: scales .* do not divide a 5×9 grid",
    ),
    "no video": (asked({"type": "video_url", "video_url": {"url": data_url(b"x", "video/mp4")}}, "x"), 400, "a video"),
    "images": (asked(*[image_part(PIXEL)] * 4, "x"), 400, "4 images and videos in a request, the limit is 3"),
    "tokens": (asked("a b " * 50_000), 400, "00 tokens of the prompt.*the limit is 30000 together"),
    "text": (asked("a" * 250_000, **tokens(16)), 400, "30000"),
    "new tokens": (asked("x", max_tokens=30_000), 400, "30000 of the answer: the limit is 30000 together"),
    "body": (asked("x" * 300_000), 413, "more than 300000 bytes"),
}


@pytest.mark.parametrize(("body", "status", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named(server, folder, body, status, message):
    if isinstance(body, dict):
        body = json.loads(json.dumps(body).replace("{images}", str(folder / "images").removeprefix("/")))
    found, reply = server.post(body)
    assert found == status and set(reply["error"]) == {"message", "type", "param", "code"}
    assert re.search(message, reply["error"]["message"]), reply
    assert reply["error"]["type"] == "invalid_request_error"


def test_errors_are_openais(client, server):
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4o", messages=[user("x")])
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        create(client, user("x"), extra_body=tokens(7))
    assert error.value.param == "mm_processor_kwargs.num_visual_tokens"
    assert server.post({}, "/v1/embeddings")[0] == 404
    assert server.get("/v1/chat/completions")[0] == 405


def test_a_body_is_measured_as_it_comes(server):
    """One without Content-Length, too."""
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    head = "POST /preview HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    connection.sendall(head.encode())
    for _ in range(20):
        connection.sendall(b"5000\r\n" + b"x" * 0x5000 + b"\r\n")
    connection.sendall(b"0\r\n\r\n")
    assert b" 413 " in connection.recv(100)


def test_too_many_requests_at_once_are_told_to_come_again(server, client):
    before = len(server.log.read_text())
    waiting = [server.begin(asked("hello", max_tokens=LONG)) for _ in range(LIMITS["max_requests"])]
    end = time.monotonic() + 20
    while (status := server.post(asked("hello"))[0]) == 200:
        assert time.monotonic() < end
    assert status == 503 and server.headers["retry-after"] == "1"
    with pytest.raises(openai.InternalServerError, match="30 requests are in progress, the limit"):
        create(client, user("hello"))
    for connection in waiting:
        connection.close()
    end = time.monotonic() + 20
    while server.log.read_text()[before:].count(" 499: ") < len(waiting):
        assert time.monotonic() < end
    assert create(client, user("hello")).choices


def test_files_below_the_allowed_folder(client, folder, shown):
    part = image_part((folder / "images/0.png").as_uri())
    answer = create(client, user(part, QUESTION)).choices[0].message.content
    assert answer == create(client, user(shown[0], QUESTION)).choices[0].message.content
    link = folder / "images/link.png"
    link.symlink_to("/etc/passwd")
    with pytest.raises(openai.BadRequestError, match="is not a file below"):
        create(client, user(image_part(link.as_uri()), QUESTION))


def test_base64_in_lines_is_opened(pictures):
    """As `base64 FILE` and Python's encodebytes write it."""
    from lit_mm.inference.urls import MediaURLs

    url = f"data:image/png;base64,{base64.encodebytes(pictures[0]).decode()}"
    assert "\n" in url.strip() and MediaURLs().read(url, "image", "f") == pictures[0]


def test_remote_images_where_they_are_allowed(pictures):
    from lit_mm.inference.chat_completions import RefusedError
    from lit_mm.inference.urls import MediaURLs

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302 if self.path == "/away" else 200)
            self.send_header("Location", "http://127.0.0.2/")
            self.end_headers()
            self.wfile.write(pictures[0] if self.path == "/image" else b"x" * 5000)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as remote:
        threading.Thread(target=remote.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{remote.server_port}"
        assert MediaURLs(hosts=[]).read(f"{url}/image", "image", "f") == pictures[0]
        some = MediaURLs(hosts=["127.0.0.1"], max_bytes=4000)
        assert some.read(f"{url}/image", "image", "f") == pictures[0]
        for path, message in {"long": "more than 4000 bytes", "away": "is not on one of the servers"}.items():
            with pytest.raises(RefusedError, match=message):
                some.read(f"{url}/{path}", "image", "f")
        with pytest.raises(RefusedError, match="is not on one of the servers"):
            MediaURLs(hosts=["example.org"]).read(f"{url}/image", "image", "f")
        remote.shutdown()


def test_other_pages(server, client):
    [card] = client.models.list().data
    assert (card.id, card.scales) == ("runs/version_0", ["16", "4", "1"])
    assert client.models.retrieve("runs/version_0").scales == card.scales
    assert server.get("/health") == (200, b'{"status":"ok"}')
    status, page = server.get("/")
    assert status == 200 and b"<html" in page
    before = server.metric('lit_mm_requests_total{path="/v1/chat/completions",status="200"}')
    visual, made = (server.metric(f"lit_mm_{name}_tokens_total") for name in ("visual", "generated"))
    first = server.metric("lit_mm_first_token_seconds_count")
    create(client, user(image_part(PIXEL.replace(PIXEL, data_url(saved("PNG", noise(64, 64))))), "x"), max_tokens=4)
    assert server.metric('lit_mm_requests_total{path="/v1/chat/completions",status="200"}') == before + 1
    assert server.metric("lit_mm_visual_tokens_total") == visual + 16
    assert server.metric("lit_mm_generated_tokens_total") == made + 4
    assert server.metric("lit_mm_first_token_seconds_count") == first + 1
    server.logged(r"\d\d:\d\d:\d\d 127\.0\.0\.1 POST /v1/chat/completions 200: \d\.\d\d s, scale 16, \d+ tokens in")


def test_a_preview_is_what_the_encoder_gets(server, model):
    encoded = saved("JPEG", noise(120, 32))
    status, told = server.post({"image": data_url(encoded, "image/jpeg")}, "/preview")
    assert status == 200 and told["size"] == [120, 32] and told["box"] == [0, 0, 120, 32]
    assert told["grids"] == {"16": [2, 8], "4": [1, 4], "1": [1, 1]}
    seen = opened(told["seen"])
    pixels = pixels_of(model, encoded)
    assert np.array_equal(seen[:, :120], pixels) and (seen[:, 120:] == model.media.color).all()
    assert seen.shape == (32, 128, 3)
    assert server.post({"image": data_url(b"x")}, "/preview")[0] == 400


@pytest.mark.parametrize(("mode", "box"), [("pad", [16, 0, 48, 64]), ("squash", [0, 0, 64, 64])])
def test_previews_of_other_ways_to_resize(folder, mode, box):
    from lit_mm.inference.preview import preview

    model = load(folder / "runs", image=ImageOptions(mode, 64))
    encoded = saved("PNG", noise(40, 80))
    told = preview(model, encoded)
    assert told["box"] == box and told["grids"]["16"] == [4, 4]
    assert np.array_equal(opened(told["seen"]), pixels_of(model, encoded))


def opened(url: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def pixels_of(model, encoded: bytes) -> np.ndarray:
    """The encoder's normalized pixels, brought back to 0..255: [H, W, 3]."""
    pixels = []
    handle = model.vlm.encoder.register_forward_pre_hook(lambda _, inputs: pixels.append(inputs[0][0]))
    model.answer(encoded, "x", 1)
    handle.remove()
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.vlm.encoder.mean, model.vlm.encoder.std))
    return ((pixels[0] * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()


def test_a_batch_that_fails_is_answered_one_by_one(model, pictures, monkeypatch):
    from lit_mm.inference.batching import Batcher, Job

    prompts = [model.prompt(Ask(f"{QUESTION}{n}", [pictures[0]])) for n in range(3)]
    answers_to, sizes = model.answers_to, []

    def failing(asked, *words, **options):
        sizes.append(len(asked))
        if any(prompt is prompts[1] for prompt in asked):
            raise RuntimeError("out of memory")
        return answers_to(asked, *words, **options)

    texts = [model.answer(pictures[0], f"{QUESTION}{n}").text for n in (0, 2)]
    monkeypatch.setattr(model, "answers_to", failing)
    told = [[] for _ in prompts]
    batcher = Batcher(model, 8)
    for prompt, own in zip(prompts, told, strict=True):
        batcher.submit(Job(prompt, {}, own.append, time.perf_counter()))
    with batcher:
        while not all(told):
            time.sleep(0.01)
    assert sizes == [3, 1, 1, 1]
    assert str(told[1][0]) == "out of memory"
    assert [own[0][0].text for own in (told[0], told[2])] == texts


def test_a_closed_batcher_tells_every_job_once(model):
    from lit_mm.inference.batching import Batcher, ClosedError, Job

    told, batcher = [], Batcher(model, 8)
    waiting, running = (Job(model.prompt(Ask("x")), {}, told.append, 0.0) for _ in range(2))
    batcher.submit(waiting)
    batcher.running = [running]
    batcher.close()
    batcher.close()
    assert [type(event) for event in told] == [ClosedError] * 2
    batcher.submit(waiting)
    assert [type(event) for event in told] == [ClosedError] * 3


def test_the_readmes_example(server, model, folder, pictures, capsys):
    [code] = [block for block in readme_blocks() if "import OpenAI" in block]
    code = code.replace("http://127.0.0.1:8000", server.url).replace("photo.jpg", str(folder / "images/0.png"))
    exec(code.replace("image/jpeg", "image/png"), {})
    printed = capsys.readouterr().out
    for scale, answer in model.answer(pictures[0], "what color is the shape?", "all").items():
        assert f"{scale} {answer.text} {answer.visual_tokens} " in printed


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_options_that_are_documented_are_there(capsys):
    with pytest.raises(SystemExit):
        serve(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    told = set(re.findall(r"`(--\w+)", (ROOT / "docs/serving.md").read_text()))
    assert told and told <= known


def test_ctrl_c_ends_what_takes_longer_than_the_grace_time(impatient):
    with impatient as server:
        start = time.monotonic()
        status, reply = server.post(asked("hello", max_tokens=LONG))
        assert status == 504 and reply["error"]["message"] == "not answered within 2 seconds, the limit"
        assert 2 <= time.monotonic() - start < 15
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="not answered within 2 seconds"):
            list(client.chat.completions.create(model="mine", messages=[user("hello")], max_tokens=LONG, stream=True))
        half = socket.create_connection(("127.0.0.1", server.port), 30)
        half.sendall(b"POST /preview HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in half.recv(100)
        late = begun(server, asked("hello", max_tokens=LONG))
        server.send(signal.SIGINT)
        assert server.status() == 0
        assert b" 503 " in late.recv(100)


def test_a_second_ctrl_c_ends_at_once(folder, tmp_path):
    """While a stream is read and another request waits; the grace time would leave them a minute."""
    with Serving(folder / "runs", tmp_path / "log.txt", "--grace", "60") as server:
        late = [begun(server, asked("hello", max_tokens=LONG, stream=True))]
        late.append(server.begin(asked("hello", max_tokens=LONG)))
        until(lambda: server.metric("lit_mm_waiting_requests"), 20)
        server.send(signal.SIGINT)
        server.logged("ending, requests in progress have 60 s")
        server.send(signal.SIGINT)
        assert server.status() == 0
        for connection in late:
            connection.close()
    assert server.log.read_text().endswith(" ended\n") and "Traceback" not in server.log.read_text()


def test_what_is_missing_is_named_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="cannot listen on 127"),
    ):
        serve(["--ckpt_path", str(tmp_path), "--port", str(taken.getsockname()[1])])
    with pytest.raises(FileNotFoundError, match="--allow_files: no folder nowhere"):
        serve(["--allow_files", "nowhere"])
    for option, message in {
        "--max_batch": "positive number, found 0",
        "--timeout": "positive number of seconds",
    }.items():
        with pytest.raises(SystemExit):
            serve([option, "0"])
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"serve needs fastapi, uvicorn, .*: pip install '\.\[serve\]'"):
        serve([])


def test_sigterm_ends_the_server_after_its_answers(server, client):
    """The last test of this server."""
    stream = create(client, user("hello"), max_tokens=600, stream=True, stream_options={"include_usage": True})
    next(stream)
    server.send(signal.SIGTERM)
    server.logged("ending, requests in progress have 20 s")
    with pytest.raises(openai.APIConnectionError):
        create(client.with_options(http_client=openai.DefaultHttpxClient()), user("hello"))
    *_, last = stream
    assert last.usage.completion_tokens == 600
    assert server.status() == 0
    server_log = server.log.read_text()
    assert server_log.rstrip().endswith("ended") and "Traceback" not in server_log
