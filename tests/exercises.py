"""The tests of the exercises, which check what the docstrings promise: pytest -m exercise5

A test imports only the file of its exercise, and needs no other exercise to be solved. No solution
stands here: results are compared with numbers, with the printed equations and with PyTorch. The
tolerances allow every correct order of operations; the errors to be found are far larger.
"""
import ast
import functools
import importlib
import json
import math
import sys
from contextlib import nullcontext, suppress
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

# number: (file, function)
EXERCISES = {
    1: ("multipliers.py", "_Multipliers.effective_weight"), 2: ("multipliers.py", "merge"),
    3: ("multipliers.py", "placement_of"), 4: ("multipliers.py", "equilibrium_rms"),
    5: ("muon.py", "newton_schulz"), 6: ("muon.py", "Muon.step"),
    7: ("train.py", "parameter_groups"), 8: ("train.py", "clip_gradients"),
    9: ("model.py", "rotate"), 10: ("model.py", "Attention.forward"),
    11: ("kernel.py", "scale_backward"), 12: ("analysis.ipynb", "interval")}
CHECKS = []                    # (number, function, [case])
STAND_INS = {}                 # number: (exercise that need not be solved, what the tests use then)

def check(number, *cases):
    """Make a test of an exercise from function(module, case), for each case."""
    def register(function):
        CHECKS.extend((number, function, case) for case in [[c] for c in cases] or [[]])
        return function
    return register

@functools.cache
def load(file):
    """The module in a file. Of the notebook: functions and constants of the cell with `interval`,
    which can use math, np and torch."""
    if file.endswith(".py"):
        return importlib.import_module(file[:-3])
    path = next(p for p in (Path(folder, file) for folder in sys.path) if p.is_file())
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    names = dict(math=math, np=np, torch=torch)
    for node in ast.parse(next(source for source in cells if "def interval(" in source)).body:
        if isinstance(node, (ast.FunctionDef, ast.Assign)):
            with suppress(NameError):      # a constant that needs anything else is left out
                exec(compile(ast.Module([node], []), file, "exec"), names)
    return SimpleNamespace(**names)

def owner(module, number):
    """The class or module that has the function of an exercise, and the function's name."""
    *path, name = EXERCISES[number][1].split(".")
    return functools.reduce(getattr, path, module), name

def run(number, function, case):
    """One test. A broken file and a missing body are reported in one sentence."""
    file, name = EXERCISES[number]
    try:
        module = load(file)
    except Exception as error:
        pytest.fail(f"{file} cannot be imported: {type(error).__name__}: {error}", pytrace=False)
    try:
        with nullcontext() if number not in STAND_INS else mock.patch.object(
                *owner(module, STAND_INS[number][0]), STAND_INS[number][1]):
            function(module, *case)
    except NotImplementedError:
        pytest.fail(f"exercise {number}: {name} has no body yet", pytrace=False)
    except (TypeError, AttributeError) as error:
        assert "NoneType" not in str(error), f"exercise {number}: {name} returns None ({error})"
        raise

def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def close(got, want, tolerance=1e-5):
    """`got` has the shape of `want`; the norm of the difference is at most 1e-5 of the norm."""
    got, want = (torch.as_tensor(x).detach().double() for x in (got, want))
    assert got.shape == want.shape, f"shape {list(got.shape)} instead of {list(want.shape)}"
    assert (got - want).norm() <= tolerance * want.norm() + 1e-12, f"{got} instead of {want}"

VECTOR = ("row", "column")
LAYERS = list(product(("Linear", "Embedding"), ((), ("scalar",), ("row",), ("column",), VECTOR)))

def layer(m, kind, names, dtype=torch.float64):
    """A layer with W [5, 3] and with the named multipliers, all random."""
    shape = (3, 5) if kind == "Linear" else (5, 3)
    made = getattr(m, "Multiplier" + kind)(*shape, dtype=dtype, **dict.fromkeys(names, True))
    for name in names:
        getattr(made, name).data.uniform_(0.5, 2)
    return made

def by_hand(layer):
    """W_eff, entry by entry."""
    W, number = layer.weight.detach().clone(), lambda p, *i: 1 if p is None else p[i].item()
    for i, j in product(range(5), range(3)):
        W[i, j] *= number(layer.scalar) * number(layer.row, i) * number(layer.column, j)
    return W

@check(1, *LAYERS)
def entries_dtype_and_gradients_are_right(m, case):
    made = layer(m, *case)
    W_eff, want = made.effective_weight(), by_hand(made)
    close(W_eff, want)
    assert layer(m, *case, torch.bfloat16).effective_weight().dtype == torch.bfloat16
    (W_eff * want).sum().backward()
    # L = <W_eff, G> is linear in W and in each multiplier p, so <p, dL/dp> is L, for G = want
    for p in (getattr(made, name) for name in ("weight", *case[1])):
        close((p * p.grad).sum(), want.square().sum())

STAND_INS[2] = 1, by_hand

def chain(m):
    """A model with layers of every kind."""
    return nn.Sequential(layer(m, "Embedding", VECTOR), layer(m, "Linear", ("row",)), nn.Sequential(
        nn.Linear(5, 3).double(), layer(m, "Linear", ("scalar",))), nn.Linear(5, 3).double(),
        layer(m, "Linear", ()))

@check(2, *LAYERS)
def a_layer_becomes_plain(m, case):
    made = layer(m, *case)
    merged = m.merge(made)
    assert type(merged) is getattr(nn, case[0]) and set(merged.state_dict()) <= {"weight", "bias"}
    close(merged.weight, by_hand(made))

@check(2)
def the_copy_has_the_same_function_and_no_memory_of_the_original(m):
    model, tokens = chain(m), torch.tensor([0, 3, 4])
    look = lambda: [[*map(type, model.modules())], [x.tolist() for x in model.parameters()]]
    before, merged = look(), m.merge(model)
    assert {*map(type, merged.modules())} == {nn.Sequential, nn.Embedding, nn.Linear}
    close(merged(tokens), model(tokens))
    assert look() == before
    addresses = [{p.data_ptr() for p in x.parameters()} for x in (model, merged)]
    assert addresses[0].isdisjoint(addresses[1])

@check(2, (VECTOR, ()), ((), VECTOR))
def a_tied_weight_with_multipliers_is_an_error(m, names):
    model = nn.ModuleList([layer(m, "Embedding", names[0]), layer(m, "Linear", names[1])])
    model[1].weight = model[0].weight
    with pytest.raises(ValueError):
        m.merge(model)

# the letters of row and column, for the placements "all", "symmetry_free", "mlp" (the paper)
PLACES = {"q": ("rc", "r", ""), "k": ("rc", "", ""), "v": ("rc", "", ""), "out": ("rc", "rc", ""),
          "gate": ("rc", "r", "rc"), "up": ("rc", "", "rc"), "down": ("rc", "rc", "rc"),
          "embedding": ("rc", "rc", ""), "head": ("", "", "")}

@check(3, *product(("none", "scalar", "vector"), enumerate(("all", "symmetry_free", "mlp"))))
def each_matrix_gets_the_multipliers_of_the_paper(m, case):
    kind, (i, placement) = case
    for matrix, letters in PLACES.items():
        got = m.placement_of(matrix, kind, placement)
        want = {"none": "", "scalar": "s" if letters[i] else "", "vector": letters[i]}[kind]
        assert set(got) <= {"scalar", "row", "column"}
        assert {name[0] for name in got if got[name]} == set(want), f"{matrix}: {got}"

@check(4, (0.5, 0.1, 0.9, 1.0), (0.5, 1.0, 0.9, 0.2), (0.01, 1.0, 0.5, 1.0), (0.5, 1.0, 0.0, 0.3))
def the_mean_of_W2_stays_there(m, case):
    lr, decay, beta, U = case
    # iterate the means of W^2 and W u for W' = a W - lr u, u' = beta u + noise
    a, WW, Wu = 1 - lr * decay, 0.0, 0.0
    for _ in range(4000):
        WW, Wu = a * a * WW - 2 * lr * a * Wu + (lr * U) ** 2, beta * (a * Wu - lr * U ** 2)
    close(m.equilibrium_rms(lr, decay, beta=beta, update_rms=U), math.sqrt(WW))

@check(4, 0.0, 0.5, 0.95)
def small_steps_of_AdamW_follow_the_papers_law(m, beta):
    close(m.equilibrium_rms(1e-5, 0.1, beta=beta), math.sqrt(1e-5 / 0.2), 1e-3)

JORDAN, EXACT = (3.4445, -4.775, 2.0315), (2, -1.5, 0.5)      # EXACT: to 1, but slowly

def iterated(G, coefficients, steps):
    """The printed iteration. It changes only the singular values, which are numbers."""
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s, (a, b, c) = s / s.norm(dim=-1, keepdim=True), coefficients
    for _ in range(steps):
        s = a * s + b * s ** 3 + c * s ** 5
    return U * s[..., None, :] @ Vh

@check(5, ((6, 6), JORDAN, 5), ((9, 4), JORDAN, 5), ((4, 9), JORDAN, 5), ((3, 5, 7), JORDAN, 5),
       ((3, 7, 5), JORDAN, 5), ((5, 8), JORDAN, 1), ((8, 5), EXACT, 15))
def steps_change_only_the_singular_values(m, case):
    # measured in bfloat16, for several orders of operations: 0.004 to 0.08
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 0.25)):
        G = 100 * randn(*case[0]).to(dtype)
        got = m.newton_schulz(G, *case[1:], 1e-7)
        assert got.dtype == dtype
        close(got, iterated(G, *case[1:]), tolerance)
        close(G, 100 * randn(*case[0]).to(dtype), 0)          # G itself does not change

@check(5, (4, 6), (6, 4))
def zeros_stay_zeros(m, shape):
    close(m.newton_schulz(torch.zeros(shape), JORDAN, 5, 1e-7), torch.zeros(shape))

def by_svd(G, *_):
    """What newton_schulz computes with the settings below."""
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    return U * (s > 1e-9) @ Vh

STAND_INS[6] = 5, by_svd
MUON = dict(weight_decay=2.0, ns_coefficients=EXACT, ns_steps=30)

def weight(*shape):
    return nn.Parameter(0.3 * randn(*shape, dtype=torch.float32))

def walk(module, shape, **settings):
    """The way of two parameters in ten steps on noise; the second one has another lr."""
    pair = [weight(*shape), weight(6, 6)]
    groups = [dict(params=[p], lr=lr) for p, lr in zip(pair, (0.02, 0.05))]
    optimizer = module.Muon(groups, **MUON, **settings)
    for step in range(10):
        for p in pair:
            p.grad = p.detach() + randn(*p.shape, seed=step, dtype=torch.float32)
        optimizer.step()
    return torch.cat([(p - weight(*p.shape)).flatten() for p in pair])

@check(6, *product(((16, 4), (4, 16)), ("match_rms_adamw", "original"), (True, False)))
def ten_steps_are_those_of_torch(m, case):
    settings = dict(adjust_lr_fn=case[1], nesterov=case[2])
    close(walk(m, case[0], **settings), walk(torch.optim, case[0], **settings), 0.03)

@check(6)
def only_decay_and_buffer_without_a_gradient(m):
    p, idle = weight(4, 16), weight(5, 5)
    optimizer, p.grad = m.Muon([p, idle], lr=0.02, **MUON), torch.zeros(4, 16)
    optimizer.step()
    close(p, weight(4, 16) * (1 - 0.02 * 2.0))
    close(idle, weight(5, 5), 0)                              # p.grad is None
    p.grad = weight(4, 16).detach()
    optimizer.step()
    close(p.grad, weight(4, 16), 0)                           # the gradient does not change
    close(optimizer.state[p]["momentum_buffer"], 0.05 * weight(4, 16))

@check(6)
def a_closure_computes_gradients(m):
    p = weight(4, 6)
    def closure():
        p.grad, = torch.autograd.grad(p.square().sum(), p)
        return p.square().sum()
    close(m.Muon([p], **MUON).step(closure), weight(4, 6).square().sum())
    assert p.square().sum() < weight(4, 6).square().sum()

# kind: (part of the name, end of the name, optimizer, lr, weight decay)
KINDS = {"attn": (".attn.", "weight", "muon", 0.01, 0.1),
         "mlp": (".mlp.", "weight", "muon", 0.01, 0.1),
         "head": ("head", "weight", "adamw", 0.01, 0.1),
         "embedding": ("embedding", "weight", "adamw", 0.02, 0.0),
         "gain": ("norm", "gain", "adamw", 0.01, 0.0),
         "multiplier": ("", (*VECTOR, "scalar"), "adamw", 0.03, 0.003)}
SCALED = dict(lr=0.04, initial_lr=0.04, weight_decay=0.025)   # by S = 4

@check(7, *product((VECTOR, ("scalar",)), (
    ({}, (), {}), ({"optimizer": "adamw"}, KINDS, {"optimizer": "adamw"}),
    ({"clip_multipliers": True}, KINDS, {"clip": True}),
    ({"norm_scale": 4.0}, ("attn", "mlp"), SCALED), ({"head_norm_scale": 4.0}, ("head",), SCALED))))
def each_kind_has_its_settings(m, case):
    """(multipliers, (changes of the config, the kinds that change, their new settings))"""
    names, (changes, changed, new) = case
    config = m.Config(**dict(vocab_size=7, n_layer=2, n_head=1, n_embd=4, optimizer="muon", lr=0.01,
                             weight_decay=0.1, embedding_lr=0.02, multiplier_lr=0.03,
                             multiplier_weight_decay=0.003) | changes)
    place = lambda matrix, *_: dict.fromkeys(() if matrix == "head" else names, True)
    with mock.patch("model.placement_of", place):
        model = m.GPT(config)
    groups = [(id(p), g) for g in m.parameter_groups(model, config) for p in g["params"]]
    assert sorted(p for p, _ in groups) == sorted(id(p) for p in model.parameters())
    for kind, (part, end, optimizer, lr, decay) in KINDS.items():
        want = dict(kind=kind, optimizer=optimizer, lr=lr, initial_lr=lr, weight_decay=decay,
                    clip=kind != "multiplier") | (new if kind in changed else {})
        for name, p in model.named_parameters():
            if part in name and name.endswith(end):
                assert {key: dict(groups)[id(p)][key] for key in want} == pytest.approx(want), name

@check(8, (1.0, False, 1 / 5, 1), (0.25, False, 0.05, 1), (6.0, False, 1, 1), (0.0, False, 1, 1),
       (1.0, True, 1 / 13, 1 / 13), (0.0, True, 1, 1))
def gradients_of_the_norms_5_and_13(m, case):
    """(max_norm, does the multiplier count?, the factors on both gradients)"""
    max_norm, counts, on_W, on_row = case
    W, idle, row = weight(1, 2), weight(3), weight(2)
    W.grad, row.grad = torch.tensor([[3., 4.]]), torch.tensor([0., 12.])
    groups = [dict(params=[row], clip=counts), dict(params=[idle, W], clip=True)]
    close([float(norm) for norm in m.clip_gradients(groups, max_norm)], [13 if counts else 5, 13])
    close(W.grad, [[3 * on_W, 4 * on_W]])
    close(row.grad, [0, 12 * on_row])

@check(9, *product((torch.float32, torch.bfloat16), (
    (90, 0, [-4., 6., 3., 8.]), (180, 90, [-3., -8., -4., 6.]), (0, 270, [3., 8., 4., -6.]))))
def pairs_that_are_D_half_apart_turn(m, case):
    dtype, (first, second, turned) = case
    angle = torch.tensor([[0, 0] * 2, [first, second] * 2]).deg2rad()        # (T, D)
    x = torch.tensor([[3., 6., 4., 8.]] * 2, dtype=dtype).expand(2, 3, 2, 4)
    got = m.rotate(x, angle.cos(), angle.sin())
    assert got.dtype == dtype
    close(got, torch.tensor([[3., 6., 4., 8.], turned]).expand(2, 3, 2, 4))

# rotate by 180 degrees or not at all: cos is -1 or 1, sin is 0
STAND_INS[10] = 9, lambda x, cos, sin: x * cos

def attend(m, x, turned=None, **matrices):
    """Attention with 2 heads of width 4; q, k, v, out are the identity if not given."""
    cos = (1 - 2 * torch.tensor(turned or [0] * x.shape[1])).double()[:, None].expand(-1, 4)
    plain = lambda name, n_in, n_out, config: nn.Linear(n_in, n_out, bias=False)
    with mock.patch.object(m, "matrix", plain):
        attention = m.Attention(m.GPTConfig(n_embd=8, n_head=2)).double()
    for name in ("q", "k", "v", "out"):
        getattr(attention, name).weight.data = matrices.get(name, torch.eye(8)).double()
    return attention(x.double(), cos, torch.zeros_like(cos)).detach()

@check(10, 1, 5)
def equal_scores_give_the_running_mean(m, T):
    x, v, out = randn(2, T, 8), randn(8, 8, seed=1), randn(8, 8, seed=2)
    means = x.cumsum(1) / torch.arange(1, T + 1)[:, None]
    close(attend(m, x, q=torch.zeros(8, 8), v=v, out=out), means @ v.T @ out.T)

@check(10, 0, 2, 4)
def a_change_reaches_no_earlier_token(m, t):
    x, other = randn(1, 5, 8), randn(1, 5, 8)
    other[0, t] += 1
    moved = (attend(m, x) - attend(m, other)).abs().amax(-1)[0] > 1e-9
    assert moved.tolist() == [i >= t for i in range(5)]

@check(10, ([2., 0.], [0, 0], [1., 0.], 0.5), ([2., 0.], [0, 1], [1., 0.], -1.5),
       ([0., 2.], [0, 0], [0., 1.], 1.0))
def scores_are_q_times_k_by_the_root_of_D(m, case):
    """(token 0, is each token rotated?, where q maps token 1 = (1, 0), difference of its scores)"""
    start, turned, q_column, difference = case
    x, q = torch.zeros(1, 2, 8), torch.zeros(8, 8)
    x[0, 0, :2], x[0, 1, 0], q[:2, 0] = torch.tensor(start), 1, torch.tensor(q_column)
    first = torch.tensor(difference).sigmoid()                # the weight of token 0
    close(attend(m, x, turned, q=q)[0, 1], first * x[0, 0] + (1 - first) * x[0, 1])

@check(10)
def heads_and_sequences_are_separate(m):
    x = randn(3, 5, 8)
    close(attend(m, x * torch.tensor([1.] * 4 + [9.] * 4))[..., :4], attend(m, x)[..., :4])
    close(attend(m, x)[1:], attend(m, x[1:]))

@check(11, *product((torch.float32, torch.bfloat16), ((4, 4), (3, 7), (7, 3), (1, 5))))
def gradients_are_those_of_autograd(m, case):
    """(dtype of G, shape). The last gradients are those of `scale`, which calls scale_backward."""
    dtype, (rows, columns) = case
    G, W = (randn(columns, rows, seed=i, dtype=torch.float32).T for i in (0, 1))
    inputs = [x.requires_grad_() for x in (W, *(randn(n, dtype=W.dtype) for n in (rows, columns)))]
    wanted = torch.autograd.grad(m.formula(*inputs, W.dtype), inputs, G)
    found = m.scale_backward(G.to(dtype), *(x.detach() for x in inputs))
    through_scale = torch.autograd.grad(m.scale(*inputs, W.dtype), inputs, G)
    for got, want, exact in zip(found, through_scale, wanted, strict=True):
        assert got.dtype == W.dtype
        close(got, exact, 1e-5 if dtype == W.dtype else 0.03)
        close(want, exact)

@check(12, ([0, 1], 0.5, 6.353), ([1, 2, 3], 2, 2.484), ([40, 10, 30, 50, 20], 30, 19.63),
       ([-1, -1, -1, -1, 1, 1, 1, 1], 0, 0.8937), (list(range(10)), 4.5, 2.166))
def mean_and_half_width(m, case):
    close([float(x) for x in m.interval(case[0])], case[1:], 0.002)

test_exercise = pytest.mark.parametrize("number, function, case", [pytest.param(
    *c, id=c[1].__name__, marks=getattr(pytest.mark, f"exercise{c[0]}")) for c in CHECKS])(run)
