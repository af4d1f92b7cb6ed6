"""Run the code cells of analysis.ipynb in order, without Jupyter.

    LRM_PRESET=smoke python tests/run_cells.py
"""
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "analysis.ipynb"


def run():
    """Execute the code cells, all in one namespace, which is returned."""
    namespace = {"__name__": "notebook"}
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            # A traceback shows this name, and so the cell.
            code = compile(source, f"{NOTEBOOK.name}, {cell['id']}", "exec")
            exec(code, namespace)
    return namespace


def printed():
    """All text that the cells have printed, as the committed notebook shows it."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    texts = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if output.get("name") == "stdout":
                texts += output["text"]
    return "".join(texts)


if __name__ == "__main__":
    # The figures are drawn, but no window opens.
    os.environ["MPLBACKEND"] = "Agg"
    sys.path.insert(0, str(ROOT))
    run()
