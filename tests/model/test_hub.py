"""Names on the hub, and what happens without it."""

import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from lit_mm import load
from lit_mm.model.hub import folder_of, is_hub_name, reachable, split
from lit_mm.model.llm import from_source
from tests.helpers.network import COMMITS, dead_hub, own_hub  # noqa: F401 (fixtures)


def test_names_paths_and_revisions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "odd@name").mkdir()
    assert is_hub_name("owner/name") and is_hub_name("owner/name-1.5@v1.0")
    for path in ("runs/mine", "./runs", "../x", "~/x", "/a/b", "a/b/c", "name", "runs"):
        assert not is_hub_name(path)
    assert split("owner/name@abc") == ("owner/name", "abc")
    assert split("owner/name") == ("owner/name", None)
    assert split("odd@name") == ("odd@name", None)


def test_a_hub_that_does_not_answer_costs_seconds(dead_hub, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(
        FileNotFoundError, match=r"x: owner/name: .* out of reach\n.*hf download owner/name --revision v2"
    ):
        folder_of("owner/name@v2", ["*.json"], "x")
    assert time.monotonic() - started < 5


def cached(cache: Path, name: str, revision: str, files: dict[str, str]) -> None:
    """A snapshot as huggingface_hub keeps it."""
    home = cache / f"models--{name.replace('/', '--')}"
    folder = home / "snapshots" / ("0" * 39 + "1")
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text)
    (home / "refs").mkdir()
    (home / "refs" / revision).write_text(folder.name)


@pytest.mark.parametrize("offline", [True, False])
def test_the_cache_serves_without_a_network(dead_hub, tmp_path, monkeypatch, offline):  # noqa: F811
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    cached(tmp_path, "owner/name", "v2", {"config.json": "{}"})
    assert (folder_of("owner/name@v2", ["*.json"], "x") / "config.json").read_text() == "{}"
    said = "HF_HUB_OFFLINE is set" if offline else "out of reach"
    with pytest.raises(FileNotFoundError, match=said):
        folder_of("owner/name", ["*.json"], "x")  # another revision


def test_no_code_of_a_folder_runs(tmp_path):
    class Kind:
        @staticmethod
        def from_pretrained(**named):
            assert named["trust_remote_code"] is False
            return named

    assert from_source(Kind, str(tmp_path))["pretrained_model_name_or_path"] == str(tmp_path)


def test_a_revision_is_fetched_once_and_without_weights_that_are_there_twice(own_hub, monkeypatch):  # noqa: F811
    both = {"model.safetensors": b"a", "pytorch_model.bin": b"b", "mm_projector.bin": b"c", "tf_model.h5": b"d"}
    own_hub.files = {COMMITS["main"]: {"pytorch_model.bin": b"newest"}, COMMITS["v1"]: both}
    patterns = ["*.safetensors", "*.bin"]
    folder = folder_of("owner/name@v1", patterns, "x")
    assert folder.name == COMMITS["v1"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        "model.safetensors": b"a",
        "mm_projector.bin": b"c",
    }
    assert (folder_of("owner/name", patterns, "x") / "pytorch_model.bin").read_bytes() == b"newest"
    fetched = [path for path in own_hub.asked if "resolve" in path]
    assert folder_of("owner/name", patterns, "x", "v1") == folder
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reachable.cache_clear()
    assert folder_of("owner/name@v1", patterns, "x") == folder
    assert [path for path in own_hub.asked if "resolve" in path] == fetched


def test_a_repository_that_the_hub_does_not_have(own_hub):  # noqa: F811
    with pytest.raises(FileNotFoundError, match=r"x: owner/other: .*404"):
        folder_of("owner/other", ["*"], "x")


@pytest.mark.parametrize("broken", [True, 429, 503])
def test_a_hub_that_fails_leaves_what_the_cache_has(own_hub, monkeypatch, broken):  # noqa: F811
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own tries
    own_hub.files = {COMMITS["main"]: {"model.safetensors": b"a"}, COMMITS["v1"]: {"model.safetensors": b"b"}}
    folder = folder_of("owner/name", ["*.safetensors"], "x")
    own_hub.broken = broken
    assert folder_of("owner/name", ["*.safetensors"], "x") == folder
    with pytest.raises(FileNotFoundError, match=r"x: owner/name: .+\n.*hf download owner/name --revision v1"):
        folder_of("owner/name@v1", ["*.safetensors"], "x")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_the_hub_is_not_asked_about_a_commit_that_the_cache_has(own_hub, file):  # noqa: F811
    own_hub.files = {COMMITS["v1"]: {file: b"a", "config.json": b"{}"}}
    source, patterns = f"owner/name@{COMMITS['v1']}", ["*.safetensors", "*.bin", "*.json"]
    folder = folder_of(source, patterns, "x")
    assert sorted(each.name for each in folder.iterdir()) == ["config.json", file]
    own_hub.asked.clear()
    assert folder_of(source, patterns, "x") == folder
    assert own_hub.asked == []


def test_a_published_model_is_not_downloaded_before_load_says_what_to_do(own_hub):  # noqa: F811
    own_hub.files = {COMMITS["main"]: {"config.json": b'{"model_type": "llava"}', "model.safetensors": b"a"}}
    with pytest.raises(ValueError, match=r"load: owner/name is not what .*python -m lit_mm import owner/name FOLDER"):
        load("owner/name", "cpu")
    assert [path for path in own_hub.asked if path.endswith(".safetensors")] == []
