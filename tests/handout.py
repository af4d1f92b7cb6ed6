"""Write a student's copy of this repository, in which the functions of the exercises have no body.

    python tests/handout.py ada                 # all twelve exercises
    python tests/handout.py ada --only muon     # those of muon.py; the other files are complete

A function of an exercise has the comment "# exercise 5" at the end of a line of its signature or of
its decorator. Signature and docstring stay. The tests that state solutions are not copied.
"""
import argparse
import ast
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# number: file and function, in reading order
EXERCISES = {
    1: ("multipliers.py", "equilibrium_rms"), 2: ("multipliers.py", "Multipliers.forward"),
    3: ("multipliers.py", "merge"), 4: ("model.py", "placement_of"), 5: ("model.py", "rotate"),
    6: ("model.py", "Attention.forward"), 7: ("muon.py", "newton_schulz"),
    8: ("muon.py", "Muon.step"), 9: ("train.py", "parameter_groups"),
    10: ("train.py", "clip_gradients"), 11: ("kernel.py", "scale_backward"),
    12: ("analysis.ipynb", "interval")}
FILES = ["multipliers.py", "model.py", "muon.py", "train.py", "kernel.py", "analysis.ipynb"]
# What else a student gets
OTHERS = ["README.md", "LICENSE", "requirements.txt", "pytest.ini", ".gitignore", "figures/*",
          "tests/conftest.py", "tests/exercises.py", "tests/handout.py", "tests/grade.py",
          "tests/benchmark.py", "tests/run_cells.py"]


def blank_line(number):
    """The statement that takes the place of a body."""
    _, name = EXERCISES[number]
    return f'raise NotImplementedError("exercise {number}: {name} has no body yet")'


def blank(source):
    """The Python source, in which each marked function raises NotImplementedError."""
    lines = source.split("\n")
    nodes = list(ast.walk(ast.parse(source)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    # The last function comes first, so that the line numbers of the others stay true.
    for function in sorted(functions, key=lambda node: -node.lineno):
        first = function.body[0]
        head = lines[function.lineno - 1 - len(function.decorator_list):first.lineno - 1]
        marks = re.findall("# exercise ([0-9]+)\n", "\n".join(head) + "\n")
        if marks:
            has_docstring = ast.get_docstring(function) is not None
            start = first.end_lineno if has_docstring else first.lineno - 1
            new = " " * first.col_offset + blank_line(int(marks[0]))
            lines[start:function.end_lineno] = [new]
    return "\n".join(lines)


def blank_notebook(text):
    """The notebook with blank functions. No cell has outputs, which show what they compute."""
    notebook = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for cell in code:
        cell.update(outputs=[], execution_count=None)
        source = "".join(cell["source"])
        # A cell without an exercise need not be plain Python: it may have a %magic.
        if "# exercise " in source:
            cell["source"] = blank(source).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def copy_to(out):
    """Copy the files of a student to the folder `out`, with all solutions."""
    for pattern in FILES + OTHERS:
        for path in ROOT.glob(pattern):
            if path.is_file():
                copied = out / path.relative_to(ROOT)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copied)


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write a student's copy, with blank exercises.")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--only", choices=[Path(name).stem for name in FILES])
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.exit(2, f"{options.out} exists: name a new folder.\n")
    copy_to(options.out)
    for name in FILES:
        path = options.out / name
        if options.only in (None, path.stem):
            text = path.read_text(encoding="utf-8")
            text = blank(text) if path.suffix == ".py" else blank_notebook(text)
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
