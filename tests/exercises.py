"""The tests of the twelve exercises: `pytest -m exercise5` runs those of exercise 5.

Each test checks one property of a function, and its docstring states the property. The table
POINTS of grade.py says what the property is worth. No solution stands here: the tests compare with
numbers, with the printed equations and with PyTorch.

A test uses one file alone, that of its exercise. Where the function needs another exercise, a
stand-in takes its place, so the exercises can be solved in any order.

Every correct order of operations passes. torch.testing.assert_close compares shapes, dtypes and
numbers. It allows errors of 1e-5 in float32 and of 1e-7 in float64. The numbers are near 1, where
rounding errors are 6e-8 and 1e-16. A comment says why if a test allows another error.
"""
import ast
import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

NOTEBOOK = Path(__file__).resolve().parent.parent / "analysis.ipynb"


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same random numbers each time."""
    torch.manual_seed(0)


# ---------------------------------------------------------------- exercise 1: equilibrium_rms
def simulated_rms(lr, weight_decay, beta):
    """RMS(W) after many steps W' = a W - lr u on noise. u' = beta u + noise has the RMS 1."""
    a = 1 - lr * weight_decay
    # The means of W^2 and of W u follow exactly from one step to the next.
    WW = 0.0
    Wu = 0.0
    for _ in range(4000):
        WW = a * a * WW - 2 * a * lr * Wu + lr * lr
        Wu = beta * (a * Wu - lr)
    return math.sqrt(WW)


@pytest.mark.exercise1
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("lr, weight_decay", [(0.5, 0.1), (0.5, 1.0), (0.01, 1.0)])
def test_the_mean_of_W2_stays_there(lr, weight_decay, beta):
    """Decay takes from the mean of W^2 what noise adds, for small and large steps."""
    from multipliers import equilibrium_rms
    rms = equilibrium_rms(lr, weight_decay, beta=beta, update_rms=0.3)
    assert_close(rms, 0.3 * simulated_rms(lr, weight_decay, beta))


@pytest.mark.exercise1
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.95])
def test_adamw_follows_the_law(beta):
    """Without update_rms the updates are AdamW's: small steps give sqrt(lr / (2 weight_decay))."""
    from multipliers import equilibrium_rms
    rms = equilibrium_rms(1e-5, 0.1, beta=beta)
    # The exact result differs by about lr * weight_decay / (1 - beta) = 2e-5 of its size.
    assert_close(rms, math.sqrt(1e-5 / 0.2), rtol=1e-4, atol=0.0)


# ---------------------------------------------------------------- exercise 2: Multipliers.forward
# Every layer in the tests of exercises 2 and 3 has this W and these multipliers.
W = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
VALUES = {"scalar": 2.0, "row": [10.0, 20.0, 40.0], "column": [1.0, 2.0, 3.0]}
W_EFF = {
    "scalar": [[2.0, 4.0, 6.0], [8.0, 10.0, 12.0], [14.0, 16.0, 18.0]],
    "row": [[10.0, 20.0, 30.0], [80.0, 100.0, 120.0], [280.0, 320.0, 360.0]],
    "column": [[1.0, 4.0, 9.0], [4.0, 10.0, 18.0], [7.0, 16.0, 27.0]],
    "row column": [[10.0, 40.0, 90.0], [80.0, 200.0, 360.0], [280.0, 640.0, 1080.0]]}


def layer_with(names, kind=nn.Linear, dtype=torch.float32):
    """A layer with the W above and with the multipliers in `names`. Its `weight` is W_eff."""
    from multipliers import attach_multipliers, multipliers_of
    layer = kind(3, 3)
    layer.weight.data = torch.tensor(W, dtype=dtype)
    attach_multipliers(layer, **dict.fromkeys(names.split(), True))
    for name, multiplier in multipliers_of(layer).items():
        multiplier.data = torch.tensor(VALUES[name])
    return layer


@pytest.mark.exercise2
@pytest.mark.parametrize("names", W_EFF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entries_of_W_eff(names, dtype):
    """Entry i, j of W_eff is W_ij times the multipliers that are there, in the dtype of W."""
    layer = layer_with(names, dtype=dtype)
    assert_close(layer.weight.data, torch.tensor(W_EFF[names], dtype=dtype))


@pytest.mark.exercise2
@pytest.mark.parametrize("names", W_EFF)
def test_gradients_reach_W_and_the_multipliers(names):
    """Backward gives W and each multiplier its gradient."""
    layer = layer_with(names)
    parameters = list(layer.parametrizations.parameters())
    L = layer.weight.sum()
    # L is linear in W and in each multiplier p. So the sum of p_i dL/dp_i is L itself.
    for p, gradient in zip(parameters, torch.autograd.grad(L, parameters)):
        assert_close((p * gradient).sum(), L)


# ---------------------------------------------------------------- exercise 3: merge
@pytest.fixture
def solved_forward(monkeypatch):
    """A stand-in for exercise 2, which knows the table above."""
    def forward(self, W):
        names = " ".join(name for name, _ in self.named_parameters())
        return torch.tensor(W_EFF[names])
    monkeypatch.setattr("multipliers.Multipliers.forward", forward)


def small_model():
    """tokens [B] -> [B, 3]: layers of each kind, one of them inside a module, one in two places."""
    twice = layer_with("row column")
    inner = nn.Sequential(layer_with("scalar"), nn.Linear(3, 3))
    return nn.Sequential(layer_with("row", nn.Embedding), twice, inner, twice)


TOKENS = torch.tensor([0, 1, 2])


@pytest.mark.exercise3
@pytest.mark.parametrize("names", W_EFF)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_a_layer_becomes_plain(solved_forward, kind, names):
    """W_eff replaces W in an ordinary layer, and the multipliers are gone."""
    from multipliers import merge
    layer = merge(nn.Sequential(layer_with(names, kind)))[0]
    assert type(layer) is kind
    assert not list(layer.children()), "the multipliers are still there"
    assert_close(layer.weight, torch.tensor(W_EFF[names]))


@pytest.mark.exercise3
def test_the_copy_has_the_same_function(solved_forward):
    """The merged model computes what the model computes. A layer that stands in two places gets its
    multipliers once."""
    from multipliers import merge
    model = small_model()
    assert_close(merge(model)(TOKENS), model(TOKENS))


@pytest.mark.exercise3
def test_the_original_stays_as_it_was(solved_forward):
    """The original works as before, even when somebody changes the copy."""
    from multipliers import merge
    model = small_model()
    names = list(model.state_dict())
    before = model(TOKENS)
    for p in merge(model).parameters():
        nn.init.zeros_(p)
    assert list(model.state_dict()) == names
    assert_close(model(TOKENS), before)


@pytest.mark.exercise3
def test_frozen_and_eval_layers_stay_so(solved_forward):
    """A frozen weight stays frozen, and a layer in eval mode stays in it. The others do, too."""
    from multipliers import merge, raw_weight
    model = nn.Sequential(layer_with("row"), layer_with("row").eval())
    raw_weight(model[0]).requires_grad_(False)
    merged = merge(model)
    assert [layer.weight.requires_grad for layer in merged] == [False, True]
    assert [layer.training for layer in merged] == [True, False]


# ---------------------------------------------------------------- exercise 4: placement_of
# The letters of row and column, for multipliers="vector"
PLACES = {
    "all": {"embedding": "rc", "q": "rc", "k": "rc", "v": "rc", "out": "rc",
            "gate": "rc", "up": "rc", "down": "rc", "head": ""},
    "hidden": {"embedding": "", "q": "rc", "k": "rc", "v": "rc", "out": "rc",
               "gate": "rc", "up": "rc", "down": "rc", "head": ""},
    "symmetry_free": {"embedding": "rc", "q": "r", "k": "", "v": "", "out": "rc",
                      "gate": "r", "up": "", "down": "rc", "head": ""},
    "mlp": {"embedding": "", "q": "", "k": "", "v": "", "out": "",
            "gate": "rc", "up": "rc", "down": "rc", "head": ""}}


@pytest.mark.exercise4
@pytest.mark.parametrize("placement", PLACES)
def test_each_matrix_gets_the_multipliers_of_the_paper(placement):
    """The table above holds for vectors. One scalar stands for any of them, or beside them."""
    from model import placement_of
    for matrix, letters in PLACES[placement].items():
        scalar = "s" if letters else ""
        wanted = {"none": "", "scalar": scalar, "vector": letters, "both": scalar + letters}
        for kind, want in wanted.items():
            given = placement_of(matrix, kind, placement)
            got = "".join(name[0] for name in ("scalar", "row", "column") if given.get(name))
            assert got == want, f"{matrix}, {kind}: {given}"


@pytest.mark.exercise4
@pytest.mark.parametrize("kind, placement", [("matrix", "all"), ("vector", "nowhere")])
def test_unknown_words_are_errors(kind, placement):
    """Another kind of multipliers, or another placement, is a ValueError."""
    from model import placement_of
    with pytest.raises(ValueError):
        placement_of("q", kind, placement)


# ---------------------------------------------------------------- exercise 5: rotate
def check_turn(degrees, want, dtype=torch.float32):
    """`degrees` are the angles of the two pairs of token 1. Those of token 0 are 0."""
    from model import rotate
    __tracebackhide__ = True
    angles = torch.tensor([[0, 0, 0, 0], [*degrees, *degrees]]).deg2rad()
    # The pairs are (3, 4) and (6, 8). All sequences (2) and heads (3) are equal.
    x = torch.tensor([3.0, 6.0, 4.0, 8.0], dtype=dtype).expand(2, 3, 2, 4)
    want = torch.tensor([[3.0, 6.0, 4.0, 8.0], want], dtype=dtype).expand(2, 3, 2, 4)
    assert_close(rotate(x, angles.cos(), angles.sin()), want)


@pytest.mark.exercise5
@pytest.mark.parametrize("degrees, want", [
    ([90, 90], [-4.0, -8.0, 3.0, 6.0]), ([180, 180], [-3.0, -6.0, -4.0, -8.0]),
    ([90, 180], [-4.0, -6.0, 3.0, -8.0]), ([0, 270], [3.0, 8.0, 4.0, -6.0])],
    ids=["90", "180", "90 and 180", "0 and 270"])
def test_pairs_turn_by_their_angles(degrees, want):
    """The pairs (x_i, x_{i + D/2}) turn counterclockwise. Columns i and i + D/2 of cos and sin
    belong to pair i."""
    check_turn(degrees, want)


@pytest.mark.exercise5
def test_the_dtype_is_that_of_x():
    """x may be bfloat16, though cos and sin are float32."""
    check_turn([90, 90], [-4.0, -8.0, 3.0, 6.0], torch.bfloat16)


# ---------------------------------------------------------------- exercise 6: Attention.forward
@pytest.fixture
def attention(monkeypatch):
    """Two heads of width 4. q and k are the identity, v is twice, and out is three times that. The
    stand-in for exercise 5 knows the angles 0 (cos = 1) and 180 degrees (cos = -1). The stand-in
    for exercise 4 gives no multipliers."""
    from model import Attention, GPTConfig
    monkeypatch.setattr("model.rotate", lambda x, cos, sin: x * cos)
    monkeypatch.setattr("model.placement_of", lambda *_: {})
    attention = Attention(GPTConfig(n_embd=8, n_head=2))
    for layer, size in zip(attention.children(), (1, 1, 2, 3)):
        layer.weight.data = size * torch.eye(8)
    return attention


# The angle 0 for all tokens
COS = torch.ones(5, 4)
SIN = torch.zeros(5, 4)


@pytest.mark.exercise6
def test_equal_scores_give_the_mean(attention):
    """If q is 0, the last token gets the mean of all tokens, through the matrices v and out."""
    nn.init.zeros_(attention.q.weight)
    x = torch.randn(2, 5, 8)
    assert_close(attention(x, COS, SIN)[:, -1], 6 * x.mean(1))


@pytest.mark.exercise6
@pytest.mark.parametrize("t", [1, 4])
def test_no_token_sees_a_later_one(attention, t):
    """Causality: the first t tokens have the same results without the later ones."""
    x = torch.randn(2, 5, 8)
    alone = attention(x[:, :t], COS[:t], SIN[:t])
    assert_close(attention(x, COS, SIN)[:, :t], alone)


@pytest.mark.exercise6
@pytest.mark.parametrize("cos, share", [
    ([[1], [1]], 0.73106), ([[-1], [1]], 0.26894), ([[1], [-1]], 0.26894), ([[-1], [-1]], 0.73106)],
    ids=["no turn", "token 0 turned", "token 1 turned", "both turned"])
def test_scores_are_rotated_q_k_by_the_root_of_D(attention, cos, share):
    """The scores are q k^T / sqrt(D), with D = 4, of rotated q and k. v is not rotated."""
    # In head 0, token 0 is (0, 2) and token 1 is (1, 0). q turns (1, 0) into (0, 1). So token 1
    # sees token 0 with the score 2 / sqrt(4) = 1, and itself with the score 0: softmax gives token
    # 0 the share 0.731. Half a turn of one token (cos = -1) changes the sign of the score.
    x = torch.tensor([[[0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
                       [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    attention.q.weight.data = torch.eye(8).roll(1, dims=0)
    got = attention(x, torch.tensor(cos).expand(2, 4), SIN[:2])
    assert_close(got[0, 1, :2], 6 * torch.tensor([1 - share, 2 * share]), rtol=1e-4, atol=0.0)


# ---------------------------------------------------------------- exercise 7: newton_schulz
JORDAN = (3.4445, -4.775, 2.0315)
# These coefficients bring all singular values to 1, but slowly.
EXACT = (2, -1.5, 0.5)


def iterated(G, coefficients, steps, eps):
    """The printed iteration. It changes only the singular values s, which are numbers."""
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    a, b, c = coefficients
    s = s / s.norm().clamp(min=eps)
    for _ in range(steps):
        s = a * s + b * s ** 3 + c * s ** 5
    return ((U * s) @ Vh).to(G.dtype)


@pytest.mark.exercise7
@pytest.mark.parametrize("shape, coefficients, steps", [
    ((6, 6), JORDAN, 5), ((4, 9), JORDAN, 5), ((9, 4), JORDAN, 5), ((7, 5), EXACT, 15),
    ((5, 8), JORDAN, 1)], ids=["square", "wide", "tall", "15 steps", "1 step"])
def test_steps_change_only_the_singular_values(shape, coefficients, steps):
    """Square, wide or tall: each singular value goes through the polynomial, `steps` times."""
    from muon import newton_schulz
    G = 100 * torch.randn(shape, dtype=torch.float64)
    want = iterated(G, coefficients, steps, 1e-7)
    assert_close(newton_schulz(G, coefficients, steps, 1e-7), want)


@pytest.mark.exercise7
def test_zeros_stay_zeros():
    """eps avoids a division by 0."""
    from muon import newton_schulz
    zeros = torch.zeros(4, 6)
    assert_close(newton_schulz(zeros, JORDAN, 5, 1e-7), zeros)


@pytest.mark.exercise7
def test_the_dtype_is_that_of_G():
    """G may be bfloat16. G itself does not change."""
    from muon import newton_schulz
    G = torch.ones(4, 6).bfloat16()
    assert newton_schulz(G, JORDAN, 5, 1e-7).dtype == torch.bfloat16
    assert G.max().item() == 1, "newton_schulz has changed G"


# ---------------------------------------------------------------- exercise 8: Muon.step
@pytest.fixture
def Muon(monkeypatch):
    """The class, with a stand-in for exercise 7."""
    import muon
    monkeypatch.setattr(muon, "newton_schulz", iterated)
    return muon.Muon


def walk(optimizer_class, first, second, **settings):
    """Where ten steps on noise lead two matrices [16, 4]. `first` and `second` are the settings of
    their groups, and `settings` are the defaults of the optimizer."""
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(16, 4)) for _ in range(2)]
    groups = [dict(first, params=matrices[:1]), dict(second, params=matrices[1:])]
    optimizer = optimizer_class(groups, **settings)
    for _ in range(10):
        for p in matrices:
            p.grad = p.detach() + torch.randn(16, 4)
        optimizer.step()
    return torch.stack(matrices).detach()


def check_walk(Muon, *settings, **defaults):
    """Both optimizers arrive at the same place."""
    __tracebackhide__ = True
    got = walk(Muon, *settings, **defaults)
    want = walk(torch.optim.Muon, *settings, **defaults)
    # torch iterates in bfloat16, whose rounding error is 2^-9. An iteration has ten operations. The
    # map EXACT is flat at 1, so that only the last error counts: 10 * 2^-9 = 0.02 of an update. The
    # largest updates, lr * 2 U V^T, have the RMS 0.05 * 2 * 0.25. Ten of them sum up to 0.25.
    assert_close(got, want, rtol=0, atol=0.005)


@pytest.mark.exercise8
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_ten_steps_are_those_of_torch(Muon, nesterov, adjust_lr_fn):
    """Momentum, step length and decay are those of torch.optim.Muon, and each group has its lr."""
    check_walk(Muon, {"lr": 0.02}, {"lr": 0.05}, weight_decay=2.0, nesterov=nesterov,
               adjust_lr_fn=adjust_lr_fn, ns_coefficients=EXACT, ns_steps=30)


@pytest.mark.exercise8
def test_settings_are_those_of_the_group(Muon):
    """No setting is read from the defaults of the optimizer if the group has another value."""
    check_walk(
        Muon,
        {"lr": 0.02, "weight_decay": 4.0, "momentum": 0.5, "nesterov": False,
         "adjust_lr_fn": "original", "ns_coefficients": EXACT, "ns_steps": 30},
        # One step, from singular values below 1/3, ends far from 1.
        {"lr": 0.05, "weight_decay": 1.0, "momentum": 0.8, "ns_coefficients": EXACT, "ns_steps": 1,
         "eps": 20.0},
        adjust_lr_fn="match_rms_adamw")


def after_step(Muon, *gradients):
    """What one step with lr 0.5 and weight_decay 0.2 makes of identity matrices [4, 4]."""
    matrices = [nn.Parameter(torch.eye(4)) for _ in gradients]
    for p, gradient in zip(matrices, gradients):
        p.grad = gradient
    Muon(matrices, lr=0.5, weight_decay=0.2).step()
    return [p.data for p in matrices]


@pytest.mark.exercise8
def test_decay_uses_the_lr_before_adjustment(Muon):
    """Where the gradient is 0, a step multiplies W by 1 - lr * weight_decay."""
    W, = after_step(Muon, torch.zeros(4, 4))
    assert_close(W, 0.9 * torch.eye(4))


@pytest.mark.exercise8
def test_a_parameter_without_a_gradient_stays(Muon):
    """The first parameter has no gradient: it stays, and the second one makes its step."""
    idle, W = after_step(Muon, None, torch.zeros(4, 4))
    assert_close(idle, torch.eye(4))
    assert_close(W, 0.9 * torch.eye(4))


@pytest.mark.exercise8
def test_a_closure_computes_the_gradients(Muon):
    """step(closure) calls the closure with gradients enabled, and returns its loss."""
    p = nn.Parameter(torch.eye(4))

    def closure():
        p.square().sum().backward()
        return 7.0
    assert Muon([p], lr=0.5).step(closure) == 7.0
    assert p.square().sum() < 4


# ---------------------------------------------------------------- exercise 9: parameter_groups
@pytest.fixture(params=[{"row": True, "column": True}, {"scalar": True}], ids=" ".join)
def placed(request, monkeypatch):
    """All matrices of a new GPT have these multipliers, by stand-ins for exercises 4 and 2."""
    monkeypatch.setattr("model.placement_of", lambda *_: request.param)
    monkeypatch.setattr("multipliers.Multipliers.forward", lambda self, W: W)


def model_and_groups(**changes):
    """A small GPT and its groups. The arguments change the config."""
    import train
    settings = dict(n_layer=1, optimizer="muon", lr=0.01, weight_decay=0.1, embedding_lr=0.02,
                    multiplier_lr=0.03, multiplier_weight_decay=0.003)
    config = train.Config(**(settings | changes))
    model = train.GPT(config)
    return model, train.parameter_groups(model, config)


def check_groups(key, wanted, **changes):
    """group[key] is wanted[kind], for the kind of each of its parameters."""
    import train
    __tracebackhide__ = True
    model, groups = model_and_groups(**changes)
    kinds = {p: train.kind_of(name) for name, p in model.named_parameters()}
    for group in groups:
        for kind in {kinds[p] for p in group["params"]}:
            assert group[key] == pytest.approx(wanted[kind]), f"{key} of {kind}"


@pytest.mark.exercise9
def test_each_parameter_is_in_one_group(placed):
    """No parameter is left out, and none is in two groups."""
    model, groups = model_and_groups()
    found = []
    for group in groups:
        found += group["params"]
    for name, p in model.named_parameters():
        count = sum(p is other for other in found)
        assert count == 1, f"{name} is in {count} groups"


@pytest.mark.exercise9
@pytest.mark.parametrize("own", ["adamw", "muon"])
def test_muon_gets_the_matrices_of_the_blocks(placed, own):
    """AdamW trains the embedding, the head, gains and multipliers. The config decides the rest."""
    check_groups("optimizer", {"attn": own, "mlp": own, "head": "adamw", "embedding": "adamw",
                               "gain": "adamw", "multiplier": "adamw"}, optimizer=own)


@pytest.mark.exercise9
@pytest.mark.parametrize("key, wanted", [
    ("lr", {"attn": 0.01, "mlp": 0.01, "head": 0.01, "embedding": 0.02, "gain": 0.01,
            "multiplier": 0.03}),
    ("initial_lr", {"attn": 0.01, "mlp": 0.01, "head": 0.01, "embedding": 0.02, "gain": 0.01,
                    "multiplier": 0.03}),
    ("weight_decay", {"attn": 0.1, "mlp": 0.1, "head": 0.1, "embedding": 0.0, "gain": 0.0,
                      "multiplier": 0.003})], ids=["lr", "initial_lr", "decay"])
def test_lr_and_weight_decay_of_each_kind(placed, key, wanted):
    """Gains and the embedding have no decay. The embedding and the multipliers have an own lr."""
    check_groups(key, wanted)


@pytest.mark.exercise9
@pytest.mark.parametrize("asked", [False, True])
def test_multipliers_count_in_the_clip_norm_if_asked(placed, asked):
    """`clip` is True, but for the multipliers only with clip_multipliers."""
    check_groups("clip", {"attn": True, "mlp": True, "head": True, "embedding": True, "gain": True,
                          "multiplier": asked}, clip_multipliers=asked)


@pytest.mark.exercise9
@pytest.mark.parametrize("key, wanted", [
    ("S", {"attn": 4.0, "mlp": 4.0, "head": 0.5, "embedding": 1.0, "gain": 1.0,
           "multiplier": 1.0}),
    ("lr", {"attn": 0.04, "mlp": 0.04, "head": 0.005, "embedding": 0.02, "gain": 0.01,
            "multiplier": 0.03}),
    ("weight_decay", {"attn": 0.025, "mlp": 0.025, "head": 0.2, "embedding": 0.0, "gain": 0.0,
                      "multiplier": 0.003})], ids=["S", "lr", "decay"])
def test_S_scales_the_blocks_and_the_head(placed, key, wanted):
    """S times the lr and weight_decay / S, for the blocks' matrices. The head has its own S."""
    check_groups(key, wanted, norm_scale=4.0, head_norm_scale=0.5)


@pytest.mark.exercise9
@pytest.mark.parametrize("key, wanted", [
    ("S", {"attn": 1.0, "mlp": 4.0, "head": 1.0, "embedding": 1.0, "gain": 1.0,
           "multiplier": 1.0}),
    ("lr", {"attn": 0.01, "mlp": 0.04, "head": 0.01, "embedding": 0.02, "gain": 0.01,
            "multiplier": 0.03})], ids=["S", "lr"])
def test_placement_mlp_scales_the_mlps_alone(placed, key, wanted):
    """With placement "mlp" the matrices of the attention keep S = 1."""
    check_groups(key, wanted, norm_scale=4.0, placement="mlp")


# ---------------------------------------------------------------- exercise 10: clip_gradients
def check_clipping(max_norm, counts, of_W, of_row, idle=()):
    """W has the gradient (3, 4), of norm 5, and the multiplier `row` has (0, 12). The joint norm is
    13. Clipping leaves of_W and of_row of them. `counts` is the clip of the multiplier's group."""
    from train import clip_gradients
    __tracebackhide__ = True
    W = nn.Parameter(torch.zeros(2))
    row = nn.Parameter(torch.zeros(2))
    W.grad = torch.tensor([3.0, 4.0])
    row.grad = torch.tensor([0.0, 12.0])
    groups = [{"params": [*idle, W], "clip": True}, {"params": [row], "clip": counts}]
    norms = clip_gradients(groups, max_norm)
    assert W.grad.tolist() == pytest.approx([3 * of_W, 4 * of_W]), "the gradient of W"
    assert row.grad.tolist() == pytest.approx([0, 12 * of_row]), "the gradient of row"
    return norms


@pytest.mark.exercise10
@pytest.mark.parametrize("max_norm, of_W", [(1.0, 0.2), (0.25, 0.05), (6.0, 1.0), (0.0, 1.0)])
def test_gradients_that_count_are_scaled(max_norm, of_W):
    """A norm of 5 becomes max_norm, if that is smaller. max_norm 0 is no limit. The multiplier does
    not count, and stays as it is."""
    check_clipping(max_norm, False, of_W, 1.0)


@pytest.mark.exercise10
def test_a_multiplier_may_count():
    """With clip the multiplier counts in the norm, and is scaled like all the others."""
    check_clipping(1.0, True, 1 / 13, 1 / 13)


@pytest.mark.exercise10
def test_the_norms_are_those_before_clipping():
    """The results are the norm that counts, and the norm of all gradients, before clipping."""
    norm, norm_of_all = check_clipping(1.0, False, 0.2, 1.0)
    assert (float(norm), float(norm_of_all)) == pytest.approx((5, 13))


@pytest.mark.exercise10
def test_a_parameter_without_a_gradient_is_skipped():
    """The first parameter of the group has no gradient. The others are clipped as ever."""
    check_clipping(1.0, False, 0.2, 1.0, idle=[nn.Parameter(torch.zeros(3))])


# ---------------------------------------------------------------- exercise 11: scale_backward
@pytest.mark.exercise11
@pytest.mark.parametrize("place, want", [
    (0, [[2.0, 0.0, 8.0], [0.0, 9.0, 0.0]]), (1, [13.0, 15.0]), (2, [2.0, 15.0, 12.0])],
    ids=["dW", "dr", "dc"])
def test_gradients_are_those_of_equation_4(place, want):
    """dW, dr and dc follow from G by equation 4."""
    from kernel import scale_backward
    G = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    W = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    got = scale_backward(G, W, torch.tensor([2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0]))
    assert_close(got[place], torch.tensor(want))


@pytest.mark.exercise11
def test_sums_are_float32():
    """G may be bfloat16. All products and sums are float32: bfloat16 would make 300 of 300.3."""
    from kernel import scale_backward
    W = torch.full((300, 300), 1.001)
    ones = torch.ones(300)
    # W.bfloat16() is 1.
    _, dr, dc = scale_backward(W.bfloat16(), W, ones, ones)
    # A float32 sum of 300 numbers has an error of at most 300 * 6e-8 = 2e-5.
    assert_close((dr, dc), (300.3 * ones, 300.3 * ones), rtol=1e-4, atol=0.0)


# ---------------------------------------------------------------- exercise 12: interval
@pytest.fixture(scope="module")
def interval():
    """The function of the notebook. The imports, constants and functions of its cell are executed,
    and what `interval` does not need may fail."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    source = next(text for text in sources if "def interval(" in text)
    names = {}
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.Expr):
            with suppress(Exception):
                exec(compile(ast.Module([statement], []), NOTEBOOK.name, "exec"), names)
    return names["interval"]


@pytest.mark.exercise12
@pytest.mark.parametrize("n, half", [
    (2, 63.53), (3, 24.84), (4, 20.54), (5, 19.63), (6, 19.63), (7, 19.98), (8, 20.48), (9, 21.05),
    (10, 21.66)])
def test_mean_and_half_the_width(interval, n, half):
    """The numbers 0, 10, ... 10 (n - 1) have the mean 5 (n - 1), and this half width by Student's t
    for n - 1 degrees of freedom."""
    got = interval(list(range(0, 10 * n, 10)))
    # A table of t has four digits.
    assert got == pytest.approx((5 * n - 5, half), rel=1e-3)
