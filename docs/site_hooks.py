"""What mkdocs does with docs/ beyond mkdocs.yml: pages from files outside of it, and the public names of lit_mm."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from lit_mm import _HOMES

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "experiments/RESULTS.md": "results.md",
}
"""File of the repository -> page of the site, for those outside of docs/."""
FILES = {page: file for file, page in PAGES.items()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Headings have the anchors that GitHub gives them."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for file, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to the site's pages, and `::: lit_mm.Name` to the module that defines it."""
    markdown = re.sub(r"^::: lit_mm\.(\w+)$", _public, markdown, flags=re.MULTILINE)
    return re.sub(r"(?<=\]\()(?!\w+:)([^)#\s]+)", lambda found: _link(found[1], page.file, config, files), markdown)


def _public(found: re.Match) -> str:
    name = found[1]
    return f"::: lit_mm.{_HOMES[name]}.{name}\n    options: {{heading: lit_mm.{name}, toc_label: {name}}}"


def _link(target: str, origin: File, config: MkDocsConfig, files: Files) -> str:
    """A link in the repository -> the same link on the site, which gets a copy of a file that is no page."""
    folder = posixpath.dirname(FILES.get(origin.src_uri, f"docs/{origin.src_uri}"))
    file = posixpath.normpath(posixpath.join(folder, target))
    page = PAGES.get(file, file.removeprefix("docs/"))
    if page not in files.src_uris and (ROOT / file).is_file():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return posixpath.relpath(page, posixpath.dirname(origin.src_uri) or ".")
