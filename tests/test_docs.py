"""The documentation: the site builds strictly, its links and commands hold, and it needs no network."""

import html.parser
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llm_pruner.cli import _name_positionals
from llm_pruner.commands import COMMANDS, SCRIPTS
from llm_pruner.files import read_json
from llm_pruner.flags import parse_flags

ROOT = Path(__file__).resolve().parents[1]
SITE_PAGES = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [
    *SITE_PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md")),
]
KINDS_OF_PAGES = {"tutorials", "how-to", "reference", "explanation"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAMS = {f"llm-pruner {name}": command for name, command in COMMANDS.items()} | {
    f"python {name}": command for name, command in SCRIPTS.items()
}


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, *languages):
    return [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def command_lines():
    """Every command line of the project in a shell block, with the page that shows it."""
    for page in PAGES:
        for block in blocks(page, "bash", "sh", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.removeprefix("$ ").split(" && "):
                    if part.split("#")[0].strip().startswith(tuple(PROGRAMS)):
                        yield pytest.param(part, id=f"{name_of(page)}: {part[:60]}")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The folder of a reader who has written the files that the pages ask for."""
    criterion = next(code for code in blocks(ROOT / "docs/tutorials/write-a-criterion.md", "python"))
    (tmp_path / "my_criteria.py").write_text(criterion, encoding="utf-8")
    (tmp_path / "target.json").write_text('{"hidden_size": 504}', encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", command_lines())
def test_every_command_line_parses(line, reader):
    program, name, *argv = shlex.split(line, comments=True)
    command = PROGRAMS[f"{program} {name}"]
    usage = [word for word in argv if not word.startswith("[") and not word.endswith("]")]  # of a synopsis
    command.check_arguments(parse_flags(command.arguments_class, _name_positionals(command, usage)))


def test_command_lines_are_found():
    assert len(list(command_lines())) > 60


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_name_files_of_the_repository(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
        assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_compiles(page):
    for block in blocks(page, "python"):
        compile(block, name_of(page), "exec")


@pytest.mark.parametrize("page", SITE_PAGES, ids=name_of)
def test_lines_end_at_120_columns(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert [line for line in prose.splitlines() if len(line) > 120 and not line.startswith("| ")] == []


@pytest.mark.parametrize(
    ("page", "script"),
    [
        ("docs/explanation/choosing.md", "presets.py"),
        ("docs/explanation/scaling.md", "scaling.py"),
        ("docs/how-to/mixtures-of-experts.md", "experts_refit.py"),
        ("docs/results.md", "quantization.py"),
        ("docs/results.md", "sizes.py"),
    ],
)
def test_tables_are_those_of_the_results(page, script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--print"])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    printed = capsys.readouterr().out
    text = (ROOT / page).read_text(encoding="utf-8")
    assert printed.strip() and all(table.strip() in text for table in printed.split("\n\n"))


def test_the_table_of_peers_is_that_of_the_results(monkeypatch):
    folder = ROOT / "benchmarks" / "peers"
    monkeypatch.syspath_prepend(str(folder))
    rows = read_json(ROOT / "benchmarks" / "results" / "peers.json")["rows"]
    table = runpy.run_path(str(folder / "compare.py"))["table"](rows)
    assert table.strip() in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_the_tutorial_of_an_operator_prints_what_it_shows(tmp_path):
    page = ROOT / "docs" / "tutorials" / "add-an-operator.md"
    for name, code in zip(["ranged.py", "my_rules.py", "check.py"], blocks(page, "python"), strict=True):
        (tmp_path / name).write_text(code, encoding="utf-8")
    without_rule, with_rule = blocks(page, "text")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for script, shown in [("ranged.py", without_rule), ("check.py", with_rule)]:
        done = subprocess.run(
            [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        number = re.compile(r"\d\.\de[+-]\d+")  # rounding differs between machines
        assert number.sub("", done.stdout) == number.sub("", shown)


def test_pages_are_of_four_kinds():
    folders = {page.relative_to(ROOT / "docs").parts[0] for page in SITE_PAGES} - {"index.md", "results.md"}
    assert folders == KINDS_OF_PAGES


def test_every_example_is_linked():
    text = "".join(page.read_text(encoding="utf-8") for page in SITE_PAGES)
    for example in (ROOT / "examples").rglob("*.*"):
        assert f"examples/{example.relative_to(ROOT / 'examples').as_posix()})" in text, example.name


@pytest.mark.parametrize("text", ["plain", "ours", "refused", "|  |"])
def test_the_supported_models_are_a_table_without_a_script(text):
    assert text in (ROOT / "docs" / "reference" / "supported-models.md").read_text(encoding="utf-8")


class RemoteFiles(html.parser.HTMLParser):
    """Addresses that a browser fetches to show a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        fetched = given.get("src") or (tag == "link" and given.get("rel") != "canonical" and given.get("href")) or ""
        if fetched.startswith(("http:", "https:", "//")):
            self.addresses.append(fetched)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_fetches_nothing(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(SITE_PAGES)
    for page in pages:
        parser = RemoteFiles()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.addresses == [], page.name


def test_the_reference_has_every_public_name(site):
    import llm_pruner

    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    assert [name for name in llm_pruner.__all__ if name != "__version__" and f"llm_pruner.{name}" not in text] == []
    assert ":class:" not in text and ":func:" not in text


def test_the_page_of_flags_has_every_command(site):
    text = (site / "reference" / "flags.html").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"usage: llm-pruner {name} " not in text] == []
