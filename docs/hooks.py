"""Hooks of the site: pages and files from outside docs/, and the flags of every command.

Links in docs/ are those of the repository, so that they also work where the repository is browsed. The site holds the
linked files from outside docs/ under paths of its own, and links are rewritten to these.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from llm_pruner.commands import COMMANDS
from llm_pruner.flags import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "CHANGELOG.md": "project/changes.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
FILES = (
    "examples/*.py",
    "examples/launch/*",
    "benchmarks/*.py",
    "benchmarks/*.yaml",
    "benchmarks/peers/*.py",
    "benchmarks/results/*.json",
)
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")

_site_paths: dict[str, str] = {}  # of files outside docs/, by their paths in the repository


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files from outside docs/ that pages link to, and the page of all flags."""
    _site_paths.clear()
    _site_paths.update(PAGES)
    _site_paths.update({p: p for p in (f.relative_to(ROOT).as_posix() for g in FILES for f in sorted(ROOT.glob(g)))})
    for path, site_path in _site_paths.items():
        files.append(File.generated(config, site_path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, "reference/flags.md", content=_flags_page()))
    return files


def _flags_page() -> str:
    lines = ["# All flags", "", "`llm-pruner COMMAND --help` prints these texts.", ""]
    for name, command in COMMANDS.items():
        parser = build_parser(
            command.arguments_class, f"llm-pruner {name}", command.summary, positionals=command.positionals
        )
        lines += [f"## {name}", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(lines)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between files of the repository to links between pages of the site."""
    site_path = page.file.src_uri
    origin = next((path for path, uri in PAGES.items() if uri == site_path), f"docs/{site_path}")

    def rewrite(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), match[1]))
        uri = _site_paths.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(uri, posixpath.dirname(site_path) or ".")

    return LINK.sub(rewrite, markdown)
