"""Tests of muon.py, in the order of that file: one property each, stated in the docstring.

A tolerance stands beside the error that was measured with torch 2.13 on a CPU. A mutant is muon.py
with one small slip. `assert_mutant_fails` runs a property's test with the right code, then makes
the slip, and expects the same test to fail.

    python -m pytest -m muon
"""
import inspect
import math
from functools import partial

import pytest
import torch

import muon
from conftest import assert_mutant_fails

pytestmark = pytest.mark.muon

JORDAN = (3.4445, -4.775, 2.0315)
# These coefficients converge to singular values of exactly 1, but slowly.
CLASSIC = (2, -1.5, 0.5)
# square, tall, wide, and two with odd sizes
SHAPES = [(48, 48), (96, 32), (32, 96), (7, 13), (129, 65)]
BOTH_NAMES = pytest.mark.parametrize("name", ["original", "match_rms_adamw"])
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(),
                                                     reason="needs a CUDA GPU"))

def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def orthonormal(rows, columns, seed=0):
    """A matrix [rows, columns], rows >= columns, with orthonormal columns."""
    return torch.linalg.qr(randn(rows, columns, seed=seed))[0]

def distance(a, b):
    """||a - b|| / ||b||, in the Frobenius norm."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()

def orthogonalize(G, coefficients=JORDAN, steps=5):
    return muon.newton_schulz(G, coefficients, steps, 1e-7)

# ---------------------------------------------------------------- Newton–Schulz

def test_singular_values_end_near_one_and_singular_vectors_stay():
    """Singular values above 0.01 ||G||_F end in [0.682, 1.134], and U and V do not change."""
    for rows, columns in [(64, 64), (64, 20), (20, 64)]:
        s = torch.logspace(-1.5, 0, min(rows, columns), dtype=torch.float64)
        U, V = orthonormal(rows, len(s), seed=1), orthonormal(columns, len(s), seed=2)
        O = orthogonalize(U * s @ V.mT)
        after = torch.diag(U.mT @ O @ V)
        assert s.min() / s.norm() > 0.01
        # the least and the largest value of five steps of a s + b s^3 + c s^5 for s in [0.01, 1]
        assert after.min() > 0.6818 and after.max() < 1.1344
        assert distance(U * after @ V.mT, O) < 1e-13

def test_converging_coefficients_give_the_exact_answer():
    """(2, -1.5, 0.5) for 12 steps gives the U V^T of the SVD, the direction of steepest descent."""
    U, _, Vh = torch.linalg.svd(randn(64, 20), full_matrices=False)
    assert distance(orthogonalize(randn(64, 20), CLASSIC, 12), U @ Vh) < 1e-13   # measured: 2e-15

def test_a_tall_matrix_is_orthogonalized_as_its_transpose():
    """Both take the Gram matrix of the short side, so their results are equal bit for bit."""
    G = randn(64, 16)
    assert torch.equal(orthogonalize(G), orthogonalize(G.mT).mT)

def other_coefficients(G, coefficients, steps, eps, right=muon.newton_schulz):
    return right(G, CLASSIC, steps, eps)

@pytest.mark.parametrize("device, capability, dtype", [
    ("cuda", (8, 0), torch.bfloat16), ("cuda", (7, 5), torch.float32),
    ("cpu", (8, 0), torch.float32), ("mps", (8, 0), torch.float32)])
def test_bf16_on_capable_gpus_only(device, capability, dtype, monkeypatch):
    """Newton–Schulz runs in bf16 on a GPU with bf16 tensor cores and in fp32 everywhere else."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert muon.matmul_dtype(torch.device(device)) == dtype


def from_the_shorter_side(lr, name, shape, right=muon.adjusted_lr):
    return right(lr, name, (min(shape),) * 2)

# ---------------------------------------------------------------- against torch.optim.Muon
def start(shape, device="cpu"):
    return (0.3 * randn(*shape, dtype=torch.float32)).to(device).requires_grad_()

def train(optimizer, steps, seed=1):
    """Noisy descent on ||p||^2 / 2: each gradient depends on where the steps before it led."""
    (p,) = optimizer.param_groups[0]["params"]
    for noise in randn(steps, *p.shape, seed=seed, dtype=torch.float32).to(p.device):
        p.grad = p.detach() + noise
        optimizer.step()
    return p.detach()

def distance_to_torch(shape, device="cpu", **settings):
    """Distance of the two end points after 20 steps, divided by the way that torch's Muon went."""
    travelled = []
    for optimizer in (muon.Muon, torch.optim.Muon):
        p = start(shape, device)
        end = train(optimizer([p], lr=0.02, weight_decay=0.5, **settings), 20)
        travelled.append(end - start(shape, device).detach())
    return distance(*travelled)

def test_signature_is_torchs():
    """Names, order and defaults are torch.optim.Muon's; only adjust_lr_fn's default differs."""
    ours, torchs = ({name: p.default for name, p in inspect.signature(optimizer).parameters.items()}
                    for optimizer in (muon.Muon, torch.optim.Muon))
    assert torchs["adjust_lr_fn"] is None
    torchs["adjust_lr_fn"] = "match_rms_adamw"
    assert list(ours.items()) == list(torchs.items())

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@BOTH_NAMES
def test_equals_torch_in_bf16(shape, nesterov, name, monkeypatch):
    """In bf16 every bit is torch.optim.Muon's after 20 steps: same operations, same order."""
    monkeypatch.setattr(muon, "matmul_dtype", lambda device: torch.bfloat16)
    assert distance_to_torch(shape, nesterov=nesterov, adjust_lr_fn=name) == 0

@pytest.mark.parametrize("device", ["cpu", CUDA])
@BOTH_NAMES
def test_follows_torch_in_the_dtype_of_the_device(name, device):
    """Only bf16 rounding, of torch.optim.Muon on a CPU, separates the two end points."""
    for shape in SHAPES:
        # measured on a CPU: 0.0015 to 0.0027
        assert distance_to_torch(shape, device, adjust_lr_fn=name) < 0.01

def without_nesterov(grad, buffer, momentum, nesterov, *rest, right=muon.muon_direction):
    return right(grad, buffer, momentum, False, *rest)

def decays_by_adjusted_lr(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw",
                          right=muon.Muon):
    wrong = muon.adjusted_lr(lr, adjust_lr_fn, params[0].shape)
    return right(params, lr, weight_decay * wrong / lr, adjust_lr_fn=adjust_lr_fn)

@BOTH_NAMES
@pytest.mark.parametrize("function, mutant", [
    ("muon_direction", without_nesterov), ("adjusted_lr", from_the_shorter_side),
    ("newton_schulz", other_coefficients), ("Muon", decays_by_adjusted_lr)])
def test_mutants_of_the_update_fail(function, mutant, name, monkeypatch):
    """No Nesterov, a wrong shape factor, other coefficients, decay by the adjusted lr: all fail."""
    # measured at the first shape that fails: 0.07 to 0.35
    assert_mutant_fails(lambda: test_follows_torch_in_the_dtype_of_the_device(name, "cpu"),
                        monkeypatch, muon, function, mutant)

# ---------------------------------------------------------------- decay and equilibrium

def noise_rms(optimizer, shape):
    """RMS(W) where pure gradient noise holds it: the second half of 4 / (lr wd) = 1000 steps."""
    p = torch.zeros(shape, requires_grad=True)
    optimizer = optimizer([p], lr=0.01, weight_decay=0.4)
    generator, squares = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        p.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        squares.append(p.detach().square().mean().item())
    return math.sqrt(sum(squares[500:]) / 500)

# The numbers are means of five seeds, which differ by at most 1.2 % from their mean.
@pytest.mark.parametrize("shape, to_adamw, to_law", [
    ((16, 128), 0.95, 0.93), ((32, 32), 0.85, 0.83),
    ((64, 64), 0.83, 0.81), ((64, 256), 0.93, 0.91)])
def test_equilibrium(shape, to_adamw, to_law):
    """RMS(W) under noise, relative to AdamW's and to sqrt(eta / 2 lambda), is as muon.py says."""
    rms = noise_rms(muon.Muon, shape)
    assert rms / noise_rms(torch.optim.AdamW, shape) == pytest.approx(to_adamw, rel=0.03)
    assert rms / math.sqrt(0.01 / (2 * 0.4)) == pytest.approx(to_law, rel=0.03)

@pytest.mark.parametrize("test, function, mutant", [
    (test_singular_values_end_near_one_and_singular_vectors_stay, "newton_schulz",
     other_coefficients),
    # measured ratios to AdamW for these mutants: 0.62 and 0.42
    (lambda: test_equilibrium((16, 128), 0.95, 0.93), "Muon", decays_by_adjusted_lr),
    (lambda: test_equilibrium((16, 128), 0.95, 0.93), "Muon",
     partial(torch.optim.Muon, adjust_lr_fn="original"))])
def test_mutants_of_the_parts_fail(test, function, mutant, monkeypatch):
    """Other coefficients, decay by the adjusted lr and another shape factor are found."""
    assert_mutant_fails(test, monkeypatch, muon, function, mutant)

# ---------------------------------------------------------------- errors and state dict
@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (1, 5), (1, 1), (4, 3, 3, 3)])
def test_only_matrices_are_accepted(shape):
    """A scalar, vector, one-wide matrix or convolution is an error that names AdamW."""
    optimizer = muon.Muon([start((3, 4))])
    wrong = {"params": [torch.nn.Parameter(torch.ones(shape))]}
    for add in (lambda: muon.Muon([wrong]), lambda: optimizer.add_param_group(wrong)):
        with pytest.raises(ValueError, match="both sides > 1.*AdamW"):
            add()
    # The optimizer does not keep the group that raised the error.
    assert len(optimizer.param_groups) == 1

@pytest.mark.parametrize("bad", [{"lr": -1e-3}, {"weight_decay": -0.1}, {"momentum": 1.0},
                                 {"momentum": -0.1}, {"adjust_lr_fn": "adamw"}])
def test_bad_settings_are_errors(bad):
    """A setting out of range raises a ValueError that names the setting."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        muon.Muon([start((3, 4))], **bad)

@pytest.mark.parametrize("first, second", [(muon.Muon, muon.Muon), (muon.Muon, torch.optim.Muon),
                                           (torch.optim.Muon, muon.Muon)])
def test_state_dict_resumes_and_interchanges_with_torch(first, second, monkeypatch):
    """10 steps, save, load into a new optimizer (ours or torch's), 10 more: bitwise 20 unbroken."""
    monkeypatch.setattr(muon, "matmul_dtype", lambda device: torch.bfloat16)
    unbroken, saved = (first([start((12, 8))], lr=0.02, nesterov=False) for _ in range(2))
    train(unbroken, 10, seed=1)
    want = train(unbroken, 10, seed=2)
    p = train(saved, 10, seed=1).clone().requires_grad_()
    # The new optimizer starts with default settings; the saved ones replace them.
    resumed = second([p])
    resumed.load_state_dict(saved.state_dict())
    assert torch.equal(train(resumed, 10, seed=2), want)
