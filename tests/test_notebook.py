"""extras/lab.ipynb is extras/lab.py, and runs from top to bottom."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


def test_the_notebook_is_its_source():
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat")
    import notebook

    kept = nbformat.read(ROOT / "extras/lab.ipynb", 4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in notebook.build().cells]
    pictures = 0
    for cell in kept.cells:
        if cell.cell_type == "code":
            pictures += sum("image/png" in output.get("data", {}) for output in cell.outputs)
    assert pictures >= 12


@pytest.mark.slow
def test_the_notebook_runs():
    """As a script, without a notebook's server: 2 min 30 s on 2 CPU cores."""
    for package in ("ipywidgets", "matplotlib"):
        pytest.importorskip(package, reason=f"pip install {package}")
    environment = os.environ | {"MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, "extras/lab.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    last = float(done.stdout.split("step 1000: loss ")[1].split()[0])
    print(f"loss {last}")
    assert last < 1.0
