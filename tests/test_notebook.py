"""The notebook of the examples: it runs from top to bottom, and shows tables and plots."""

from pathlib import Path

import pytest
from helpers.models import require_embedded_model

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"
MODEL = '"smollm2-135m"'
SECONDS = 300  # for one cell

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")


def outputs_of(notebook, folder, monkeypatch):
    """Run a notebook in a folder; the outputs by the code of their cell."""
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setenv("PYTHONPATH", str(QUICKSTART.parents[1]), prepend=":")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel sets its own
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    return {cell.source: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


def assert_shows_tables_plots_and_text(outputs, folder):
    for source, shown in outputs.items():
        formats = {form for output in shown if output.output_type != "stream" for form in output.data}
        if source.endswith(".plot();"):
            assert "image/png" in formats, source
        if source.endswith(("graph", "\nscores", "\nplan")):
            assert {"text/html", "text/plain"} <= formats, source
    printed = "".join(o.text for shown in outputs.values() for o in shown if o.get("name") == "stdout")
    assert "equivalent: True" in printed
    assert printed.count("perplexity") == printed.count("The moon is") == 2
    assert (folder / "quickstart_pruned" / "pruning_plan.json").is_file()


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].source.splitlines()[2].startswith("This notebook ")
    assert not [cell.source for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]


def test_the_notebook_runs_on_a_tiny_model(home, tmp_path, monkeypatch):
    notebook = nbformat.read(QUICKSTART, as_version=4)
    loading = [cell for cell in notebook.cells if cell.cell_type == "code" and MODEL in cell.source]
    assert len(loading) == 1
    loading[0].source = loading[0].source.replace(MODEL, repr(str(home / "base")))
    assert_shows_tables_plots_and_text(outputs_of(notebook, tmp_path, monkeypatch), tmp_path)


@pytest.mark.slow
def test_the_notebook_runs_on_the_embedded_model(tmp_path, monkeypatch):
    require_embedded_model()
    notebook = nbformat.read(QUICKSTART, as_version=4)
    assert_shows_tables_plots_and_text(outputs_of(notebook, tmp_path, monkeypatch), tmp_path)
