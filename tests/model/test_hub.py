"""Names on the hub, and what happens without it."""

import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from lit_mm.model.hub import folder_of, is_hub_name, split
from lit_mm.model.llm import from_source
from tests.helpers.network import dead_hub  # noqa: F401 (a fixture)


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
