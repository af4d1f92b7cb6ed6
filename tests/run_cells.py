"""Run the code cells of analysis.ipynb in order, without Jupyter: one machine can train, and
another draw from the runs that it left in runs/notebook/.

    LRM_PRESET=gpu python tests/run_cells.py
"""
import json
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "analysis.ipynb"


def code_cells():
    """(id, source) of every code cell."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [(c["id"], "".join(c["source"])) for c in cells if c["cell_type"] == "code"]


def run(chosen=lambda name: True, namespace=None):
    """Execute the chosen cells in one namespace, which is returned."""
    namespace = {"__name__": "notebook"} if namespace is None else namespace
    for name, source in code_cells():
        if chosen(name):
            exec(compile(source, f"{NOTEBOOK.name}, cell {name}", "exec"), namespace)
    return namespace


if __name__ == "__main__":                     # a process of the pool imports this file too
    os.environ["MPLBACKEND"] = "Agg"
    sys.path.insert(0, str(ROOT))
    try:
        import IPython.display  # noqa: F401
    except ImportError:                        # what the cells use of it, on a machine without
        silent = dict.fromkeys(("display", "update_display", "clear_output"), lambda *a, **k: None)
        module = sys.modules["IPython.display"] = types.ModuleType("IPython.display")
        vars(module).update(silent)
        sys.modules["IPython"] = types.ModuleType("IPython")
    run()
