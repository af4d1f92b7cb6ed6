"""Proofs that the exercises are fair: other right solutions pass, and wrong ones fail.

    python -m pytest -m classroom

Every solution is tried in a handed-out file, in which all other exercises have no body.
"""
import json
import re
import shutil
import sys
from pathlib import Path
from textwrap import indent

import pytest

import exercises
import grade
import handout
# This imports all our files. They come back after a test that has put another one in their place.
import train  # noqa: F401
from handout import EXERCISES, FILES

pytestmark = pytest.mark.classroom

# A right body of each exercise, written in another way than that of the repository.
RIGHT = {
    1: """
u = update_rms
if u is None:
    u = ((1 - beta) / (1 + beta)) ** 0.5
a = 1 - lr * weight_decay
# The updates k steps apart are correlated by beta^k: a geometric series, summed.
both = 1 + 2 * sum((a * beta) ** k for k in range(1, 3000))
return lr * u * (both / ((1 - a) * (1 + a))) ** 0.5
""",
    2: """
factor = torch.ones(W.shape)
if self.scalar is not None:
    factor = factor * self.scalar
if self.row is not None:
    factor = (factor.T * self.row).T
if self.column is not None:
    factor = factor * self.column[None, :]
return (factor * W).to(W.dtype)
""",
    3: """
def plain(layer):
    if isinstance(layer, nn.Linear):
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        if layer.bias is not None:
            new.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    else:
        new = nn.Embedding(layer.num_embeddings, layer.embedding_dim)
    trained = raw_weight(layer).requires_grad
    new.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=trained)
    new.train(layer.training)
    return new

memo = {}
for layer in model.modules():
    if multipliers_of(layer):
        # copy.deepcopy takes the plain layer wherever the model has this layer.
        memo[id(layer)] = plain(layer)
return copy.deepcopy(model, memo)
""",
    4: """
if multipliers not in {"none", "scalar", "vector", "both"}:
    raise ValueError("multipliers")
mlp = {name: ("row", "column") for name in ("gate", "up", "down")}
blocks = {name: ("row", "column") for name in ("q", "k", "v", "out")} | mlp
everything = blocks | {"embedding": ("row", "column")}
tables = {"all": everything, "hidden": blocks, "symmetry_free": SYMMETRY_FREE, "mlp": mlp}
if placement not in tables:
    raise ValueError("placement")
names = tables[placement].get(matrix, ())
if multipliers == "none" or not names:
    return {}
if multipliers == "scalar":
    return {"scalar": True}
if multipliers == "both":
    names = ("scalar", *names)
return dict.fromkeys(names, True)
""",
    5: """
half = x.shape[-1] // 2
number = torch.complex(x[..., :half].float(), x[..., half:].float())
turned = number * torch.complex(cos, sin)[..., :half]
return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)
""",
    6: """
heads = []
D = x.shape[2] // self.n_head
q, k, v = self.q(x), self.k(x), self.v(x)
for h in range(self.n_head):
    place = slice(h * D, (h + 1) * D)
    q_h = rotate(q[:, None, :, place], cos, sin)[:, 0]
    k_h = rotate(k[:, None, :, place], cos, sin)[:, 0]
    scores = torch.einsum("btd, bsd -> bts", q_h, k_h) / D ** 0.5
    weights = scores.exp().tril()
    heads.append(weights @ v[:, :, place] / weights.sum(-1, keepdim=True))
return self.out(torch.cat(heads, dim=-1))
""",
    7: """
a, b, c = coefficients
X = G / (G.norm() if G.norm() > eps else eps)
I = torch.eye(G.shape[1], dtype=G.dtype)
for _ in range(steps):
    B = X.T @ X
    X = X @ (a * I + B @ (b * I + c * B))
return X
""",
    8: """
loss = None
if closure is not None:
    with torch.enable_grad():
        loss = closure()
for group in self.param_groups:
    mu = group["momentum"]
    length = group["lr"]
    for p in group["params"]:
        if p.grad is not None:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            M = self.state[p]["momentum_buffer"]
            M.mul_(mu).add_((1 - mu) * p.grad)
            G = mu * M + (1 - mu) * p.grad if group["nesterov"] else M.clone()
            O = newton_schulz(G, group["ns_coefficients"], group["ns_steps"], group["eps"])
            W = (1 - length * group["weight_decay"]) * p
            p.copy_(W - adjusted_lr(length, group["adjust_lr_fn"], tuple(p.shape)) * O)
return loss
""",
    9: """
groups = {}
for name, p in model.named_parameters():
    kind = kind_of(name)
    S = 1.0
    if kind == "mlp" or kind == "attn" and config.placement != "mlp":
        S = config.norm_scale
    if kind == "head":
        S = config.head_norm_scale
    lr, decay = config.lr, config.weight_decay
    if kind == "embedding":
        lr, decay = config.embedding_lr, 0.0
    if kind == "gain":
        decay = 0.0
    if kind == "multiplier":
        lr, decay = config.multiplier_lr, config.multiplier_weight_decay
    if kind not in groups:
        groups[kind] = {"kind": kind, "params": [], "S": S, "lr": lr * S, "initial_lr": lr * S,
                        "weight_decay": decay / S, "optimizer": "adamw", "clip": True}
    if kind in ("attn", "mlp"):
        groups[kind]["optimizer"] = config.optimizer
    if kind == "multiplier":
        groups[kind]["clip"] = config.clip_multipliers
    groups[kind]["params"].append(p)
return list(groups.values())
""",
    10: """
squares = {True: 0.0, False: 0.0}
for group in groups:
    for p in group["params"]:
        if p.grad is not None:
            squares[bool(group["clip"])] += p.grad.double().square().sum().item()
norm = squares[True] ** 0.5
norm_of_all = sum(squares.values()) ** 0.5
if norm > max_norm > 0:
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and group["clip"]:
                p.grad *= max_norm / norm
return torch.tensor(norm), torch.tensor(norm_of_all)
""",
    11: """
G = G.to(W.dtype)
dW = torch.einsum("ij, i, j -> ij", G, r, c)
return dW, (G * W) @ c, (G * W).T @ r
""",
    12: """
n = len(differences)
mean = sum(differences) / n
variance = sum((x - mean) ** 2 for x in differences) / (n - 1)
return mean, T95[n - 2] * math.sqrt(variance / n)
"""}

# Exercise, part of the name of the test that must fail, and a mistake: a text of the right body and
# what stands there instead. If the text is empty, the mistake is a whole body.
WRONG = [
    (1, "mean_of_W2", "(a * beta) ** k", "beta ** k"),
    (1, "mean_of_W2", "1 + 2 * sum", "1 + sum"),
    (1, "follows_the_law", "((1 - beta) / (1 + beta)) ** 0.5", "1.0"),
    (2, "entries", "(factor.T * self.row).T", "factor * self.row"),
    (2, "entries", "(factor * W).to(W.dtype)", "factor * W"),
    (2, "gradients", "(factor * W)", "(factor * W.detach())"),
    (3, "original", "copy.deepcopy(model, memo)", "copy.copy(model)"),
    (3, "becomes_plain", "layer.weight.detach()", "raw_weight(layer).detach()"),
    (3, "frozen", "requires_grad=trained", "requires_grad=True"),
    (3, "frozen", "new.train(layer.training)", "pass"),
    (3, "original", "", """
model = copy.deepcopy(model)
for layer in model.modules():
    if multipliers_of(layer):
        # This takes `weight` out of a class that the original has, too.
        parametrize.remove_parametrizations(layer, "weight")
return model
"""),
    (3, "same_function", "", """
model = copy.deepcopy(model)
# A layer in two places comes twice, so that W is multiplied twice.
for _, layer in model.named_modules(remove_duplicate=False):
    for name, p in multipliers_of(layer).items():
        raw_weight(layer).data *= p[:, None] if name == "row" else p
for layer in model.modules():
    if multipliers_of(layer):
        W = raw_weight(layer)
        layer.__class__ = type(layer).__base__
        del layer.parametrizations
        layer.weight = W
return model
"""),
    (4, "each_matrix", 'blocks | {"embedding"', 'blocks | {"head": ("row",), "embedding"'),
    (4, "each_matrix", "or not names", ""),
    (4, "unknown", 'raise ValueError("placement")', "return {}"),
    (5, "pairs_turn", "torch.complex(cos, sin)", "torch.complex(cos, -sin)"),
    (5, "pairs_turn", "x[..., :half].float(), x[..., half:]", "x[..., ::2].float(), x[..., 1::2]"),
    (5, "dtype", "dim=-1).to(x.dtype)", "dim=-1)"),
    (6, "scores_are_rotated", " / D ** 0.5", ""),
    (6, "scores_are_rotated", "rotate(k[:, None, :, place], cos, sin)[:, 0]", "k[:, :, place]"),
    (6, "scores_are_rotated", "self.v(x)", "rotate(self.v(x)[:, None], cos.repeat(1, 2), 0)[:, 0]"),
    (6, "scores_are_rotated", "self.q(x), self.k(x)", "self.k(x), self.q(x)"),
    (6, "equal_scores", "self.out(torch.cat(heads, dim=-1))", "torch.cat(heads, dim=-1)"),
    (7, "singular_values", "range(steps)", "range(5)"),
    (7, "singular_values", "return X", "return X if G.shape[0] <= G.shape[1] else X.T"),
    (7, "zeros", "(G.norm() if G.norm() > eps else eps)", "G.norm()"),
    (7, "dtype", "X = G / (G.norm()", "X = G.div_(G.norm()"),
    (8, "ten_steps", "mu * M + (1 - mu) * p.grad if", "M.clone() if"),
    (8, "ten_steps", "tuple(p.shape)", "tuple(p.shape)[::-1]"),
    (8, "decay_uses", "(1 - length *", '(1 - adjusted_lr(length, "original", (9, 1)) *'),
    (8, "of_the_group", 'group["momentum"]', 'self.defaults["momentum"]'),
    (8, "of_the_group", 'group["adjust_lr_fn"]', 'self.defaults["adjust_lr_fn"]'),
    (8, "of_the_group", 'group["eps"]', 'self.defaults["eps"]'),
    (8, "without_a_gradient", "if p.grad is not None:",
     "if p.grad is None:\n            break\n        if True:"),
    (8, "closure", "with torch.enable_grad():", "if True:"),
    (8, "closure", "return loss", "return None"),
    (9, "one_group", "groups.values()", "group for group in groups.values() if group['clip']"),
    (9, "one_group", "return list", 'groups["gain"]["params"] += [p]\nreturn list'),
    (9, "muon_gets", '("attn", "mlp")', '("attn", "mlp", "multiplier")'),
    (9, "lr_and_weight_decay", "config.embedding_lr, 0.0", "config.embedding_lr, decay"),
    (9, "clip_norm", "config.clip_multipliers", "True"),
    (9, "S_scales", '"weight_decay": decay / S', '"weight_decay": decay'),
    (9, "placement_mlp", ' and config.placement != "mlp"', ""),
    (10, "count_are_scaled", 'squares[bool(group["clip"])]', "squares[True]"),
    (10, "before_clipping", "(norm_of_all)", "(norm)"),
    (10, "without_a_gradient", "p.grad is not None:\n            squares",
     "True:\n            squares"),
    (10, "without_a_gradient", "if p.grad is not None and",
     "if p.grad is None:\n                break\n            if"),
    (11, "equation_4", "(G * W) @ c", "(G * W).sum(1)"),
    (11, "float32", "", """
r, c, W = r.to(G.dtype), c.to(G.dtype), W.to(G.dtype)
dW = r[:, None] * G * c
dr = (G * c * W).sum(1)
dc = (r[:, None] * G * W).sum(0)
return dW.float(), dr.float(), dc.float()
"""),
    (12, "mean_and_half", "T95[n - 2]", "1.96"),
    (12, "mean_and_half", "(variance / n)", "(variance)")]


# ---------------------------------------------------------------- right and wrong solutions
@pytest.fixture
def cases():
    """{test: its cases} of exercises.py."""
    _, recorder = grade.run_tests("", "--collect-only")
    return recorder.cases


@pytest.fixture
def student(tmp_path):
    """The folder of a student, which does not exist yet."""
    return tmp_path / "student"


@pytest.fixture
def run(student, monkeypatch):
    """run(marks, part) -> pytest's exit code and {case: sentence} of the tests with these marks and
    with `part` in their name. They see the student's files before ours."""
    def run_tests(marks, part=""):
        monkeypatch.syspath_prepend(student)
        for path in student.glob("*.py"):
            monkeypatch.delitem(sys.modules, path.stem)
            # PyTorch knows the operators of kernel.py by name. Those of students get another one.
            text = path.read_text(encoding="utf-8").replace("multipliers::", "student::")
            path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(exercises, "NOTEBOOK", student / "analysis.ipynb")
        code, recorder = grade.run_tests(marks, "--tb=no", "-k", part)
        return code, recorder.outcomes
    return run_tests


# A cell as that of the notebook: `interval` needs some of it, and some of it fails here.
CELL = f"""import math
from nowhere import nothing

T95: list[float] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
print("The cell runs.")


def interval(differences):  # exercise 12
    {handout.blank_line(12)}
"""


def hand_in(student, number, body):
    """Write the file of an exercise. This exercise has the body, and the others have none."""
    file, _ = EXERCISES[number]
    text = CELL
    if number != 12:
        text = handout.blank((handout.ROOT / file).read_text(encoding="utf-8"))
    before, line, after = text.partition(handout.blank_line(number))
    assert line
    spaces = before.rpartition("\n")[2]
    text = before + indent(body, spaces).strip() + after
    if number == 12:
        text = json.dumps({"cells": [{"source": text}]})
    student.mkdir()
    (student / file).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("number", EXERCISES)
def test_another_right_solution_gets_all_points(student, run, cases, number):
    """A solution that is written in another way than ours passes, with all others blank."""
    hand_in(student, number, RIGHT[number])
    code, outcomes = run(f"exercise{number}")
    points = sum(grade.POINTS[number].values())
    assert grade.judge(number, cases, code, outcomes) == (points, "")


@pytest.mark.parametrize("number, test, old, new", WRONG, ids=str)
def test_a_wrong_solution_fails(student, run, number, test, old, new):
    """A mistake fails the test of the property that it breaks."""
    body = RIGHT[number]
    assert old in body
    hand_in(student, number, body.replace(old, new) if old else new)
    code, outcomes = run(f"exercise{number}", test)
    assert code == 1
    assert any(outcomes.values())


def test_each_n_of_the_table_is_checked(student, run):
    """A t that is 1 % too large fails for each n from 2 to 10."""
    hand_in(student, 12, RIGHT[12].replace("T95", "1.01 * T95"))
    _, outcomes = run("exercise12")
    assert len(outcomes) == 9
    assert all(outcomes.values())


# ---------------------------------------------------------------- handing out
@pytest.fixture
def copy(student):
    """A student's copy of the repository."""
    handout.main([str(student)])
    return student


def test_a_copy_has_no_solution(copy, run):
    """All tests of the exercises say that the body is missing. Our tests, with solutions, stay."""
    _, outcomes = run("")
    got = {sentence.partition(": ")[2] for sentence in outcomes.values()}
    assert got == {f"exercise {n}: {name} has no body yet" for n, (_, name) in EXERCISES.items()}
    assert not list(copy.rglob("test_*"))


def test_what_a_copy_names_is_there(copy):
    """The copy has the files to which README.md leads, and the programs in commands."""
    text = (copy / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\((?!http)([^)#]+)", text)
    for path in copy.rglob("*.py"):
        text += path.read_text(encoding="utf-8")
    named += re.findall(r"python ([a-z/_]+\.py)", text)
    assert not [name for name in named if not (copy / name).exists()]


def test_a_copy_of_a_zip(copy, monkeypatch):
    """Handing out needs no git. The second student does not get the folder of the first one."""
    monkeypatch.setattr(handout, "ROOT", copy)
    names = sorted(path.name for path in copy.rglob("*"))
    handout.main([str(copy / "ada")])
    handout.main([str(copy / "bob")])
    assert sorted(path.name for path in (copy / "bob").rglob("*")) == names


def test_only_one_file_is_blank(student):
    """--only muon: all other files are complete. A folder that is there already is refused."""
    handout.main([str(student), "--only", "muon"])
    changed = [n for n in FILES if (student / n).read_bytes() != (handout.ROOT / n).read_bytes()]
    assert changed == ["muon.py"]
    with pytest.raises(SystemExit, match="2"):
        handout.main([str(student)])


NOTEBOOK = """{"cells": [
 {"cell_type": "code", "outputs": [1], "execution_count": 3, "source": ["%matplotlib"]},
 {"cell_type": "code", "outputs": [], "execution_count": 4, "source": [
  "def interval(a,\\n", "             b):  # exercise 12\\n", "    return a"]}]}"""


def test_a_blank_notebook():
    """A marked function loses its body, and a cell its outputs. Other cells may have a %magic."""
    magic, marked = json.loads(handout.blank_notebook(NOTEBOOK))["cells"]
    assert magic["outputs"] == []
    assert magic["source"] == ["%matplotlib"]
    assert marked["source"][2] == "    " + handout.blank_line(12)


# ---------------------------------------------------------------- grading
def test_points(cases):
    """All points together are 100. Each test has points in its exercise."""
    total = 0
    for number, tests in grade.POINTS.items():
        for test, worth in tests.items():
            total += worth
            marks = [mark.name for mark in getattr(exercises, test).pytestmark]
            assert f"exercise{number}" in marks
            # No test is left over at the end.
            del cases[test]
    assert total == 100
    assert not cases


def test_a_forgotten_mask_costs_a_third(student, run, cases):
    """Without the causal mask, attention loses more than a third of its 12 points."""
    hand_in(student, 6, RIGHT[6].replace(".tril()", ""))
    points, reasons = grade.judge(6, cases, *run("exercise6"))
    assert points < 8
    assert "test_no_token_sees_a_later_one" in reasons


def test_missing_and_unknown_cases(cases):
    """A case that did not run costs its points. A case that we do not have makes all invalid."""
    outcomes = dict.fromkeys(cases["test_zeros_stay_zeros"], "")
    assert grade.judge(7, cases, 0, dict(outcomes))[0] == 1
    with pytest.raises(ValueError, match="unknown tests"):
        grade.judge(7, cases, 0, outcomes | {"exercises.py::test_mine": ""})


# A repository whose exercise 11 is to double a number. It starts faster than ours.
TOY_INI = "[pytest]\npython_files = exercises.py\nmarkers =\n    exercise11: double\n"
TOY_TESTS = """
import pytest

@pytest.mark.exercise11
@pytest.mark.parametrize("x", [2, 3])
def test_gradients_are_those_of_equation_4(x):
    from kernel import double
    assert double(x) == 2 * x

@pytest.mark.exercise11
def test_sums_are_float32():
    from kernel import double
    assert double(0) == 0
"""
TOY_CASES = {
    "test_gradients_are_those_of_equation_4": [
        "tests/exercises.py::test_gradients_are_those_of_equation_4[2]",
        "tests/exercises.py::test_gradients_are_those_of_equation_4[3]"],
    "test_sums_are_float32": ["tests/exercises.py::test_sums_are_float32"]}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The folder of this repository, which stands in the place of ours."""
    (tmp_path / "tests").mkdir()
    for name in ("grade.py", "handout.py"):
        shutil.copy(handout.ROOT / "tests" / name, tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text(TOY_INI, encoding="utf-8")
    (tmp_path / "tests/exercises.py").write_text(TOY_TESTS, encoding="utf-8")
    monkeypatch.setattr(handout, "ROOT", tmp_path)
    return tmp_path


FORGERY = """
import os
report = '<testsuite tests="1"><testcase name="test_sums_are_float32"/></testsuite>'
open("result.xml", "w").write(report)
os.write(1, b'[0, {"tests/exercises.py::test_sums_are_float32": ""}]')
os._exit(0)
"""


@pytest.mark.parametrize("text, seconds, score, output", [
    ("def double(x): return x + x", 60, 7, ""),
    ("def double(x): return x * x", 60, 4, "test_gradients.*: AssertionError: assert 9 == "),
    ("def double(x): raise KeyboardInterrupt", 60, 0, "tests were stopped: pytest ended with 2"),
    ("import pytest; pytest.exit('done', returncode=0)", 60, 0, "did not run"),
    (FORGERY, 60, 0, "the process ended before the tests did"),
    ("while True: pass", 1, 0, "stopped after 1 seconds")], ids=str)
def test_grade(student, toy, text, seconds, score, output):
    """Points come from tests that have passed, and from nothing else."""
    student.mkdir()
    (student / "kernel.py").write_text(text, encoding="utf-8")
    result = grade.grade(student, TOY_CASES, seconds, 11)
    assert result["score"] == score
    assert re.search(output, result["output"])


def test_a_missing_file(student, cases):
    """A file that is not there costs the points of its exercises alone."""
    result = grade.grade(student, cases, 60, 7)
    assert result["score"] == 0
    assert "muon.py" in result["output"]


def test_reports(tmp_path, monkeypatch):
    """The results of all exercises of a student are in both files."""
    monkeypatch.setattr(grade, "grade", lambda folder, cases, seconds, n: {"score": n})
    results = tmp_path / "results.json"
    grades = tmp_path / "grades.json"
    grade.main([str(tmp_path), "--gradescope", str(results), "--json", str(grades)])
    scores = [{"score": n} for n in EXERCISES]
    assert json.loads(results.read_text(encoding="utf-8")) == {"tests": scores}
    assert json.loads(grades.read_text(encoding="utf-8")) == {str(tmp_path): scores}


def test_a_missing_folder(tmp_path):
    """A folder that is not there ends the program, before anything is graded."""
    with pytest.raises(SystemExit, match="2"):
        grade.main([str(tmp_path), str(tmp_path / "nobody")])
