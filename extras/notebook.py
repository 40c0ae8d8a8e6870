"""Write extras/lab.ipynb: run extras/lab.py as a notebook and keep its outputs.

    pip install nbclient nbformat ipykernel ipywidgets matplotlib
    python extras/notebook.py            # 5 minutes on 2 CPU cores -> extras/lab.ipynb

In lab.py, "# %%" begins a code cell and "# %% [markdown]" a text cell. In text, "@exercise 5" is
replaced by the description in extras/course/handout.py; in code, "# %pip" becomes "%pip".
"""

import re
import sys
from pathlib import Path

import nbformat

sys.path.insert(0, str(Path(__file__).resolve().parent / "course"))
from handout import EXERCISES  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def describe(number):
    """An exercise in one sentence."""
    exercise = EXERCISES[number - 1]
    names = " and ".join(f"`{name}`" for _, name in exercise["functions"])
    return f"*Exercise {number}, {exercise['title']}: write {names}. {exercise['expect']}*"


def build():
    """The notebook, without outputs."""
    notebook = nbformat.v4.new_notebook()
    source = (ROOT / "extras/lab.py").read_text()
    for number, text in enumerate(re.split(r"^# %%", source, flags=re.M)[1:]):
        kind, body = text.split("\n", 1)
        if "markdown" in kind:
            body = re.sub(r"^# ?", "", body, flags=re.M)
            body = re.sub(r"^@exercise (\d+)$", lambda m: describe(int(m[1])), body, flags=re.M)
            cell = nbformat.v4.new_markdown_cell(body.strip())
        else:
            cell = nbformat.v4.new_code_cell(body.replace("# %pip", "%pip").strip())
        cell.id = f"cell-{number}"  # by default random
        notebook.cells.append(cell)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    return notebook


def main():
    from nbclient import NotebookClient

    notebook = build()
    client = NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(ROOT)}})
    client.execute()  # raises the error of a failing cell
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # timestamps
    nbformat.write(notebook, ROOT / "extras/lab.ipynb")
    print("wrote extras/lab.ipynb")


if __name__ == "__main__":
    main()
