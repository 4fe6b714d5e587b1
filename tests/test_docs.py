"""Links of all Markdown files, the site's menu, and the public names on its API pages; without mkdocs."""

import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import lit_mm
from tests.helpers.environment import ROOT

GENERATED = {"index.md", "results.md", "contributing.md", "changelog.md"}
"""Pages that docs/site_hooks.py makes of files outside of docs/."""
GONE = {"FSDP1", "FSDP2"}
"""Public names that only raise or warn."""


def markdown_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split()]


def prose(file: Path) -> str:
    """The text without code, in which brackets are no links and # starts no heading."""
    return re.sub(r"^```.*?^```|`[^`\n]+`", _words, file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _words(code: re.Match) -> str:
    return "" if code[0].startswith("```") else re.sub(r"[^\w\s.-]", "", code[0])


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(file: Path) -> list[str]:
    """Links and pictures of a Markdown file that lead nowhere; links to other machines are not followed."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(file)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = file.parent / path if path else file
        if not linked.is_file() or (anchor and anchor not in anchors(linked)):
            found.append(f"{file.name}: {target}")
    return found


def test_every_link_leads_to_a_file_and_a_heading():
    assert [link for file in markdown_files() for link in broken(file)] == []


@pytest.mark.parametrize(
    "link", ["gone.md", "#no-heading", "other.md#second", "folder", "other.md#a-comment", "other.md#first"]
)
def test_a_broken_link_is_found(tmp_path, link):
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.md").write_text("# First: `run`!\n\n```sh\n# a comment\n```\n")
    (tmp_path / "page.md").write_text(f"# Page\n[fine](other.md#first-run) ![]({link}) `[code](nothing)`\n")
    assert broken(tmp_path / "page.md") == [f"page.md: {link}"]


def test_the_menu_lists_every_page_once():
    listed = re.findall(r"[\w/]+\.md", yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    pages = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages | GENERATED), "every page of docs/ stands once in mkdocs.yml's nav"


def test_every_public_name_is_on_an_api_page():
    text = "\n".join(file.read_text() for file in sorted((ROOT / "docs/api").glob("*.md")))
    named = re.findall(r"^::: lit_mm\.([\w.]+)$", text, re.MULTILINE)
    assert len(named) == len(set(named))
    assert {name for name in named if "." not in name} == set(lit_mm.__all__) - GONE
    for name in named:
        module, _, attribute = f"lit_mm.{name}".rpartition(".")
        assert getattr(import_module(module), attribute).__doc__, name
