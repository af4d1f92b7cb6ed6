"""Proofs that the exercises are fair: right solutions pass, wrong and blank ones fail."""
import json
import subprocess
import sys
from textwrap import dedent, indent
from xml.etree import ElementTree

import pytest
import torch

import exercises
import grade
import handout
from exercises import CHECKS, EXERCISES, load, owner

pytestmark = pytest.mark.classroom

# number: (right solutions, wrong solutions). A solution is a body, or a replacement (old, new) in
# our own body or else in the first right body that has the text `old`.
SOLUTIONS = {
    1: ([("self.row[:, None] * W", "(self.row * W.T).T"),
         ("self.row[:, None] * W", "torch.outer(self.row, torch.ones(W.shape[1])) * W")],
        [("self.row[:, None]", "self.row"), ("self.scalar * W", "W"), ("W * self.column", "W"),
         (".to(self.weight.dtype)", ""), ("W = self.weight", "W = self.weight.detach()")]),
    2: ([(".detach().clone()", ".data"),
         ("layer.weight.data =", "layer.weight = nn.Parameter(layer.weight.detach())\n    "
                                 "layer.weight.data =")],
        [("copy.deepcopy(model)", "model"), ("copy.deepcopy(model)", "copy.copy(model)"),
         ("raise ValueError", "print"), ("layer.effective_weight()", "layer.weight"),
         ("layer.__class__ = layer.plain", "pass"), ("delattr(layer, name)", "pass")]),
    3: ([("{name: name in learned for name in MULTIPLIERS}", "dict.fromkeys(learned, True)"), (
            "return", """learned = [] if matrix == "head" or multipliers == "none" else learned
return""")],
        [("both if matrix in SYMMETRY_FREE else ()", "both"), (" if chosen else ()", ""),
         ("SYMMETRY_FREE.get(matrix, ())", "both"), ('"gate", "up", "down"', '"up", "down"')]),
    4: ([("math.sqrt((1 + a * beta) / ((1 - a * a) * (1 - a * beta)))",
          "((2 / (1 - a * beta) - 1) / (1 - a * a)) ** 0.5"),
         ("(1 + a * beta) / ((1 - a * a) * (1 - a * beta))",
          "(1 + 2 * sum((a * beta) ** k for k in range(1, 2000))) / (1 - a * a)")],
        [("a * beta", "beta"), ("(1 - beta) / (1 + beta)", "1"), ("1 + 2 * sum", "1 + sum"),
         ("1 - a * a", "2 * lr * weight_decay"), ("lr * update_rms", "update_rms")]),
    5: ([("addmm(X, addmm(A, A, A, beta=b, alpha=c), X, beta=a)",
          "a * X + b * A @ X + c * A @ A @ X"), """
X = torch.nn.functional.normalize(G.flatten(-2), dim=-1, eps=eps).view(G.shape)
for _ in range(steps):
    B, I = X.mT @ X, torch.eye(X.shape[-1], dtype=G.dtype)
    X = X @ (coefficients[0] * I + B @ (coefficients[1] * I + coefficients[2] * B))
return X"""],
        [("dim=(-2, -1), keepdim=True", ""), ("return X.mT if tall else X", "return X"),
         (".clamp(min=eps)", ""), ("beta=b, alpha=c", "beta=c, alpha=b"),
         ("range(steps)", "range(5)")]),
    6: ([(".lerp_(p.grad, 1 - momentum)", ".mul_(momentum).add_((1 - momentum) * p.grad)"),
         ("muon_direction(p.grad, buffer, momentum, *settings)", "newton_schulz("
          "p.grad.lerp(buffer, momentum) if settings[0] else buffer, *settings[1:])")],
        [("*settings)", "False, *settings[1:])"), ("p.shape)", "p.shape[::-1])"),
         ("1 - lr * wd", '1 - adjusted_lr(lr, group["adjust_lr_fn"], p.shape) * wd'),
         ("closure is None", "True"), ("p.grad, buffer", "p.grad, p.grad"),
         ("p.grad is None", "p is None"), ("lr, group", "1, group")]),
    7: ([("kinds, kind_of)", "dict(reversed(kinds.items())), kind_of)"), (
            "return optimizer_groups(model, kinds, kind_of)", """
parameters = list(model.named_parameters())
return [dict(kinds[kind], kind=kind, params=[p for name, p in parameters if kind_of(name) == kind])
        for kind in sorted(kinds)]""")],
        [("config.embedding_lr, 0.0", "config.embedding_lr, wd"), ("wd / S_mlp", "wd"),
         ("in sorted(kinds)", 'in kinds if kind != "embedding"'), ("lr * S_attn", "lr"),
         ("clip=config.clip_multipliers", "clip=True"), ("is_multiplier(name)", '"row" in name')]),
    8: ([("torch.nn.utils.clip_grads_with_norm_(counted, max_norm, norm)",
          "for p in counted:\n        p.grad *= min(1, max_norm / norm)"), """
counted, others = ([p for g in groups if bool(g["clip"]) == wanted for p in g["params"]]
                   for wanted in (True, False))
norm = torch.nn.utils.clip_grad_norm_(counted, max_norm or math.inf)
return norm, (norm ** 2 + torch.nn.utils.clip_grad_norm_(others, math.inf) ** 2).sqrt()"""],
        [("everyone if counts", "everyone"), ("min(1, max_norm / norm)", "max_norm / norm"),
         ("norm, norm_of_all", "norm, norm"), (" or math.inf", ""), ("max_norm > 0", "True")]),
    9: (["""
h = x.shape[-1] // 2
z = torch.complex(x[..., :h].float(), x[..., h:].float()) * torch.complex(cos, sin)[..., :h]
return torch.cat((z.real, z.imag), -1).to(x.dtype)""", """
(a, b), cos, sin = x.tensor_split(2, -1), *(t.tensor_split(2, -1)[0] for t in (cos, sin))
return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)"""],
        [("-second, first", "second, -first"), (".to(x.dtype)", ""),
         ("z.real, z.imag", "z.imag, z.real"), ("x[..., :h].float(), x[..., h:]",
                                                "x[..., ::2].float(), x[..., 1::2]")]),
    10: ([("F.scaled_dot_product_attention(q, k, v, is_causal=True)", "(q @ k.mT * q.shape[-1] ** "
           "-0.5).masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf).softmax(-1) @ v"), """
heads = []
for q, k, v in zip(*(f(x).chunk(self.n_head, -1) for f in (self.q, self.k, self.v))):
    q, k = (rotate(z[:, None], cos, sin)[:, 0] for z in (q, k))
    weights = torch.einsum("btd, bsd -> bts", q, k).div(q.shape[-1] ** 0.5).exp().tril()
    heads.append(weights @ v / weights.sum(-1, keepdim=True))
return self.out(torch.cat(heads, dim=-1))"""],
         [(".triu(1)", ".triu(2)"), (", is_causal=True", ""), ("q.shape[-1] ** -0.5", "1"),
          ("rotate(k, cos, sin)", "k"), (".transpose(1, 2).re", ".re"), ("self.k, ", "self.q, ")]),
    11: (["""
G = G.to(W.dtype)
return (torch.einsum("ij, i, j -> ij", G, r, c), torch.einsum("ij, ij, j -> i", G, W, c),
        torch.einsum("ij, ij, i -> j", G, W, r))""", """
return r[:, None] * G * c, (G * W) @ c, (G * W).T @ r"""],
         [("* G * c", "* W * c"), ("(G * W) @ c", "(G * W).sum(1)"), ("* G * c", "* G"),
          ("(rG * W).sum(0)", "(rG * W).sum(1)"), ("(Gc * W)", "(G * W)")]),
    12: (["""
n, mean = len(differences), sum(differences) / len(differences)
variance = sum((x - mean) ** 2 for x in differences) / (n - 1)
t = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262][n - 2]
return mean, t * (variance / n) ** 0.5""",
          ("sum((x - mean) ** 2 for x in differences) / (n - 1)", "np.var(differences, ddof=1)")],
         [("/ (n - 1)", "/ n"), ("t * (v", "1.96 * (v"), ("[n - 2]", "[min(n, 9) - 1]"),
          ("variance / n)", "variance)")])}

def ours(number):
    """Signature and body of our own solution."""
    file, _ = EXERCISES[number]
    text = (handout.ROOT / file).read_text(encoding="utf-8")
    cells = [text] if file.endswith(".py") else [
        "".join(cell["source"]) for cell in json.loads(text)["cells"]]
    source = next(cell for cell in cells if f"# exercise {number}\n" in cell)
    node, start = next(found[2:] for found in handout.marked(source) if found[0] == number)
    lines = source.split("\n")
    return (dedent("\n".join(lines[node.lineno - 1:start])),
            dedent("\n".join(lines[start:node.end_lineno])))

def failures(number):
    """The messages of the tests of an exercise that fail."""
    failed = []
    for _, function, case in (c for c in CHECKS if c[0] == number):
        try:
            exercises.run(number, function, case)
        except (Exception, pytest.fail.Exception) as error:
            failed.append(str(error))
    return failed

@pytest.mark.parametrize("number", EXERCISES)
def test_right_passes_and_wrong_fails(number, monkeypatch):
    """Our solution and others pass. Wrong ones fail; so do blank ones, with a sentence."""
    module, (signature, body) = load(EXERCISES[number][0]), ours(number)
    def failures_of(solution):
        found = {}
        exec(signature + "\n" + indent(solution, "    "), vars(module), found)
        function, = found.values()
        function = torch.no_grad()(function) if number == 6 else function
        with monkeypatch.context() as patch:
            patch.setattr(*owner(module, number), function)
            return failures(number)
    bodies, (right, wrong) = [body], SOLUTIONS[number]
    def edited(solution):
        return solution if isinstance(solution, str) else next(
            b for b in bodies if solution[0] in b).replace(*solution)
    for solution in right:
        bodies.append(edited(solution))
    assert not failures(number) and not any(failures_of(body) for body in bodies)
    for solution in wrong:
        assert failures_of(edited(solution)), solution
    sentences = failures_of("raise NotImplementedError")
    assert len(sentences) == sum(c[0] == number for c in CHECKS) and failures_of("pass")
    assert set(sentences) == {f"exercise {number}: {EXERCISES[number][1]} has no body yet"}

def pytest_in(folder, marker):
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marker],
                          cwd=folder, capture_output=True, encoding="utf-8").stdout

def test_handout(tmp_path):
    """No line of a solution stands in the copy. Each exercise says that its body is missing. A
    syntax error in muon.py fails the exercises of muon.py, in a sentence, and no others."""
    copy = tmp_path / "copy"
    handout.main([str(copy)])
    assert {path.name for path in (copy / "tests").iterdir()} == {"conftest.py", "exercises.py"}
    text = "".join(path.read_text(encoding="utf-8").replace('\\"', '"') for path in copy.rglob("*")
                   if path.suffix in (".py", ".ipynb", ".md"))
    for number, (file, name) in EXERCISES.items():
        assert f"exercise {number}: {name} (see its docstring)" in text
        lines = [line.strip() for line in ours(number)[1].split("\n") if len(line) > 50]
        source = (handout.ROOT / file).read_text(encoding="utf-8")
        # a line that stands elsewhere too is no solution
        assert not [line for line in lines if line in text and source.count(line) == 1]
    output = pytest_in(copy, "exercise1 or exercise5 or exercise11")
    assert " failed" in output and " passed" not in output and all(
        f"exercise {n}: {EXERCISES[n][1]} has no body yet" in output for n in (1, 5, 11))
    (copy / "muon.py").write_text("def newton_schulz(:", encoding="utf-8")
    (copy / "multipliers.py").write_bytes((handout.ROOT / "multipliers.py").read_bytes())
    output = pytest_in(copy, "exercise1 or exercise5")
    assert "9 failed, 10 passed" in output and "muon.py cannot be imported: SyntaxError" in output

def test_handout_of_one_file(tmp_path):
    """--only muon: the other files are complete. A folder that exists is refused."""
    handout.main([str(tmp_path / "copy"), "--only", "muon"])
    assert [name for name in handout.FILES[:-1] if (tmp_path / "copy" / name).read_bytes()
            != (handout.ROOT / name).read_bytes()] == ["muon.py"]
    with pytest.raises(SystemExit, match="2"):
        handout.main([str(tmp_path / "copy")])

def test_handout_of_a_notebook():
    """A marked function loses its body, every code cell its outputs."""
    source = ["def f(a,\n", "      b):  # exercise 12\n", "    # sum\n", "    return a\n", "f()"]
    cells = [dict(cell_type="code", outputs=[1], execution_count=3, source=s)
             for s in (source, ["%matplotlib inline"])]
    found = json.loads(handout.blank_notebook(json.dumps({"cells": cells}), handout.blank))["cells"]
    source[2:4] = ['    raise NotImplementedError("exercise 12: f (see its docstring)")\n']
    assert found == [cell | dict(outputs=[], execution_count=None) for cell in cells]

def test_handout_without_git(tmp_path, monkeypatch):
    """Without git, caches, data and runs are left out."""
    for name in ("a.py", "figures/b.png", "runs/c", "x/__pycache__/d", "tests/test_muon.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(handout, "ROOT", tmp_path)
    assert sorted(handout.repository()) == ["a.py", "figures/b.png"]

@pytest.mark.parametrize("number, old, new, seconds, points, sentence", [
    (1, "", "", 600, 4, ""), (9, "", "", 600, 0, "model.py is missing"),
    (1, "W = self.weight", "import os; os._exit(0)", 600, 0, "the process died"),
    (5, "tall = ", "while True: pass\n    tall = ", 4, 0, "stopped after 4 seconds"),
    (5, "import math", "import math (", 600, 0, "muon.py cannot be imported: SyntaxError"),
    (5, "X.mT if tall else X", "X", 600, 4.4, "shape [4, 9] instead of [9, 4]")])
def test_points(number, old, new, seconds, points, sentence, tmp_path):
    """Full points; none if a file is missing, crashes, hangs or cannot be read; some for a part."""
    for name in ("multipliers.py", "muon.py"):
        text = (handout.ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    found = grade.grade(tmp_path, number, seconds)
    assert found[0] == points and sentence in found[1]

def test_reports(tmp_path, monkeypatch, capsys):
    """One line for each student, and the same numbers in both files."""
    monkeypatch.setattr(grade, "POINTS", {1: 4, 9: 6})
    monkeypatch.setattr(grade, "grade", lambda folder, n, _: (4, "") if n == 1 else (1.5, "no <"))
    ada, a, b = str(tmp_path), tmp_path / "a", tmp_path / "b"
    grade.main([ada, "--json", str(a), "--junit", str(b)])
    assert capsys.readouterr().out.splitlines()[1].split() == ["4", "1.5", "5.5", ada]
    assert json.loads(a.read_text()) == {ada: {"1": [4, ""], "9": [1.5, "no <"]}}
    cases = ElementTree.parse(b).iter("testcase")
    assert [[x.get("message") for x in case] for case in cases] == [[], ["1.5 of 6 points: no <"]]
    with pytest.raises(SystemExit, match="2"):
        grade.main([str(tmp_path / "nobody")])
