"""`python -m lit_mm export` on trained runs, and the way back."""

import json
import shutil
from types import SimpleNamespace
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import lit_mm.hub.export
from lit_mm import load
from lit_mm.hub.adapter import take_adapter
from lit_mm.hub.export import main
from lit_mm.hub.importers import main as import_main
from lit_mm.hub.loading import name_of
from lit_mm.model.hub import reachable
from tests.helpers.command_line import lit_mm as command
from tests.helpers.environment import ROOT
from tests.helpers.exporting import keep_code_in
from tests.helpers.media import noise
from tests.helpers.network import dead_hub  # noqa: F401 (a fixture)
from tests.helpers.serving import Serving, asked, trained_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was validated, tested and calibrated."""
    folder = trained_run(tmp_path_factory.mktemp("trained"))
    config, root = folder.parent.parent / "exp.yaml", folder.parent.parent
    command("test", f"--config={config}", f"--ckpt_path={folder}", f"--data.init_args.test={root / 'val.json'}")
    command("calibrate", str(folder))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    main([str(run), str(folder)])
    return folder


def test_the_folder_answers_as_the_run_does(run, exported):
    ours, theirs = load(run, "cpu"), load(exported, "cpu")
    picture = noise(64, 64)
    for scale, answer in ours.answer(picture, "what color is it?", "all").items():
        again = theirs.answer(picture, "what color is it?", scale)
        assert again.ids == answer.ids
        assert again.logprobs == pytest.approx(answer.logprobs, abs=1e-6)
    assert theirs.answer(picture, "what?", "auto").tried == ours.answer(picture, "what?", "auto").tried
    assert theirs.trained_scales == ours.trained_scales == [16, 4, 1]
    printed = command("ask", f"--ckpt_path={exported}", "--json", "--tokens=4", "what is red?")
    assert json.loads(printed.splitlines()[-1])["answers"]["4"]["visual_tokens"] == 0


def test_it_is_served(run, exported, tmp_path):
    with Serving(exported, tmp_path / "log.txt") as server:
        status, told = server.get("/v1/models")
        assert status == 200 and json.loads(told)["data"][0]["id"] == "model"
        status, reply = server.post(asked("what is red?"))
        expected = load(run, "cpu").answer(None, "what is red?")
        assert status == 200 and reply["choices"][0]["message"]["content"] == expected.text
    assert [name_of(str(path)) for path in (run, exported, "me/model")] == ["runs/version_0", "model", "me/model"]


def test_it_is_evaluated(run, exported, tmp_path):
    """`test` on the folder gives the figures of the run."""
    root = run.parent.parent
    given = [f"--config={root / 'exp.yaml'}", f"--data.init_args.test={root / 'val.json'}"]
    command("test", *given, f"--model.init_from={exported}", f"--trainer.default_root_dir={tmp_path}")
    names = [name for scale in (16, 4, 1) for name in (f"logprob@{scale}", f"answer@{scale}")]
    files = run / "accuracy_tokens.parquet", next(tmp_path.glob("**/accuracy_tokens.parquet"))
    ours, theirs = (pq.read_table(file).to_pydict() for file in files)
    for name in names:
        assert theirs[name] == (pytest.approx(ours[name], abs=1e-5) if "logprob" in name else ours[name])


def test_it_is_not_imported(exported, tmp_path):
    with pytest.raises(ValueError, match=r"is what `export` wrote: load, ask, serve and model\.init_from"):
        import_main([str(exported), str(tmp_path / "imported")])


def test_a_name_on_the_hub_opens_like_its_folder(exported, tmp_path, monkeypatch):
    revision, cache = "0" * 39 + "1", tmp_path / "models--me--model"
    shutil.copytree(exported, cache / "snapshots" / revision, ignore=shutil.ignore_patterns("*.py"))
    (cache / "refs").mkdir()
    (cache / "refs/v1").write_text(revision)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reachable.cache_clear()
    opened, ours = load("me/model@v1", "cpu").vlm.state_dict(), load(exported, "cpu").vlm.state_dict()
    assert all(torch.equal(opened[name], ours[name]) for name in ours)
    with pytest.raises(FileNotFoundError, match=r"load: me/other: .*\n.*hf download me/other"):
        load("me/other")
    reachable.cache_clear()


def test_the_card_has_what_was_measured_and_no_path(run, exported):
    card = (exported / "README.md").read_text()
    told = json.loads((run / "accuracy_tokens.json").read_text())
    for row in told["scales"]:
        assert f"| {row['scale']} | {row['accuracy']:.1%} |" in card
    for text in (card, (ROOT / "docs/export.md").read_text()):  # show messages in the same form
        assert '{"type": "image", "image": "photo.jpg"}' in text
    assert "## test: " in card and "## val: " in card and told["run"]["device"] in card
    for file in exported.iterdir():
        if file.suffix != ".safetensors":
            assert str(run.parent.parent) not in file.read_text() and "experiments/" not in file.read_text()


def test_another_run_starts_from_it_and_is_the_same_without_training(run, exported, tmp_path):
    still = [f"--model.parts.{part}.lr=0" for part in ("encoder", "projector", "llm")]
    config, runs = run.parent.parent / "exp.yaml", f"--trainer.default_root_dir={tmp_path}"
    command("fit", f"--config={config}", f"--model.init_from={exported}", "--trainer.max_steps=1", runs, *still)
    main([str(tmp_path / "version_0"), str(tmp_path / "again")])
    first, again = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_sharded_checkpoint_is_put_together(run, exported, tmp_path):
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    sharded = tmp_path / "version_0/checkpoints/last.ckpt"
    dcp.save({"state_dict": saved.pop("state_dict")}, checkpoint_id=sharded, no_dist=True)
    torch.save(saved, sharded / "meta.pt")
    (tmp_path / "version_0/tokenizer").symlink_to(run / "tokenizer")
    main([str(sharded), str(tmp_path / "model")])
    assert (tmp_path / "model/model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def test_large_models_are_written_in_shards(run, tmp_path, monkeypatch):
    monkeypatch.setattr(lit_mm.hub.export, "SHARD", "20KB")
    main([str(run), str(tmp_path / "model")])
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    ours, theirs = load(run, "cpu").vlm.state_dict(), load(tmp_path / "model", "cpu").vlm.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_export_goes_to_a_new_folder_alone(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, said in (("file", "is a file"), ("link", "is a link to .*nowhere"), ("", "is not empty")):
        with pytest.raises(FileExistsError, match=said):
            main([str(run), str(tmp_path / name)])


def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(lit_mm.hub.export, "describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(run), str(tmp_path / "model")])
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A run with adapters that are not zero."""
    root = trained_run(tmp_path_factory.mktemp("adapted")).parent.parent
    lora = ["--model.parts.llm.lora.r=4", "--model.parts.llm.lora.lora_alpha=12", "--model.parts.llm.lr=0.5"]
    command("fit", f"--config={root / 'exp.yaml'}", f"--model.init_from={root / 'runs/version_0'}", *lora)
    return root / "runs/version_1"


def test_adapters_are_merged_or_written_beside_the_model(adapted, tmp_path, monkeypatch):
    keep_code_in(tmp_path / "code", monkeypatch)
    main([str(adapted), str(tmp_path / "merged")])
    main([str(adapted), str(tmp_path / "apart"), "--lora", "adapter"])
    before = adapted.parent / "version_0"
    main([str(before), str(tmp_path / "before")])
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("merged", "apart", "before")}
    adapted_layers = [
        name for name in weights["merged"] if not torch.equal(weights["merged"][name], weights["apart"][name])
    ]
    assert all("language_model.layers" in name for name in adapted_layers) and len(adapted_layers) == 7
    assert all(torch.equal(weights["apart"][name], weights["before"][name]) for name in adapted_layers)
    ids = torch.arange(9)[None]
    base, merged = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
        for name in ("apart", "merged")
    )
    with torch.no_grad():
        plain, expected = base(ids).logits, merged(ids).logits
        found = PeftModel.from_pretrained(base, tmp_path / "apart/adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)
    opened = load(tmp_path / "apart", "cpu").vlm.llm(ids).logits
    torch.testing.assert_close(opened, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_do_not_fit_beside_adapters_are_named(adapted, tmp_path):
    model, file = load(adapted, "cpu"), tmp_path / "version_1/checkpoints/last.ckpt"
    file.parent.mkdir(parents=True)
    saved = torch.load(adapted / "checkpoints/last.ckpt", weights_only=True)
    saved["state_dict"]["vlm.llm.model.other.weight"] = saved["state_dict"].pop("vlm.llm.model.norm.weight")
    torch.save(saved, file)
    said = r"last\.ckpt does not fit the LLM: 2 missing or unexpected weights: model\.norm\.weight, model\.other"
    with pytest.raises(ValueError, match=said):
        take_adapter(model, str(file))


def test_a_run_without_adapters_has_none_to_write(run, tmp_path):
    with pytest.raises(ValueError, match=r"--lora adapter: .* is not of a run with model\.parts\.llm\.lora"):
        main([str(run), str(tmp_path / "model"), "--lora", "adapter"])


class Hub:
    """Remembers what it was asked."""

    calls: ClassVar[list] = []

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))

    def upload_folder(self, repo_id, folder_path):
        self.calls.append(("upload", repo_id, sorted(file.name for file in folder_path.iterdir())))
        return f"https://hub/{repo_id}"


def test_the_folder_is_pushed(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lit_mm.hub.export, "reachable", lambda: True)
    monkeypatch.setattr(lit_mm.hub.export, "HfApi", Hub)
    Hub.calls.clear()
    main([str(run), str(tmp_path / "model"), "--push_to_hub", "me/model", "--private"])
    create, (_, name, files) = Hub.calls
    assert create == ("create", "me/model", True, True) and name == "me/model"
    assert {"config.json", "model.safetensors", "README.md", "modeling_lit_mm.py", "chooser.json"} <= set(files)
    assert 'from_pretrained("me/model"' in (tmp_path / "model/README.md").read_text()
    assert "https://hub/me/model" in capsys.readouterr().out


def test_without_a_hub_the_folder_is_there_and_the_error_says_how_to_upload_it(run, tmp_path, dead_hub):  # noqa: F811
    with pytest.raises(ConnectionError, match=r"out of reach.*`hf upload me/model .*model` uploads it"):
        main([str(run), str(tmp_path / "model"), "--push_to_hub", "me/model"])
    assert (tmp_path / "model/config.json").is_file()


def test_a_hub_that_refuses_is_quoted(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise HfHubHTTPError(
            "401 Client Error: invalid token", response=SimpleNamespace(headers={}, status_code=401, request=None)
        )

    monkeypatch.setattr(lit_mm.hub.export, "reachable", lambda: True)
    monkeypatch.setattr(lit_mm.hub.export.HfApi, "create_repo", refuse)
    with pytest.raises(ConnectionError, match=r"me/model: 401 Client Error: invalid token: .*hf upload"):
        main([str(run), str(tmp_path / "model"), "--push_to_hub", "me/model"])


def test_private_goes_with_push(run, tmp_path):
    with pytest.raises(ValueError, match="--private goes with --push_to_hub"):
        main([str(run), str(tmp_path / "model"), "--private"])
