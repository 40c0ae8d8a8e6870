"""assets/lab.ipynb is assets/lab.py, and runs from top to bottom."""

import pytest
from conftest import ROOT


def test_the_notebook_is_its_source():
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat nbclient")
    pytest.importorskip("nbclient", reason="pip install nbformat nbclient")
    import notebook

    kept = nbformat.read(ROOT / "assets/lab.ipynb", 4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in notebook.build().cells]
    pictures = 0
    for cell in kept.cells:
        if cell.cell_type == "code":
            pictures += sum("image/png" in output.get("data", {}) for output in cell.outputs)
    assert pictures >= 12


@pytest.mark.slow
def test_the_notebook_runs():
    """Five minutes on 2 CPU cores; twice that at most."""
    for package in ("nbformat", "nbclient", "ipykernel", "ipywidgets", "matplotlib"):
        pytest.importorskip(package, reason=f"pip install {package}")
    import notebook

    done = notebook.build()
    notebook.run(done)  # an error in a cell is raised here
    said = "".join(
        output.get("text", "") for cell in done.cells for output in cell.get("outputs", ())
    )
    last = float(said.split("step 1000: loss ")[1].split()[0])
    print(f"loss {last}")
    assert last < 1.0
