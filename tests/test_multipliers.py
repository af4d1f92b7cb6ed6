"""What multipliers.py promises, one property per test: the law, the layers, merging, placement.

The law is tested twice: against optimizers fed with pure noise, since a formula can be derived from
the wrong model, and against a linear system solved exactly, since noise hides errors of a percent.

A tolerance stands beside the error it was set from, measured with torch 2.13 on a CPU. A property
that a small slip could break is a `check_...` function; its mutant, multipliers.py with that slip
made, has to fail the very same function.

    python -m pytest -m multipliers
"""
import copy
import itertools
import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import nn

import multipliers
from model import CHOICES, GPT, GPTConfig, RMSNorm
from multipliers import (MULTIPLIERS, MultiplierEmbedding, MultiplierLinear, equilibrium_rms,
                         is_multiplier, merge, placement_of, relaxation_steps, rotation_per_step,
                         small_step_rms, width_factors)
from muon import Muon

pytestmark = pytest.mark.multipliers

# ---------------------------------------------------------------- the law, against simulation

LR, WEIGHT_DECAY = 0.01, 0.4               # eta lambda = 0.004: RMS(W)^2 relaxes in 125 steps


class DecoupledSGD(torch.optim.SGD):
    """torch's SGD puts its weight decay into the momentum buffer; here it acts on W, as in (*)."""

    def __init__(self, params, lr, weight_decay, momentum):
        super().__init__(params, lr, momentum)
        self.keep = 1 - lr * weight_decay

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.mul_(self.keep)
        super().step()


# name: (how to build it, what to tell equilibrium_rms, tolerance for RMS(W))
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, dict(beta=0.0, update_rms=1.0), 0.02),
    "momentum": (lambda p, **s: DecoupledSGD(p, momentum=0.9, **s),
                 dict(beta=0.9, update_rms=1 / math.sqrt(1 - 0.9 ** 2)), 0.02),
    "adamw": (lambda p, **s: torch.optim.AdamW(p, betas=(0.9, 0.95), **s), dict(beta=0.9), 0.03),
}
EACH_OPTIMIZER = pytest.mark.parametrize("name", OPTIMIZERS)


def noise_walk(build, lr, weight_decay, steps, start=0.0, shape=(96, 96), seed=0):
    """Yield (W before, W after) for each step on gradients that are N(0, 1) noise and no signal."""
    W = nn.Parameter(torch.full(shape, start))
    optimizer = build([W], lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        W.grad = torch.randn(shape, generator=generator)
        before = W.detach().clone()
        optimizer.step()
        yield before, W.detach()


def measure(build, lr=LR, weight_decay=WEIGHT_DECAY, **settings):
    """RMS(W), RMS(u) and the angle turned per step, from the second half of 12/(lr wd) steps."""
    steps = int(12 / (lr * weight_decay))
    seen = []
    for before, after in itertools.islice(
            noise_walk(build, lr, weight_decay, steps, **settings), steps // 2, None):
        u = ((1 - lr * weight_decay) * before - after) / lr
        cosine = nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
        seen.append((after.square().mean().item(), u.square().mean().item(), cosine.item()))
    W2, u2, cosine = np.mean(seen, axis=0)
    return math.sqrt(W2), math.sqrt(u2), math.acos(cosine)


@lru_cache                                 # one simulation serves the law, its mutants, rotation
def measured(name):
    return measure(OPTIMIZERS[name][0])


def check_law(name, law=equilibrium_rms):
    _, settings, tolerance = OPTIMIZERS[name]
    # measured / law - 1: sgd -0.001, momentum -0.001, adamw -0.011 (beta2 = 0.95 makes Adam's
    # denominator noisy, so that its updates are 1.5% smaller than sqrt((1 - beta) / (1 + beta)))
    assert measured(name)[0] == pytest.approx(law(LR, WEIGHT_DECAY, **settings), rel=tolerance)


@EACH_OPTIMIZER
def test_noise_and_decay_settle_at_the_law(name):
    """Fed with pure noise, the optimizer drives RMS(W) from 0 to equilibrium_rms."""
    check_law(name)


def without_momentum(lr, weight_decay, *, beta=0.9, update_rms=None):
    return equilibrium_rms(lr, weight_decay, beta=0.0,
                           update_rms=update_rms or math.sqrt((1 - beta) / (1 + beta)))


def without_the_two(lr, weight_decay, **settings):
    return math.sqrt(lr / weight_decay)


@pytest.mark.parametrize("name, mutant", [
    ("momentum", without_momentum), ("adamw", without_momentum),      # measured / mutant: 4.3
    ("sgd", without_the_two), ("adamw", without_the_two)])            # 0.7
def test_mutants_of_the_law_are_caught(name, mutant):
    """Taking updates for uncorrelated fails, and so does sqrt(eta / lambda) without its 2."""
    with pytest.raises(AssertionError):
        check_law(name, mutant)


@EACH_OPTIMIZER
def test_rotation_against_simulation(name):
    """At equilibrium W turns by rotation_per_step in each step."""
    beta = OPTIMIZERS[name][1]["beta"]
    # measured / formula - 1: sgd 0.002, momentum 0.002, adamw -0.003
    assert measured(name)[2] == pytest.approx(rotation_per_step(LR, WEIGHT_DECAY, beta=beta),
                                              rel=0.01)


@EACH_OPTIMIZER
def test_relaxation_time_from_ten_times_equilibrium(name):
    """From 10 times equilibrium, the excess of RMS(W)^2 decays as exp(-t / relaxation_steps)."""
    build, settings, _ = OPTIMIZERS[name]
    rest = equilibrium_rms(LR, WEIGHT_DECAY, **settings)
    walk = noise_walk(build, LR, WEIGHT_DECAY, steps=250, start=10 * rest)
    excess = [after.square().mean().item() - rest ** 2 for _, after in walk]
    slope = np.polyfit(np.arange(250), np.log(excess), 1)[0]
    # measured / predicted - 1: -0.001; the formula itself is rounded by eta lambda / 2 = 0.002
    assert -1 / slope == pytest.approx(relaxation_steps(LR, WEIGHT_DECAY), rel=0.01)


def test_muon_norm_is_proportional_to_sqrt_lr_over_weight_decay():
    """At fixed lr wd, where all Muon runs are alike, RMS(W) / sqrt(lr / wd) is one number."""
    ratios = [measure(Muon, lr, 0.004 / lr, shape=(32, 64), seed=seed)[0]
              / small_step_rms(lr, 0.004 / lr) for seed, lr in enumerate((0.04, 0.01, 0.0025))]
    assert max(ratios) / min(ratios) < 1.02                            # measured: 1.001


@pytest.mark.parametrize("shape", [(32, 32), (32, 128)])
def test_muon_norm_is_the_law_within_a_quarter(shape):
    """With its measured update RMS, Muon's RMS(W) is within 25% of equilibrium_rms, not exactly:
    orthogonalization makes successive updates less alike than beta^k."""
    rms, update_rms, _ = measure(Muon, shape=shape)
    law = equilibrium_rms(LR, WEIGHT_DECAY, beta=0.95, update_rms=update_rms)
    assert rms == pytest.approx(law, rel=0.25)                         # measured ratio: 0.78, 0.88


# ---------------------------------------------------------------- the law, exactly


def solve_noise_driven(lr, weight_decay, beta, update_rms):
    """RMS(W) and the angle between W and the next W, from the covariance P of z = (W, u), where
    u' = beta u + noise and W' = a W - lr u': z' = A z + b noise, hence P = A P A^T + b b^T."""
    a = 1 - lr * weight_decay
    A = np.array([[a, -lr * beta], [0, beta]])
    b = np.array([-lr, 1]) * update_rms * math.sqrt(1 - beta ** 2)     # so that RMS(u) = U
    P = np.linalg.solve(np.eye(4) - np.kron(A, A), np.outer(b, b).ravel()).reshape(2, 2)
    return math.sqrt(P[0, 0]), math.acos((A @ P)[0, 0] / P[0, 0])      # A P = E[z' z^T]


EXACT = pytest.mark.parametrize("lr, weight_decay, beta", list(itertools.product(
    (0.5, 0.01), (0.1, 0.4, 1.0), (0.0, 0.5, 0.9, 0.95))))


@EXACT
def test_law_is_the_exact_solution(lr, weight_decay, beta):
    """equilibrium_rms solves the linear system exactly, for large eta lambda too."""
    for update_rms in (1.0, 0.2):
        want, _ = solve_noise_driven(lr, weight_decay, beta, update_rms)
        got = equilibrium_rms(lr, weight_decay, beta=beta, update_rms=update_rms)
        assert got == pytest.approx(want, rel=1e-12)                   # measured: 2e-16


@EXACT
def test_rotation_is_the_exact_sine(lr, weight_decay, beta):
    """rotation_per_step is exactly the sine of the angle between W and the next W."""
    _, angle = solve_noise_driven(lr, weight_decay, beta, 1.0)
    got = rotation_per_step(lr, weight_decay, beta=beta)
    assert got == pytest.approx(math.sin(angle), rel=1e-10)            # measured: 2e-12


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.95])
def test_small_step_limit(beta):
    """equilibrium_rms / small_step_rms is 1 + (1/4 - beta / (1 - beta^2)) eta lambda + ..., so that
    the limit is sqrt(eta / 2 lambda) whatever beta: momentum only makes it come later."""
    lr, weight_decay = 1e-5, 0.1
    ratio = equilibrium_rms(lr, weight_decay, beta=beta) / small_step_rms(lr, weight_decay)
    first_order = 1 / 4 - beta / (1 - beta ** 2)
    assert (ratio - 1) / (lr * weight_decay) == pytest.approx(first_order, rel=1e-3)  # 8e-5


# ---------------------------------------------------------------- width


@pytest.mark.parametrize("recipe, size_exponent, update_exponent", [
    ("lr", 0.5, -0.5), ("lr_wd", 0.0, 0.0), ("multiplier", 0.0, 0.0)])  # Table 1, last two columns
@pytest.mark.parametrize("kind", ["hidden", "head"])
def test_width_recipes_give_the_exponents_of_table_1(recipe, kind, size_exponent, update_exponent):
    """|y| ~ s d sqrt(eta / lambda) and |dy| / |y| ~ sqrt(eta lambda) have Table 1's powers of d."""
    m = 8
    lr, weight_decay, s = width_factors(recipe, kind, width=m * 64, base_width=64)
    assert s * m * math.sqrt(lr / weight_decay) == pytest.approx(m ** size_exponent)
    assert math.sqrt(lr * weight_decay) == pytest.approx(m ** update_exponent)


@pytest.mark.parametrize("recipe", ["lr", "lr_wd", "multiplier"])
def test_width_recipes_leave_alone_what_does_not_grow(recipe):
    """At the base width, and for the embedding at every width, all three factors are 1."""
    assert width_factors(recipe, "embedding", 512, 64) == (1, 1, 1)
    assert width_factors(recipe, "hidden", 64, 64) == width_factors(recipe, "head", 64, 64)
    assert width_factors(recipe, "hidden", 64, 64) == (1, 1, 1)


@pytest.mark.parametrize("recipe, kind, word", [("mup", "hidden", "mup"), ("lr", "bias", "bias")])
def test_unknown_recipe_or_kind_is_named(recipe, kind, word):
    """An unknown recipe or kind of matrix is a ValueError that names it."""
    with pytest.raises(ValueError, match=word):
        width_factors(recipe, kind, 512, 64)


# ---------------------------------------------------------------- the layers

KINDS = [{}, {"scalar": True}, {"row": True}, {"column": True}, {"row": True, "column": True}]
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "+".join(kind) or "none")
EACH_LAYER = pytest.mark.parametrize("layer", [MultiplierLinear, MultiplierEmbedding])


def randomise(module, seed=1):
    """Multipliers and gains of about 1/3 to 3, all different: those at 1 would not be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if not name.endswith("weight"):
                p.copy_((0.5 * torch.randn(p.shape, generator=generator)).exp())
    return module


def make(layer, n_in, n_out, kind, scale=0.3):
    """A float64 layer with an effective weight [n_out, n_in] and random multipliers."""
    torch.manual_seed(0)
    shape = (n_in, n_out) if layer is MultiplierLinear else (n_out, n_in)   # (tokens, dim)
    return randomise(layer(*shape, scale=scale, **kind).double())


def feed(layer):
    """Inputs for a layer: 3 vectors, or 5 token ids of which one comes twice."""
    n_out, n_in = layer.weight.shape
    if isinstance(layer, MultiplierEmbedding):
        return torch.tensor([0, 3, 1, 3, 2])
    return torch.randn(3, n_in, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def explicit_weight(layer):
    """The paper's matrices written out: s W, or s diag(r) W diag(c)."""
    n_out, n_in = layer.weight.shape
    s = layer.scale if layer.scalar is None else layer.scalar
    r = torch.ones(n_out) if layer.row is None else layer.row
    c = torch.ones(n_in) if layer.column is None else layer.column
    return s * (torch.diag(r.double()) @ layer.weight @ torch.diag(c.double()))


def check_formula(layer, n_in, n_out, kind):
    module = make(layer, n_in, n_out, kind)
    W_eff, x = explicit_weight(module), feed(module)
    want = W_eff[x] if layer is MultiplierEmbedding else x @ W_eff.T
    torch.testing.assert_close(module(x), want, rtol=1e-14, atol=1e-14)          # measured: 6e-17
    torch.testing.assert_close(module.effective_weight(), W_eff, rtol=1e-14, atol=0)     # 0


@EACH_KIND
@EACH_LAYER
@pytest.mark.parametrize("n_in, n_out", [(5, 5), (4, 7), (7, 4)])
def test_layer_is_its_formula(layer, n_in, n_out, kind):
    """A layer computes s W x or s diag(r) W diag(c) x, and effective_weight is that matrix."""
    check_formula(layer, n_in, n_out, kind)


def transposed_weight(layer):
    """Mutant: r scales the columns and c the rows."""
    W = layer.weight * layer.scale
    W = W if layer.row is None else W * layer.row
    return W if layer.column is None else layer.column[:, None] * W


@pytest.mark.parametrize("kind", KINDS[2:], ids="+".join)
def test_mutant_row_and_column_swapped_is_caught(kind, monkeypatch):
    """r along the columns and c along the rows fails, though every shape fits a square matrix."""
    monkeypatch.setattr(MultiplierLinear, "effective_weight", transposed_weight)
    with pytest.raises(AssertionError):
        check_formula(MultiplierLinear, 5, 5, kind)


@EACH_KIND
@EACH_LAYER
def test_gradients_are_equation_4(layer, kind):
    """Autograd's gradients are the sums of eq. 4 over G, the gradient of the merged weight."""
    module = make(layer, 4, 7, kind)
    merged, x = module.merge(), feed(module)
    for f in (module, merged):             # some loss: a different weight for each output
        y = f(x).tanh()
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
    G, W, s = merged.weight.grad, module.weight, module.factor()
    r = torch.ones(7).double() if module.row is None else module.row
    c = torch.ones(4).double() if module.column is None else module.column
    want = {"weight": torch.einsum("i,j,ij->ij", r, c, G) * s,
            "row": torch.einsum("ij,j,ij->i", W, c, G) * s,            # s = 1 in the paper's sums
            "column": torch.einsum("i,ij,ij->j", r, W, G) * s,
            "scalar": torch.einsum("ij,ij->", W, G)}
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, want[name], rtol=1e-13, atol=1e-13)   # measured: 1e-15


@pytest.mark.parametrize("name, entries", [
    ("weight", 1), ("row", 128), ("column", 32), ("scalar", 32 * 128)])
def test_a_multiplier_averages_the_noise_of_its_entries(name, entries):
    """If G = signal * W + noise, the gradient's signal-to-noise ratio is that of one entry, 0.05,
    times sqrt(d_in) for a row multiplier (0.57), sqrt(d_out) for a column multiplier (0.28) and
    sqrt(d_in d_out) for a scalar (3.2), at d_out = 32 and d_in = 128."""
    draws, generator = 1000, torch.Generator().manual_seed(0)
    layer = MultiplierLinear(128, 32, **({} if name == "weight" else {name: True}))
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.weight /= layer.weight.square().mean().sqrt()            # RMS 1
    parameter, W, gradients = getattr(layer, name), layer.weight.detach(), []
    for _ in range(draws):
        G = 0.05 * W + torch.randn(W.shape, generator=generator)
        gradients += torch.autograd.grad((layer.effective_weight() * G).sum(), parameter)
    variance, mean = torch.var_mean(torch.stack(gradients), dim=0)
    # a mean of n draws is off by variance / n: taken from the square, or noise counts as signal
    snr = (mean.square() / variance - 1 / draws).mean().sqrt().item()
    # measured / predicted - 1: entry -0.005, row 0.006, column -0.002, scalar 0.032; from 1000
    # draws the estimate has a relative standard deviation of 0.011, 0.011, 0.010 and 0.024
    assert snr == pytest.approx(0.05 * math.sqrt(entries), rel=0.06)


@EACH_LAYER
def test_scale_is_fixed_unless_the_scalar_is_learned(layer):
    """`scale` is where a learned scalar starts, and elsewhere a constant that is no parameter."""
    learned = layer(4, 7, scale=0.25, scalar=True)
    assert learned.scalar.item() == 0.25 and learned.factor() is learned.scalar
    fixed = layer(4, 7, scale=0.25, row=True, column=True)
    assert {name for name, _ in fixed.named_parameters()} == {"weight", "row", "column"}
    assert torch.equal(fixed.effective_weight(), 0.25 * fixed.weight)


@EACH_LAYER
@pytest.mark.parametrize("vector", [{"row": True}, {"column": True}, KINDS[-1]], ids="+".join)
def test_scalar_and_vector_together_are_an_error(layer, vector):
    """Equations 2 and 3 are alternatives: asking for both is a ValueError."""
    with pytest.raises(ValueError, match="alternatives"):
        layer(4, 7, scalar=True, **vector)


@EACH_KIND
@EACH_LAYER
def test_multipliers_start_at_one_and_are_no_matrices(layer, kind):
    """A multiplier is a scalar [], a row [n] or a column [m] of ones: too thin for Muon to take."""
    module = layer(4, 7, **kind)
    rows, columns = module.weight.shape
    shapes = {"scalar": (), "row": (rows,), "column": (columns,)}
    for name in MULTIPLIERS:
        p = getattr(module, name)
        assert (p is not None) == (name in kind)
        if p is not None:
            assert torch.equal(p, torch.ones(shapes[name]))
            with pytest.raises(ValueError, match="both sides > 1"):
                Muon([p])


# ---------------------------------------------------------------- merging


def check_merged_layer(layer, kind):
    module = make(layer, 4, 7, kind)
    x = feed(module)
    want = module(x)                       # before merge(), which must not change the layer either
    plain = module.merge()
    assert type(plain) is {MultiplierLinear: nn.Linear, MultiplierEmbedding: nn.Embedding}[layer]
    torch.testing.assert_close(plain(x), want, rtol=1e-14, atol=1e-14)           # measured: 6e-17
    torch.testing.assert_close(module(x), want, rtol=0, atol=0)


@EACH_KIND
@EACH_LAYER
def test_merged_layer_is_the_layer(layer, kind):
    """layer.merge() is a plain nn.Linear or nn.Embedding that computes the same, up to rounding."""
    check_merged_layer(layer, kind)


CONFIGS = [dict(multipliers=m, placement=p, final_gain=f) for m, p, f in itertools.product(
    CHOICES["multipliers"], CHOICES["placement"], CHOICES["final_gain"])]
EACH_CONFIG = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(
    config.values()))


def tiny(**settings):
    return GPT(GPTConfig(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=8, **settings))


TOKENS = torch.arange(16).view(2, 8)


def check_merged_model(config):
    model = randomise(tiny(**config))
    logits = model(TOKENS)[0]
    error = (merge(model)(TOKENS)[0] - logits).abs().max() / logits.square().mean().sqrt()
    # measured, float32: 0, since W_eff is computed by the same products; allowed: a few roundings
    assert error < 1e-6


@EACH_CONFIG
def test_merged_model_is_the_model(config):
    """merge(model) gives the model's logits up to rounding, whatever was learned and where."""
    check_merged_model(config)


@EACH_CONFIG
def test_merged_model_is_plain(config):
    """merge(model) is made of nn.Linear, nn.Embedding and RMSNorms with the gains they had."""
    model = randomise(tiny(**config))
    merged = merge(model)
    assert not any(is_multiplier(name) for name, _ in merged.named_parameters())
    assert {type(m) for m in merged.modules() if not list(m.children())} == {
        nn.Linear, nn.Embedding, RMSNorm}
    gains = [{name: p for name, p in m.state_dict().items() if name.endswith("gain")}
             for m in (model, merged)]
    assert gains[0].keys() == gains[1].keys() and len(gains[0]) == (
        4 if config["final_gain"] == "frozen" else 5)
    assert all(torch.equal(gains[0][name], gains[1][name]) for name in gains[0])


@pytest.mark.parametrize("kind", CHOICES["multipliers"])
def test_merge_leaves_the_model_alone(kind):
    """merge(model) is a copy: training it changes nothing in the model."""
    model = randomise(tiny(multipliers=kind))
    before, merged = [p.clone() for p in model.parameters()], merge(model)
    with torch.no_grad():
        for p in merged.parameters():
            p.add_(1)
    assert any(isinstance(m, MultiplierLinear) for m in model.modules())
    assert all(map(torch.equal, before, model.parameters()))


def forgetful_merge(name):
    """Mutant: a MultiplierLinear.merge that leaves one multiplier out of the plain weight."""
    def mutant(layer, right=MultiplierLinear.merge):
        layer = copy.deepcopy(layer)
        setattr(layer, name, None)
        return right(layer)
    return mutant


@pytest.mark.parametrize("name", MULTIPLIERS)
def test_mutant_forgotten_multiplier_is_caught(name, monkeypatch):
    """A merge that forgets the scalar, the row or the column fails, in a layer and in a model."""
    monkeypatch.setattr(MultiplierLinear, "merge", forgetful_merge(name))
    with pytest.raises(AssertionError):
        check_merged_layer(MultiplierLinear, {name: True})
    with pytest.raises(AssertionError):
        check_merged_model({"multipliers": "scalar" if name == "scalar" else "vector"})


# ---------------------------------------------------------------- placement

PAPER = {       # matrix: (row?, column?) of the symmetry-aware placement; paper, Appendix C
    "gate": (True, False), "up": (False, False), "down": (True, True),
    "q": (True, False), "k": (False, False), "v": (False, False), "out": (True, True),
    "embedding": (True, True),
    "head": (False, False),
}
EVERYWHERE = {name: (name != "head",) * 2 for name in PAPER}
MLP_ONLY = {name: (name in ("gate", "up", "down"),) * 2 for name in PAPER}
EACH_PLACEMENT = pytest.mark.parametrize("placement, table", [
    ("symmetry_free", PAPER), ("all", EVERYWHERE), ("mlp", MLP_ONLY)])


def check_placement(placement, table):
    """Compare the parameters that a GPT really has with the table, for each kind of multiplier."""
    for kind in CHOICES["multipliers"]:
        model = tiny(multipliers=kind, placement=placement)
        found = [tuple(name.split(".")[-2:]) for name, _ in model.named_parameters()
                 if is_multiplier(name)]
        want = []
        for matrix, (row, column) in table.items():
            blocks = 1 if matrix in ("embedding", "head") else model.config.n_layer
            if kind == "vector":
                want += blocks * ([(matrix, "row")] * row + [(matrix, "column")] * column)
            if kind == "scalar" and (row or column):
                want += blocks * [(matrix, "scalar")]
        assert sorted(found) == sorted(want)


@EACH_PLACEMENT
def test_placement_is_the_papers(placement, table):
    """Every matrix of a GPT has the multipliers that the paper's table gives it; the head none."""
    check_placement(placement, table)


@EACH_PLACEMENT
@pytest.mark.parametrize("matrix", ["head", "down"])
def test_mutants_of_the_placement_are_caught(placement, table, matrix, monkeypatch):
    """A row multiplier on the head, or none on down, fails in every placement."""
    def mutant(name, kind, where):
        right = placement_of(name, kind, where)
        return {**right, "row": kind == "vector" and matrix == "head"} if name == matrix else right
    monkeypatch.setattr("model.placement_of", mutant)
    with pytest.raises(AssertionError):
        check_placement(placement, table)


@pytest.mark.parametrize("name, answer", [
    ("blocks.0.attn.q.row", True), ("embedding.column", True), ("scalar", True),
    ("blocks.0.attn.q.weight", False), ("final_norm.gain", False), ("row.weight", False)])
def test_is_multiplier_goes_by_the_last_word(name, answer):
    """is_multiplier looks at the parameter's own name, not at those of its modules."""
    assert is_multiplier(name) == answer
