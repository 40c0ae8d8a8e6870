"""extras/lab.ipynb has the cells of extras/lab.py, which runs from top to bottom."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def test_the_notebook_is_its_source():
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat")
    import notebook

    saved = nbformat.read(ROOT / "extras/lab.ipynb", 4)
    built = notebook.build()
    assert [cell.source for cell in saved.cells] == [cell.source for cell in built.cells]
    pictures = 0
    for cell in saved.cells:
        for output in cell.get("outputs", []):
            pictures += "image/png" in output.get("data", {})
    assert pictures > 0


@pytest.mark.slow
def test_the_notebook_runs():
    """As a script, without a notebook server: 2 min 30 s on 2 CPU cores."""
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
    loss = float(done.stdout.split("step 1000: loss ")[1].split()[0])
    print(f"loss {loss}")
    assert loss < 1.0
