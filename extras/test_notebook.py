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
    """As a script, without a notebook server, and with fewer training steps."""
    for package in ("ipywidgets", "matplotlib"):
        pytest.importorskip(package, reason=f"pip install {package}")
    source = (ROOT / "extras/lab.py").read_text()
    for long, short in (("\nsteps = 1000\n", "\nsteps = 250\n"), ("steps=500)", "steps=100)")):
        assert source.count(long) == 1
        source = source.replace(long, short)
    done = subprocess.run(
        [sys.executable, "-"],
        input=source,
        cwd=ROOT,
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    loss = float(done.stdout.split("step 250: loss ")[1].split()[0])
    print(f"loss {loss}")
    assert loss < 1.2
