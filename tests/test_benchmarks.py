"""The benchmarks run, write what they promise, and count operations as torch does."""

import argparse
import importlib
import json
import time
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_mm.callbacks.token_efficiency import TokenEfficiency
from tests.helpers.environment import ROOT, installed
from tests.helpers.serving import trained_run


def benchmark(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments/benchmarks"))
    return importlib.import_module(name)


@pytest.fixture
def nested_step(monkeypatch):
    return benchmark("nested_step", monkeypatch)


@pytest.mark.slow
@installed("easy_vqa")
def test_watching_costs_less_than_a_hundredth_of_a_step(tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["watching", "--steps", "22", "--repetitions", "1", "--json", str(file)])
    watching = benchmark("watching", monkeypatch)
    watching.main()
    made = json.loads(file.read_text())
    each_step = ("train_batch_start", "train_batch_end", "_backward", "optimizer_step", "zero_grad")
    hooks = {name for name in vars(TokenEfficiency) if name.startswith("on_") and name.endswith(each_step)}
    assert made["hooks_us_per_step"].keys() == {"counting", *watching.HOOKS} == {"counting", *hooks}
    assert min(made["hooks_us_per_step"].values()) > 0
    assert 0 < made["hooks_percent"] < 1


@pytest.mark.slow
def test_data_loading_writes_its_figures(tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    words = ["--size", "768", "--count", "3", "--frames", "2", "--repetitions", "3", "--padding-records", "3000"]
    monkeypatch.setattr("sys.argv", ["data_loading", *words, "--records", "600", "--json", str(file)])
    benchmark("data_loading", monkeypatch).main()
    made = json.loads(file.read_text())
    assert all(made[name] > 0 for name in ("loader_ratio", "loader_ratio_pillow", "video_ratio", "images_per_s"))
    assert 0 <= made["padding"] < 0.02 < made["padding_length_grouped"] < 1
    assert made["second_start"]["memory_mib"] < 200


def test_both_bare_ways_of_video_find_the_frames_of_this_package(tmp_path, monkeypatch):
    """A rival that shows other frames would be no rival."""
    bench = benchmark("data_loading", monkeypatch)
    [file] = bench.render_videos(tmp_path, 1).iterdir()
    video = bench.Video("", file.name, file, bench.VideoOptions(max_frames=3))
    times, frames = video.read()
    for found in (bench.whole_file(times, file), bench.seeking(times, file)):
        assert [list(image.getdata()) for image in found] == [list(image.getdata()) for image in frames]


@pytest.mark.parametrize("scales", [[576], [576, 144, 36, 9, 1]])
def test_operations_are_those_torch_counts(nested_step, scales):
    """Of the linear layers; torch counts attention without its causal half."""
    size = nested_step.SIZES["tiny"]
    vlm = nested_step.build(size, "cpu", torch.float32)
    weights = [1 / 5] * 5 if len(scales) > 1 else [1.0, 0.0, 0.0, 0.0, 0.0]
    batch = nested_step.batch_of(35, [20, 7], weights, "cpu")
    nested = torch.randn(2, sum(nested_step.SCALES), size.width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vlm(batch, nested=nested)
    seen = sum(35**2 / 2 + sum((s + t) * 35 + (s + t) ** 2 / 2 for s in scales) for t in (20, 7))
    counted = nested_step.operations(size, "llm", 35, [20, 7], scales, 0.0)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]  # some transformers rotate positions with bmm
    assert products == counted - 4 * size.layers * size.width * seen


@pytest.fixture
def alone(nested_step, monkeypatch):
    """One thread and its own time, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(nested_step, "times_of", partial(nested_step.times_of, clock=time.process_time))
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_nested_step_writes_its_figures(nested_step, tmp_path, capsys):
    file = tmp_path / "out.json"
    words = ["--size", "tiny", "--texts", "5", "4,9", "--repetitions", "3", "--parts", "llm", "model"]
    nested_step.main([*words, "--ways", "authors", "packed-branch", "--json", str(file), "--no-memory"])
    made = json.loads(file.read_text())
    assert {"hardware", "versions", "sizes", "dtype"} <= set(made)
    assert [(row["way"], row["part"], row["texts"]) for row in made["rows"][:4]] == [
        ("single", "llm", [5]),
        ("authors", "llm", [5]),
        ("packed-branch", "llm", [5]),
        ("single", "llm", [4, 9]),
    ]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and row["limit"] >= 1 for row in made["rows"])
    assert "by tokens alone the limit" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.usefixtures("alone")
def test_the_llm_part_runs_no_encoder(nested_step, monkeypatch):
    """And whatever measures the whole model under its name is refused before anything is measured."""
    monkeypatch.setattr(nested_step.ConvNeXtEncoder, "forward", lambda encoder, pixels: pixels.new_zeros(1, 8, 24, 24))
    vlm, case = nested_step.build(nested_step.SIZES["tiny"], "cpu", torch.float32), (35, [20])
    for way in ("single", "authors", "reference", "packed-branch", "packed-sequential"):
        llm, model = (nested_step.make_step(vlm, way, part, case, "cpu") for part in ("llm", "model"))
        nested_step.check_encodings(vlm, way, "llm", llm)
        nested_step.check_encodings(vlm, way, "model", model)
        with pytest.raises(RuntimeError, match=f"{way}, llm: expected 0 runs of the encoder in a step, found [15]"):
            nested_step.check_encodings(vlm, way, "llm", model)
    make_step = nested_step.make_step
    monkeypatch.setattr(nested_step, "make_step", lambda vlm, way, part, *rest: make_step(vlm, way, "model", *rest))
    with pytest.raises(RuntimeError, match="single, llm: expected 0 runs"):
        nested_step.rows_of(nested_step.parsed(["--size", "tiny"]), "llm", case)


def test_figures_that_cannot_be_are_refused(nested_step, monkeypatch, tmp_path):
    """Those of issue 13: a part above the whole, and below the limit of its operations."""

    def rows(ratio, noise, whole):
        made = [
            ("single", "llm", 1.0, 1.0),
            ("packed-branch", "llm", ratio, 1.66),
            ("packed-branch", "model", whole, 1.3),
        ]
        return [
            nested_step.Row(way, part, 35, [64], seconds, seconds - noise, seconds + noise, seconds, limit, None)
            for way, part, seconds, limit in made
        ]

    assert nested_step.impossible(rows(1.61, 0.02, 2.5), "cpu") == []  # as measured: 0.97 of the limit
    assert nested_step.impossible(rows(1.3, 0.2, 2.5), "cpu") == []  # noise explains it
    [limit] = nested_step.impossible(rows(1.3, 0.02, 2.5), "cpu")
    assert limit == "packed-branch, P=35, T=[64]: the LLM part takes 0.78 of the arithmetic limit"
    assert nested_step.impossible(rows(1.3, 0.02, 2.5), "cuda") == []
    [whole] = nested_step.impossible(rows(1.7, 0.02, 1.4), "cuda")
    assert whole.endswith("the LLM part takes 1.700 s, the whole model 1.400 s")
    monkeypatch.setattr(nested_step, "rows_of", lambda *_: rows(1.3, 0.02, 2.5))
    with pytest.raises(SystemExit, match="refused, these figures cannot be"):
        nested_step.main(["--texts", "64", "--parts", "llm", "--json", str(tmp_path / "out.json")])
    assert not (tmp_path / "out.json").exists()


def test_authors_loss_is_the_mean_over_scales(nested_step):
    """Faithful: their way and ours differ in cost, not in value (one sample; they average per scale)."""
    vlm = nested_step.build(nested_step.SIZES["tiny"], "cpu", torch.float32)
    batch = nested_step.batch_of(3, [6], [1 / 5] * 5, "cpu")
    nested = torch.randn(1, sum(nested_step.SCALES), 64)
    theirs = nested_step.authors_loss(vlm, batch, nested)
    assert torch.allclose(theirs, vlm(batch, nested=nested).loss, rtol=1e-5)


def test_a_training_step_writes_its_plan_and_its_time(tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    words = ["--device", "cpu", "--size", "tiny", "--precision", "32-true", "--steps", "1", "--json", str(file)]
    benchmark("training_step", monkeypatch).main([*words, "--consistency", "finest"])
    made = json.loads(file.read_text())
    assert len(made["seconds_without"]) == 1
    assert 1 < made["limit"] < 1.01
    assert made["planned_bytes"] > 1536 * 1536 * 3 * 4  # normalized pixels in float32
    assert made["step_flops"] > 0
    assert len(made["seconds"]) == 1
    assert made["measured_bytes"] is made["mfu"] is None


def test_encoder_writes_its_figures(tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    words = ["--backbone", "convnext_atto", "--width", "48", "--depth", "1", "--pixels", "64", "--repetitions", "1"]
    benchmark("encoder", monkeypatch).main([*words, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["encoder"] for row in rows] == 2 * ["lit_mm", "timm", "timm channels_last", "Hugging Face"]
    assert all((row["five_stages"] > row["seconds"]) == row["encoder"].startswith("timm") for row in rows)


def test_a_forward_pass_is_no_longer_than_both(monkeypatch):
    rows = [{"encoder": "timm", "backward": backward, "seconds": 2.0 - backward} for backward in (False, True)]
    encoder = benchmark("encoder", monkeypatch)
    assert encoder.impossible(rows) == ["timm: forward takes 2.0000 s, with the backward pass 1.0000 s"]
    rows[0]["seconds"] = 1.05
    assert encoder.impossible(rows) == []


def test_a_loader_is_no_faster_than_its_own_decoding(monkeypatch):
    loading = benchmark("data_loading", monkeypatch)
    figures = {"workers": 0, "loader_ratio_least": 1.25, "padding": -0.1, "padding_length_grouped": 0.3}
    faster, share = loading.impossible(figures)
    assert faster == "the loader takes 0.80 of what its own decoding takes alone"
    assert share == "padding: expected a share, found -0.100"
    assert loading.impossible(figures | {"loader_ratio_least": 1.05, "padding": 0.1}) == []


def test_watching_takes_less_than_the_step(monkeypatch, tmp_path):
    watching = benchmark("watching", monkeypatch)
    options = argparse.Namespace(steps=1, repetitions=1, json=tmp_path / "out.json")
    with pytest.raises(SystemExit, match=r"the hooks take 150.0 % of a step"):
        watching.report({"with": [2.0], "without": [1.0]}, {"counting": [1.5]}, options)
    assert not options.json.exists()


def test_an_answer_takes_no_less_than_its_limit(monkeypatch):
    latency = benchmark("latency", monkeypatch)

    def part(seconds, read=2**30):
        return latency.Part("decode", 16, 1e9, read, seconds, by_flops=0.01, by_bytes=0.1)

    assert latency.impossible([part(0.07)], "cpu") == ["decode at 16 visual tokens: 70 ms, the limit is 100 ms"]
    possible = [part(0.09), part(0.07, read=2**20)]  # caches hold a mebibyte
    assert latency.impossible(possible, "cpu") == latency.impossible([part(0.07)], "cuda") == []


def test_latency_writes_its_figures(tmp_path, monkeypatch, capsys):
    bench = benchmark("latency", monkeypatch)
    file = tmp_path / "out.json"
    words = ["--size", "tiny", "--pixels", "128", "--new-tokens", "3", "--repetitions", "1", "--json", str(file)]
    monkeypatch.setattr(bench, "MATRIX", {"cpu": 256})
    monkeypatch.setattr(bench, "COPIED", 2**22)
    bench.main(words)
    made = json.loads(file.read_text())
    order = [(part["name"], part["visual_tokens"]) for part in made["parts"]]
    assert order == [("encode", None), *((name, n) for name in ("prefill", "decode") for n in (4, 1, 0))]
    assert all(part["seconds"] > 0 and part["by_flops"] > 0 and part["by_bytes"] > 0 for part in made["parts"])
    for row, part in zip(made["scales"], made["parts"][1:4], strict=True):
        assert row["first_token"] == made["parts"][0]["seconds"] + part["seconds"]
        assert row["answer"] > row["first_token"]
    assert "down to none" in capsys.readouterr().out


def test_limits_of_an_answer_by_hand(monkeypatch):
    """A Llama of width 64 with two layers, 1,000 words and an untied head; SmolLM2's is tied."""
    bench = benchmark("latency", monkeypatch)
    answering = bench.Answering(bench.parsed(["--size", "tiny", "--pixels", "64", "--new-tokens", "3"]))
    seconds = {"encode": 1.0, **{f"{name} {n}": 1.0 for name in ("prefill", "decode") for n in (1, 0)}}
    _, one, none, further, _ = answering.parts(seconds, bench.Roof(1e9, 1e9))
    layer, head = 4 * 64**2 + 3 * 64 * 128, 64 * 1000
    weights = 4 * (2 * layer + head + 5 * 64)  # and the norms
    assert (one.visual_tokens, one.bytes) == (1, weights + 4 * 65 * 2 * 2 * 64)
    assert one.flops == 2 * (65 * 2 * layer + head) + 2 * 4 * 64 * 65 * 66 // 2
    assert none.flops == 2 * (64 * 2 * layer + head) + 2 * 4 * 64 * 64 * 65 // 2
    assert further.seconds == 0.5
    assert further.flops == 2 * (2 * layer + head) + 2 * 4 * 64 * 66.5
    assert further.bytes == weights + 4 * 66.5 * 2 * 2 * 64
    assert one.limit == one.by_flops == one.flops / 1e9
    assert further.limit == further.by_bytes == further.bytes / 1e9
    assert bench.unread_bytes(answering.vlm) == 4 * head
    with torch.device("meta"):
        small = bench.build(bench.SIZES["small"], (64, 64), "meta", torch.float32)
    assert bench.unread_bytes(small) == 0


def test_decoding_leaves_the_cache_as_it_was(monkeypatch):
    bench = benchmark("latency", monkeypatch)
    answering = bench.Answering(bench.parsed(["--size", "tiny", "--pixels", "64", "--new-tokens", "5"]))
    cache = answering.prefill(torch.randn(1, 9, 64)).past_key_values
    keys = cache.layers[0].keys.clone()
    answering.decode(cache)
    assert cache.get_seq_length() == 9
    assert torch.equal(cache.layers[0].keys, keys)


def test_a_line_through_prefills_finds_what_made_them(monkeypatch):
    bench = benchmark("latency", monkeypatch)
    made = [bench.Part("prefill", 0, flops, 0, 0.02 + flops / 5e10, 0, 0) for flops in (1e9, 3e9, 9e9)]
    assert bench.line_through(made) == pytest.approx({"beside": 0.02, "rate": 5e10, "worst": 0.0})


def test_cpu_time_is_refused_with_several_threads(monkeypatch, capsys):
    bench = benchmark("latency", monkeypatch)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit):
        bench.parsed(["--cpu-time"])
    assert "2 threads, expected one thread" in capsys.readouterr().err


@pytest.fixture
def answering(nested_step, monkeypatch):
    return benchmark("answering", monkeypatch)


TRIAL = ["--size", "tiny", "--questions", "3", "--new-tokens", "4", "--repetitions", "3"]


def test_answers_take_the_operations_that_torch_counts(answering):
    """All linear layers of every run: the packed prompts, each further token, the heads; a run that computed a shared
    beginning again, other scales or further tokens would not agree."""
    arguments = answering.parsed(TRIAL)
    made = answering.Answering(arguments, "llm")
    for name, calls in answering.runs_of(arguments).items():
        with FlopCounterMode(display=False) as counter:
            made.run(calls)
        products = sum(n for operator, n in counter.get_flop_counts()["Global"].items() if "mm" in str(operator))
        attention = 4 * 64 * sum(pairs_by_hand(call) for call in calls)
        assert products == sum(made.operations(call) for call in calls) - attention, name


def pairs_by_hand(call):
    """Causal pairs of a prefix of 35, an image and 29 further tokens, and of an answer after them; or of four further
    turns of 4 + 29, of which all but the last 30 may be kept."""
    if call.turns > 1:
        length = 35 + 576 + 29 + 4 * (4 + 29)
        return sum(range(length - 29 if call.kept else 1, length + 1))
    own = sum(sum(range(64 + s + 1, 64 + s + call.new_tokens)) + sum(range(36, 65 + s)) for s in call.scales)
    shared = 35
    if len(call.scales) == call.images == 1:
        shared += call.scales[0]
        own -= sum(range(36, shared + 1))
    return own * call.questions + sum(range(shared + 1))


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
def test_answering_writes_its_figures(answering, nested_step, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "times_of", nested_step.times_of)
    file = tmp_path / "out.json"
    answering.main([*TRIAL, "--json", str(file)])
    made = json.loads(file.read_text())
    assert {"hardware", "versions", "command", "rows"} <= set(made)
    llm, model = ([row for row in made["rows"] if row["part"] == part] for part in ("llm", "model"))
    assert [row["case"] for row in llm] == [row["case"] for row in model]
    assert len(llm) == 11
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in made["rows"])
    one_image, firsts = model[2], llm[4:10]
    assert 1 / 3 < one_image["limit"] < 0.4
    assert one_image["ratio"] < 0.8  # one image is encoded instead of three
    assert [row["case"] for row in llm if not row["lowest"]] == ["all scales", "3 questions, 3 images"]
    assert model[10]["limit"] < llm[10]["limit"] < 0.1
    assert model[10]["ratio"] < 1
    assert [row["limit"] for row in firsts[:5]] == sorted((row["limit"] for row in firsts[:5]), reverse=True)
    assert 1 < firsts[5]["limit"] < (35 + 766 + 5 * 29) / (35 + 576 + 29)  # by tokens, but attention sees fewer pairs


def test_what_a_ratio_of_answers_cannot_be_below(answering):
    one, batch = answering.Call(), answering.Call(questions=9, images=9)
    assert answering.lowest_ratio([answering.Call(answering.SCALES)], [one], "llm", 1.4) == 1
    assert answering.lowest_ratio([answering.Call([9])], [one], "model", 0.4) == 0.4
    assert answering.lowest_ratio([one], [batch], "llm", 0.1) == 0.1
    assert answering.lowest_ratio([one], [batch], "model", 0.1) == 0  # a large batch may be slower
    together, alone = answering.Call(questions=9, new_tokens=2), answering.Call(new_tokens=2)
    assert answering.lowest_ratio([together], [alone] * 9, "llm", 0.9) == 0


def test_answers_about_images_encoded_again_are_refused(answering, monkeypatch):
    arguments = answering.parsed(TRIAL)
    made = answering.Answering(arguments, "llm")
    made.check("one", [answering.Call(questions=3, new_tokens=4)])
    generate = answering.generate
    monkeypatch.setattr(answering, "generate", lambda *words, nested: generate(*words, nested=None))
    with pytest.raises(RuntimeError, match=r"one, llm: expected .* \(\[1\], 0\), found \(\[1\], 1\)"):
        made.check("one", [answering.Call()])


def test_answers_that_cannot_be_are_refused(answering):
    """Answers decoded together can be below the ratio of their operations, but not below the operations' own time."""

    def row(ratio, least, lowest, most):
        return answering.Row("a", "llm", "b", 1.0, 1.0 / ratio, ratio, 0.9, least, lowest, most)

    assert answering.impossible([row(0.6, 0.5, 0.0, 0.6), row(0.6, 0.5, 0.9, 0.8)], "cpu") == []  # noise explains it
    [limit] = answering.impossible([row(0.6, 0.5, 0.9, 0.7)], "cpu")
    assert limit == "a, llm: 0.60 relative to b, expected at least 0.90"
    [least] = answering.impossible([row(0.6, 1.5, 0.0, 0.6)], "cpu")
    assert least == "a, llm: 1 s, its operations alone take 1.5 s"
    assert answering.impossible([row(0.6, 1.5, 0.9, 0.6)], "cuda") == []


@pytest.mark.slow
@installed("fastapi")
def test_a_load_test_loses_nothing(tmp_path, monkeypatch):
    bench, file = benchmark("serving", monkeypatch), tmp_path / "out.json"
    monkeypatch.chdir(ROOT)
    run = trained_run(tmp_path)
    bench.main(["--ckpt_path", str(run), "--requests", "40", "--alone", "4", "--json", str(file)])
    alone, at_once = json.loads(file.read_text())["rows"]
    assert [alone[name] for name in ("requests", "answered", "lost")] == [4, 4, 0]
    assert [at_once[name] for name in ("requests", "answered", "refused", "hung_up", "lost")] == [40, 32, 4, 4, 0]
    assert at_once["batch"] > 2 * alone["batch"] and at_once["p50"] <= at_once["p95"] <= at_once["seconds"]


def test_a_load_test_knows_what_is_lost(monkeypatch):
    bench = benchmark("serving", monkeypatch)
    requests = bench.requests_of(["16", "1"], 20, 8, 1)
    assert [request.kind for request in requests[:6]] == ["wrong", *["answer"] * 4, "hangs up"]
    both = next(request for request in requests if request.choices == 2)
    body = json.dumps({"choices": [{"finish_reason": "stop"}, {"finish_reason": "length"}]}).encode()
    assert bench.fault_of(b"HTTP/1.1 200 OK\r\n\r\n" + body, both) == ""
    assert "expected 1 answers" in bench.fault_of(b"HTTP/1.1 200 OK\r\n\r\n" + body, requests[1])
    assert "found nothing" in bench.fault_of(b"", requests[1])
    assert "found 200" in bench.fault_of(b"HTTP/1.1 200 OK\r\n\r\n" + body, requests[0])
    assert "found 500" in bench.fault_of(b"HTTP/1.1 500 Internal Server Error\r\n\r\n{}", requests[1])
