"""Write the figures of a report into a folder, for slides and papers, without replacing those of another."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import PrunerError
from ..files import read_json, strict_json, write_bytes, write_text
from .drawing import Drawing

RECORD = "figures.json"  # says which report's figures a folder holds
FORMS = ("svg", "png", "pdf")
PRINT_DPI = 200


def make_names_unique(drawings: Sequence[Drawing]) -> None:
    """Number drawings of one name, large and small letters taken for one, as file systems do."""
    seen: Counter[str] = Counter()
    for drawing in drawings:
        name = drawing.name.casefold()
        seen[name] += 1
        if seen[name] > 1:
            drawing.name = f"{drawing.name}-{seen[name]}"


def other_figures(folder: Path, mark: str) -> str:
    """Return, in words, files in a folder that must not be replaced: all but the figures of the report ``mark``."""
    if not folder.is_dir():
        return "a file" if folder.exists() else ""
    try:
        record = read_json(folder / RECORD) if (folder / RECORD).exists() else None
    except PrunerError:
        record = {}
    if record is None:
        images = [file for form in FORMS for file in folder.glob(f"*.{form}")]
        return f"images that report did not write ({images[0].name})" if images else ""
    return "" if isinstance(record, dict) and record.get("report") == mark else "figures of other runs"


def write_figures(drawings: Sequence[Drawing], folder: Path, mark: str) -> None:
    """Write every figure as SVG, PNG and PDF; remove earlier ones of the same report that it no longer has.

    Raises:
        PrunerError: a file cannot be written.
    """
    files = [f"{drawing.name}.{form}" for drawing in drawings for form in FORMS]
    before = read_json(folder / RECORD)["files"] if (folder / RECORD).is_file() else []
    write_text(folder / RECORD, strict_json({"report": mark, "files": sorted({*before, *files})}))
    for drawing in drawings:
        for form in FORMS:
            buffer = io.BytesIO()
            drawing.write(buffer, form, dpi=PRINT_DPI)
            write_bytes(folder / f"{drawing.name}.{form}", buffer.getvalue())
    for name in set(before) - set(files):
        (folder / Path(name).name).unlink(missing_ok=True)
    write_text(folder / RECORD, strict_json({"report": mark, "files": files}))
