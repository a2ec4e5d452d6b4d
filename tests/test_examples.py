"""The examples that need nothing but the embedded model run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import require_embedded_model

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
OUTPUT = {
    "custom_criterion.py": "neurons",
    "compare_plans.py": "of the kept neurons are the same",
    "depth_order.py": "block_influence",
    "prune_and_generate.py": "ratio 0.4:",
    "prune_and_quantize.py": "quantized",
}
QUICK: tuple[str, ...] = ()


def test_every_example_is_listed():
    assert {path.name for path in EXAMPLES.glob("*.py")} == OUTPUT.keys()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in OUTPUT]
)
def test_example_runs(name, tmp_path):
    require_embedded_model()
    if name == "prune_and_quantize.py":
        pytest.importorskip("torchao", reason="torchao is not installed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert OUTPUT[name] in done.stdout
