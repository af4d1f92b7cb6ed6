"""Run the code cells of analysis.ipynb in order, without Jupyter.

    LRM_PRESET=smoke python tests/run_cells.py
"""
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "analysis.ipynb"

def run(chosen=lambda name: True):
    """Execute the code cells whose id is chosen, in one namespace, which is returned."""
    namespace = {"__name__": "notebook"}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code" and chosen(cell["id"]):
            code = compile("".join(cell["source"]), f"{NOTEBOOK.name}, {cell['id']}", "exec")
            exec(code, namespace)
    return namespace

if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"
    sys.path.insert(0, str(ROOT))
    run()
