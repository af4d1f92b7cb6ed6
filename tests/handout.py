"""Write a student's copy of this repository, in which the functions of the exercises have no body.

    python tests/handout.py OUT [--only muon]    # all exercises, or only those of muon.py

The comment "# exercise 5" marks a function. It ends a line of the function's signature or
decorator. Name, signature and docstring stay. Of tests/ only the exercises are copied.
"""
import argparse
import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# the files with exercises, in reading order
FILES = ["multipliers.py", "muon.py", "train.py", "model.py", "kernel.py", "analysis.ipynb"]
# A student gets these files of tests/. The other tests state solutions.
TESTS = {"tests/conftest.py", "tests/exercises.py"}
CACHES = {"__pycache__", ".pytest_cache", ".ipynb_checkpoints", ".venv", "venv", "data", "runs"}

def marked(source):
    """[(number, name, node, start)] of the marked functions of a Python source. `start` is the line
    number of the docstring's last line, or of the signature's."""
    found, lines = [], source.split("\n")
    for owner in ast.walk(ast.parse(source)):
        for node in ast.iter_child_nodes(owner):
            if isinstance(node, ast.FunctionDef):
                first, body = node.lineno - 1 - len(node.decorator_list), node.body[0]
                name = f"{owner.name}.{node.name}" if isinstance(owner, ast.ClassDef) else node.name
                for i in range(first, body.lineno - 1):
                    if mark := re.search(r"# exercise (\d+)$", lines[i]):
                        start = i + 1 if ast.get_docstring(node) is None else body.end_lineno
                        found.append((int(mark[1]), name, node, start))
    return found

def blank(source):
    """The source in which each marked function raises NotImplementedError."""
    lines = source.split("\n")
    # from the last function to the first, so that the line numbers of the others stay true
    for number, name, node, start in sorted(marked(source), key=lambda found: -found[3]):
        sentence = f"exercise {number}: {name} (see its docstring)"
        lines[start:node.end_lineno] = [
            " " * node.body[0].col_offset + f'raise NotImplementedError("{sentence}")']
    return "\n".join(lines)

def blank_notebook(text, edit):
    """The notebook without outputs; edit(source) replaces the code cells that have a mark."""
    notebook = json.loads(text)
    for cell in (c for c in notebook["cells"] if c["cell_type"] == "code"):
        source = "".join(cell["source"])
        source = edit(source) if "# exercise " in source else source
        cell.update(outputs=[], execution_count=None, source=source.splitlines(keepends=True))
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"

def repository():
    """Names of the files to copy: those that git tracks or, without a git, all but caches."""
    names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*")]
    if (ROOT / ".git").exists():
        names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    return [name for name in names if (ROOT / name).is_file() and not CACHES & {*name.split("/")}
            and (name in TESTS or not name.startswith("tests/"))]

def main(arguments=None):
    parser = argparse.ArgumentParser(description="Write a student's copy, with blank exercises.")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--only", choices=[Path(name).stem for name in FILES])
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.exit(2, f"{options.out} exists: name a new folder.\n")
    for name in repository():
        path = options.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, path)
        if name in FILES:
            edit = blank if options.only in (None, path.stem) else str
            text = path.read_text(encoding="utf-8")
            text = edit(text) if path.suffix == ".py" else blank_notebook(text, edit)
            path.write_text(text, encoding="utf-8")

if __name__ == "__main__":
    main()
