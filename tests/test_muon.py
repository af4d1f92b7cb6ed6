"""Tests of muon.py, in the order of that file: one property each, stated in the docstring.

torch.optim.Muon is the reference. A mutant is muon.py with one small slip: `assert_mutant_fails`
runs a check with the right code and expects it to fail with the mutant.

    python -m pytest -m muon
"""
import inspect
import math

import pytest
import torch
from torch.nn import Parameter

import muon
from conftest import assert_mutant_fails
from multipliers import equilibrium_rms
from muon import Muon

pytestmark = pytest.mark.muon

JORDAN = (3.4445, -4.775, 2.0315)
# These coefficients converge to singular values of exactly 1, but slowly.
CLASSIC = (2, -1.5, 0.5)


def randn(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.randn(shape)


def distance(a, b):
    """||a - b|| / ||b||, in the Frobenius norm."""
    return (a - b).norm() / b.norm()


# ---------------------------------------------------------------- Newton–Schulz
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_newton_schulz_changes_only_the_singular_values(shape):
    """U and V stay. Each singular value s becomes s / ||G||_F, and then a s + b s^3 + c s^5 in each
    step. They end in [0.68, 1.14], or with other coefficients near 1."""
    G = randn(*shape).double()
    U, s, Vh = torch.linalg.svd(G, full_matrices=False)
    s = s / G.norm()
    a, b, c = JORDAN
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert 0.68 < s.min() and s.max() < 1.14
    # float64 rounds by 1e-16, in sums of up to 20 numbers. A step makes an error at most 3.5 times
    # larger, five steps 500 times.
    assert distance(muon.newton_schulz(G, JORDAN, 5, 1e-7), U * s @ Vh) < 1e-12
    assert distance(muon.newton_schulz(G, CLASSIC, 8, 1e-7), U @ Vh) < 0.02


def test_eps_bounds_the_division():
    """G is divided by eps if its norm is smaller. So a gradient of zeros gives no NaN."""
    G = torch.ones(4, 6)
    assert torch.equal(muon.newton_schulz(G, JORDAN, 0, 10.0), G / 10)


def test_bf16_on_capable_gpus_only(monkeypatch):
    """Newton–Schulz runs in bf16 on a GPU with bf16 tensor cores and in fp32 on an older one."""
    for capability, dtype in {(8, 0): torch.bfloat16, (7, 5): torch.float32}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert muon.matmul_dtype(torch.device("cuda")) == dtype


# ---------------------------------------------------------------- against torch.optim.Muon
DEFAULTS = dict(lr=1e-3, weight_decay=0.1, momentum=0.95, nesterov=True, ns_coefficients=JORDAN,
                eps=1e-7, ns_steps=5, adjust_lr_fn="match_rms_adamw")
# The settings of two parameter groups. In the first one, none is the default. Its eps is larger
# than the norm of some gradients.
FIRST = dict(lr=0.05, weight_decay=0.5, momentum=0.8, nesterov=False, ns_coefficients=CLASSIC,
             eps=10.0, ns_steps=3, adjust_lr_fn="original")
SECOND = dict(lr=0.02, adjust_lr_fn="match_rms_adamw")
# tall and wide, for either group
SHAPES = [(12, 4), (7, 13), (9, 8), (4, 12)]


def test_signature_is_torchs():
    """Names, order and defaults are torch.optim.Muon's; only adjust_lr_fn's default differs."""
    p = Parameter(torch.ones(2, 2))
    assert Muon([p]).defaults == DEFAULTS
    assert torch.optim.Muon([p]).defaults == DEFAULTS | {"adjust_lr_fn": None}
    names = list(inspect.signature(Muon).parameters)
    assert names == list(inspect.signature(torch.optim.Muon).parameters)


@pytest.fixture(autouse=True)
def torch_without_bfloat16(monkeypatch):
    """torch.optim.Muon rounds by Tensor.bfloat16. Here it computes in float32, as ours does."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def start(Optimizer):
    """An optimizer with two groups of two parameters."""
    params = [Parameter(randn(*shape)) for shape in SHAPES]
    return Optimizer([{"params": params[:2], **FIRST}, {"params": params[2:], **SECOND}])


def train(optimizer, seeds):
    """Noisy descent on ||p||^2 / 2: a gradient depends on where the steps before it led. Returns
    all entries of all parameters."""
    first, second = [group["params"] for group in optimizer.param_groups]
    for seed in seeds:
        for p in first + second:
            p.grad = p.detach() + randn(*p.shape, seed=seed)
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(first + second)


def check_torch():
    found = train(start(Muon), range(1, 11))
    want = train(start(torch.optim.Muon), range(1, 11))
    # float32 rounds by 6e-8. Five steps of Newton–Schulz enlarge that at most 500 times: 3e-5.
    # bfloat16 rounds by 4e-3.
    assert distance(found, want) < 1e-4, "not torch's step"


def test_equals_torch():
    """10 steps end where those of torch.optim.Muon end, but for rounding in float32."""
    check_torch()


@pytest.mark.parametrize("name", FIRST)
def test_settings_come_from_the_group(name, monkeypatch):
    """A step that reads a setting from the defaults, and not from its group, fails."""
    def with_default(self, right=Muon.step):
        for group in self.param_groups:
            group[name] = DEFAULTS[name]
        right(self)
    assert_mutant_fails(check_torch, monkeypatch, Muon, "step", with_default, "torch")


def decaying_by_the_adjusted_lr(self, right=Muon.step):
    for p in self.param_groups[1]["params"]:
        wrong = muon.adjusted_lr(0.02, "match_rms_adamw", p.shape)
        p.data *= 1 - (wrong - 0.02) * 0.1
    right(self)


def from_the_shorter_side(lr, name, shape, right=muon.adjusted_lr):
    return right(lr, name, (min(shape), min(shape)))


@pytest.mark.parametrize("place, name, mutant", [
    (Muon, "step", decaying_by_the_adjusted_lr), (muon, "adjusted_lr", from_the_shorter_side),
    (muon, "matmul_dtype", lambda device: torch.bfloat16)])
def test_mutants_of_the_step_fail(place, name, mutant, monkeypatch):
    """Decay by the adjusted lr, a wrong shape factor, and bfloat16 on a CPU fail."""
    assert_mutant_fails(check_torch, monkeypatch, place, name, mutant, "torch")


def test_state_dict_interchanges_with_torch():
    """The state goes from our optimizer into torch's, and back into ours: the steps are as without
    these changes. The settings of the groups are part of the state."""
    optimizer = start(Muon)
    for Next in (torch.optim.Muon, Muon):
        train(optimizer, [1, 2])
        resumed = Next([{"params": group["params"]} for group in optimizer.param_groups])
        resumed.load_state_dict(optimizer.state_dict())
        optimizer = resumed
    want = train(start(Muon), [1, 2, 1, 2, 1, 2])
    # float32, as above
    assert distance(train(optimizer, [1, 2]), want) < 1e-4


def test_closure_and_missing_gradients():
    """step returns the loss of a closure, which can call backward. A parameter without a gradient
    stays as it is."""
    p = Parameter(torch.ones(2, 3))
    idle = Parameter(torch.ones(2, 3))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss
    assert Muon([p, idle]).step(closure) == 6
    assert idle.eq(1).all()


# ---------------------------------------------------------------- noise and decay
def at_rest(shape):
    """RMS(W) where noise and decay balance, relative to AdamW's (multipliers.py)."""
    torch.manual_seed(0)
    W = Parameter(torch.zeros(shape))
    optimizer = Muon([W], lr=0.01, weight_decay=1.0)
    # These are 8 of the 50 steps 1 / (2 lr weight_decay) in which RMS(W)^2 relaxes.
    for _ in range(400):
        W.grad = torch.randn(shape)
        optimizer.step()
    return W.square().mean().sqrt() / equilibrium_rms(0.01, 1.0)


def test_equilibrium():
    """Under noise RMS(W) is 0.8 to 1 times AdamW's, more for a wide matrix."""
    # The RMS of 64^2 random entries has a standard error of 1 / sqrt(2 * 64^2) = 1.1 %. We allow 3.
    assert 0.8 - 0.033 < at_rest((64, 64)) < at_rest((32, 256)) < 1 + 0.033


# ---------------------------------------------------------------- errors
MATRICES = "both sides > 1.*AdamW"


@pytest.mark.parametrize("shape, settings, words", [
    ((), {}, MATRICES), ((5,), {}, MATRICES), ((5, 1), {}, MATRICES), ((4, 3, 3, 3), {}, MATRICES),
    ((3, 4), {"lr": -1e-3}, "lr >= 0"), ((3, 4), {"lr": float("nan")}, "lr >= 0"),
    ((3, 4), {"weight_decay": -0.1}, "weight_decay >= 0"), ((3, 4), {"momentum": 1.0}, "momentum"),
    ((3, 4), {"momentum": -0.1}, "momentum"), ((3, 4), {"adjust_lr_fn": "adamw"}, "adjust_lr_fn")])
def test_errors(shape, settings, words):
    """What is no matrix, and a setting out of range, are ValueErrors that say what is allowed. The
    optimizer does not keep the group."""
    optimizer = Muon([Parameter(torch.ones(3, 4))])
    group = {"params": [Parameter(torch.ones(shape))], **settings}
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
