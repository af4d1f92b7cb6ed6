"""What muon.py promises, one property per test: the iteration, the update, the optimizer.

A tolerance stands beside the error it was set from, measured with torch 2.13 on a CPU. A property
that a small slip could break is a `check_...` function; its mutant, muon.py with that slip made,
has to fail the very same function.

    python -m pytest -m muon
"""
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import muon

pytestmark = pytest.mark.muon

JORDAN = (3.4445, -4.775, 2.0315)
CLASSIC = (2, -1.5, 0.5)  # converges to 1, but is slow on small singular values
SHAPES = [(48, 48), (96, 32), (32, 96), (7, 13), (129, 65)]  # square, tall, wide, odd sizes
BOTH_NAMES = pytest.mark.parametrize("name", ["original", "match_rms_adamw"])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orthonormal(rows, columns, seed=0):
    """A matrix [rows, columns], rows >= columns, whose columns are orthonormal."""
    return torch.linalg.qr(randn(rows, columns, seed=seed))[0]


def distance(a, b):
    """Frobenius norm of a - b relative to that of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def orthogonalize(G, coefficients=JORDAN, steps=5):
    return muon.newton_schulz(G, coefficients, steps, 1e-7)


# ------------------------------------------------------------------------------- Newton–Schulz


def hand_iteration(G, coefficients, steps, eps):
    """The formula as printed: no transpose, no fused products."""
    a, b, c = coefficients
    X = G / max(G.norm(), eps)
    for _ in range(steps):
        X = a * X + b * (X @ X.mT) @ X + c * (X @ X.mT) @ (X @ X.mT) @ X
    return X


def check_is_the_iteration():
    for shape in SHAPES:
        G = randn(*shape)
        got, want = orthogonalize(G), hand_iteration(G, JORDAN, 5, 1e-7)
        assert got.shape == want.shape
        assert distance(got, want) < 1e-13  # measured: 6e-15


def check_singular_values():
    for rows, columns in [(64, 64), (64, 20), (20, 64)]:
        s = torch.logspace(-1.5, 0, min(rows, columns), dtype=torch.float64)
        U, V = orthonormal(rows, len(s), seed=1), orthonormal(columns, len(s), seed=2)
        after = torch.diag(U.mT @ orthogonalize(U * s @ V.mT) @ V)
        assert s.min() / s.norm() > 0.01
        assert after.min() > 0.6818 and after.max() < 1.1344  # the polynomial's range on [0.01, 1]
        assert distance(U * after @ V.mT, orthogonalize(U * s @ V.mT)) < 1e-13


def check_works_on_the_short_side():
    flops = []
    for shape in [(16, 64), (64, 16)]:
        with FlopCounterMode(display=False) as counter:
            orthogonalize(randn(*shape))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1]


def test_newton_schulz_is_the_printed_iteration():
    """newton_schulz in float64 is five rounds of aX + b(XX^T)X + c(XX^T)^2 X from G/||G||_F."""
    check_is_the_iteration()


def test_singular_values_end_near_one_and_singular_vectors_stay():
    """Singular values above 0.01 ||G||_F end in [0.682, 1.134], with U and V as they were."""
    check_singular_values()


def test_a_tall_matrix_costs_as_little_as_its_transpose():
    """The Gram matrix is built on the short side: equal flops for (64, 16) and (16, 64)."""
    check_works_on_the_short_side()


def other_coefficients(G, coefficients, steps, eps, right=muon.newton_schulz):
    return right(G, CLASSIC, steps, eps)


def transpose_not_undone(G, coefficients, steps, eps, right=muon.newton_schulz):
    O = right(G, coefficients, steps, eps)
    return O.mT if G.size(-2) > G.size(-1) else O


@pytest.mark.parametrize("check, mutant", [
    (check_is_the_iteration, other_coefficients),
    (check_is_the_iteration, transpose_not_undone),
    (check_singular_values, other_coefficients),
    (check_works_on_the_short_side, hand_iteration)])
def test_mutants_of_newton_schulz_are_caught(check, mutant, monkeypatch):
    """Other coefficients, a transpose not undone and no transpose at all each fail a check."""
    monkeypatch.setattr(muon, "newton_schulz", mutant)
    with pytest.raises(AssertionError):
        check()


def test_converging_coefficients_reach_the_exact_answer():
    """(2, -1.5, 0.5) for 12 steps gives the U V^T of the SVD, the steepest descent direction."""
    G = randn(64, 20)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    assert distance(orthogonalize(G, CLASSIC, 12), U @ Vh) < 1e-13  # measured: 2e-15


@pytest.mark.parametrize("shape", SHAPES)
def test_invariances(shape):
    """Scaling G changes nothing; sign, transpose and orthogonal bases P, Q pass through."""
    G, P, Q = randn(*shape), orthonormal(shape[0], shape[0]), orthonormal(shape[1], shape[1])
    O = orthogonalize(G)
    tolerance = 1e-13  # measured: 7e-15
    assert distance(orthogonalize(1e3 * G), O) < tolerance
    assert distance(orthogonalize(-G), -O) < tolerance
    assert distance(orthogonalize(G.mT), O.mT) < tolerance
    assert distance(orthogonalize(P @ G @ Q), P @ O @ Q) < tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_its_matrices_one_by_one(shape):
    """A batch [n, out, in] gives what its matrices give one at a time."""
    batch = randn(3, *shape) * torch.tensor([1e-3, 1, 1e3]).view(3, 1, 1)
    one_by_one = torch.stack([orthogonalize(G) for G in batch])
    assert distance(orthogonalize(batch), one_by_one) < 1e-13  # measured: 2e-15


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_gradient_gives_zero_update(dtype):
    """A gradient of zeros is orthogonalized to zeros, not to 0/0."""
    zeros = torch.zeros(4, 6, dtype=dtype)
    assert torch.equal(orthogonalize(zeros), zeros)


def test_half_precision_on_capable_gpus_only(monkeypatch):
    """Newton–Schulz runs in bf16 on a GPU with bf16 tensor cores and in fp32 everywhere else."""
    for capability, cuda_dtype in [((8, 0), torch.bfloat16), ((7, 5), torch.float32)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert muon.ns_dtype(torch.device("cuda")) == cuda_dtype
        for elsewhere in ("cpu", "mps"):
            assert muon.ns_dtype(torch.device(elsewhere)) == torch.float32


# -------------------------------------------------------------------------- the shape factors


def check_update_has_adamw_rms():
    for rows, columns in SHAPES:
        UV = orthonormal(max(rows, columns), min(rows, columns))
        rms = UV.square().mean().sqrt().item()
        lr = muon.adjusted_lr(1e-3, "match_rms_adamw", (rows, columns))
        assert lr * rms == pytest.approx(0.2 * 1e-3)


def check_original_factor():
    for shape, factor in [((64, 16), 2), ((16, 64), 1), ((64, 64), 1)]:
        assert muon.adjusted_lr(0.02, "original", shape) == pytest.approx(0.02 * factor)
        assert muon.adjusted_lr(0.02, None, shape) == pytest.approx(0.02 * factor)


def test_match_rms_adamw_gives_an_rms_of_a_fifth():
    """With "match_rms_adamw" an exactly orthogonal step has RMS 0.2 lr in every shape."""
    check_update_has_adamw_rms()


def test_original_lengthens_only_tall_matrices():
    """With "original", or torch's None, the step is lr sqrt(out/in) if out > in, else lr."""
    check_original_factor()


@pytest.mark.parametrize("check, slip", [
    (check_update_has_adamw_rms, lambda rows, columns: (min(rows, columns),) * 2),
    (check_update_has_adamw_rms, lambda rows, columns: (rows, rows)),
    (check_original_factor, lambda rows, columns: (columns, rows)),
], ids=["shorter side", "rows only", "out and in swapped"])
def test_mutants_of_the_shape_factors_are_caught(check, slip, monkeypatch):
    """A factor computed from the wrong sides of the matrix fails."""
    right = muon.adjusted_lr
    monkeypatch.setattr(muon, "adjusted_lr", lambda lr, name, shape: right(lr, name, slip(*shape)))
    with pytest.raises(AssertionError):
        check()


# ------------------------------------------------------------------------------ the optimizer


class DecaysByAdjustedLr(muon.Muon):
    """Mutant: p *= 1 - adjusted_lr * wd."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, wd = group["lr"], group["weight_decay"]
            for p in group["params"]:
                wrong = muon.adjusted_lr(lr, group["adjust_lr_fn"], p.shape)
                p.mul_((1 - wrong * wd) / (1 - lr * wd))
        super().step()


def start(shape, device="cpu"):
    return (0.3 * randn(*shape, dtype=torch.float32)).to(device).requires_grad_()


def train(optimizer, steps, seed=1):
    """Noisy descent on ||p||^2 / 2, so the gradient depends on where the step before it led."""
    (p,) = optimizer.param_groups[0]["params"]
    for noise in randn(steps, *p.shape, seed=seed, dtype=torch.float32).to(p.device):
        p.grad = p.detach() + noise
        optimizer.step()
    return p.detach()


def check_follows_torch(shape, optimizer=muon.Muon, tolerance=1e-2, device="cpu", **settings):
    """Distance between the two end points, relative to the distance travelled in 20 steps."""
    travelled = []
    for cls in (optimizer, torch.optim.Muon):
        p = start(shape, device)
        end = train(cls([p], lr=0.02, weight_decay=0.5, **settings), 20)
        travelled.append(end - start(shape, device).detach())
    assert distance(*travelled) <= tolerance


@pytest.fixture
def bf16(monkeypatch):
    """torch.optim.Muon orthogonalizes in bf16 everywhere; make ours do so too."""
    monkeypatch.setattr(muon, "ns_dtype", lambda device: torch.bfloat16)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@BOTH_NAMES
def test_equals_torch_in_bf16(shape, nesterov, name, bf16):
    """In bf16 every bit equals torch.optim.Muon's after 20 steps: same operations, same order."""
    check_follows_torch(shape, nesterov=nesterov, adjust_lr_fn=name, tolerance=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@BOTH_NAMES
def test_follows_torch_in_fp32(shape, nesterov, name):
    """In fp32 it ends within 1% of torch.optim.Muon's end point: bf16 rounding, nothing else."""
    check_follows_torch(shape, nesterov=nesterov, adjust_lr_fn=name)  # measured: 0.0015 to 0.0031


def without_nesterov(grad, buffer, momentum, nesterov, *rest, right=muon.muon_direction):
    return right(grad, buffer, momentum, False, *rest)


def from_the_shorter_side(lr, name, shape, right=muon.adjusted_lr):
    return right(lr, name, (min(shape),) * 2)


@BOTH_NAMES
@pytest.mark.parametrize("function, mutant", [
    ("muon_direction", without_nesterov), ("adjusted_lr", from_the_shorter_side),
    ("newton_schulz", other_coefficients), ("Muon", DecaysByAdjustedLr)])
def test_mutants_of_the_update_leave_torch_behind(function, mutant, name, monkeypatch):
    """No Nesterov, a wrong shape factor, other coefficients, decay by the adjusted lr: all fail."""
    monkeypatch.setattr(muon, function, mutant)
    with pytest.raises(AssertionError):  # measured: 0.05 to 0.42, against a tolerance of 0.01
        check_follows_torch((96, 32), muon.Muon, adjust_lr_fn=name)


def check_decay_uses_plain_lr(optimizer):
    p = start((8, 32))
    p.grad = torch.zeros_like(p)
    want = p.detach() * (1 - 0.02 * 0.5)
    optimizer([p], lr=0.02, weight_decay=0.5).step()
    assert torch.equal(p.detach(), want)


def test_weight_decay_is_decoupled_and_uses_the_unadjusted_lr():
    """With a zero gradient a step is p *= 1 - lr*wd, to the bit."""
    check_decay_uses_plain_lr(muon.Muon)


def test_mutant_decay_by_the_adjusted_lr_is_caught():
    """Decay by the adjusted lr fails the check of the decay."""
    with pytest.raises(AssertionError):
        check_decay_uses_plain_lr(DecaysByAdjustedLr)


def noise_norm(optimizer, shape, **settings):
    """RMS(W) that pure gradient noise settles at: the second half of 4/(lr*wd) = 1000 steps."""
    p = torch.zeros(shape, requires_grad=True)
    optimizer = optimizer([p], lr=0.01, weight_decay=0.4, **settings)
    generator, squares = torch.Generator().manual_seed(0), []
    for _ in range(1000):
        p.grad = torch.randn(shape, generator=generator)
        optimizer.step()
        squares.append(p.detach().square().mean().item())
    return math.sqrt(sum(squares[-500:]) / 500)


def check_sits_at_adamw_norm(optimizer, shape=(16, 128), **settings):
    adamw = noise_norm(torch.optim.AdamW, shape)
    assert noise_norm(optimizer, shape, **settings) == pytest.approx(adamw, rel=0.2)


@pytest.mark.parametrize("shape", [(16, 128), (32, 32)])
def test_equilibrium_norm_is_nearly_that_of_adamw(shape):
    """Under pure noise, with the same lr and weight decay, RMS(W) is within 20% of AdamW's."""
    check_sits_at_adamw_norm(muon.Muon, shape)  # measured ratio: 0.96 and 0.86


@pytest.mark.parametrize("optimizer, settings", [
    (DecaysByAdjustedLr, {}), (muon.Muon, {"adjust_lr_fn": "original"})])
def test_mutants_of_the_equilibrium_are_caught(optimizer, settings):
    """Decay by the adjusted lr, or "original" at AdamW's lr, settles at another norm."""
    with pytest.raises(AssertionError):  # measured ratio: 0.61 and 0.42
        check_sits_at_adamw_norm(optimizer, **settings)


@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (1, 5), (1, 1), (4, 3, 3, 3)])
def test_only_matrices_are_accepted(shape):
    """Scalars, vectors, one-wide matrices and convolutions are refused, and sent to AdamW."""
    with pytest.raises(ValueError, match="both sides > 1.*AdamW"):
        muon.Muon([torch.nn.Parameter(torch.ones(shape))])
    optimizer = muon.Muon([start((3, 4))])
    with pytest.raises(ValueError, match="both sides > 1.*AdamW"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(shape))]})
    assert len(optimizer.param_groups) == 1  # and the refused group is not kept


@pytest.mark.parametrize("bad", [{"lr": -1e-3}, {"weight_decay": -0.1}, {"momentum": 1.0},
                                 {"momentum": -0.1}, {"adjust_lr_fn": "adamw"}])
def test_bad_settings_are_refused(bad):
    """A setting out of range raises a ValueError that names it."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        muon.Muon([start((3, 4))], **bad)


@pytest.mark.parametrize("nesterov", [True, False])
def test_gradient_is_read_only_and_the_buffer_is_its_running_mean(nesterov):
    """A step leaves p.grad as it was, and momentum_buffer at 0.05 of the first gradient."""
    p = start((6, 4))
    p.grad = randn(6, 4, seed=3, dtype=torch.float32)
    before = p.grad.clone()
    optimizer = muon.Muon([p], nesterov=nesterov)
    optimizer.step()
    assert torch.equal(p.grad, before)
    mean = torch.zeros(6, 4).lerp(before, 1 - 0.95)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], mean)


def test_parameter_without_gradient_is_skipped():
    """A parameter whose grad is None is not decayed, not moved, and gets no state."""
    p, idle = start((6, 4)), start((4, 6))
    p.grad = torch.ones_like(p)
    optimizer = muon.Muon([p, idle])
    optimizer.step()
    assert torch.equal(idle, start((4, 6))) and idle not in optimizer.state
    assert not torch.equal(p, start((6, 4)))


def test_closure_is_called_with_gradients_on():
    """step(closure) returns the closure's loss and uses the gradient that it made."""
    p = start((6, 4))
    optimizer = muon.Muon([p])

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < first


@pytest.mark.parametrize("first, second", [(muon.Muon, muon.Muon), (muon.Muon, torch.optim.Muon),
                                           (torch.optim.Muon, muon.Muon)])
def test_state_dict_resumes_and_interchanges_with_torch(first, second, bf16):
    """10 steps, save, load in a new optimizer (ours or torch's), 10 more: bitwise 20 unbroken."""
    shape, settings = (12, 8), {"lr": 0.02, "nesterov": False}
    unbroken = first([start(shape)], **settings)
    train(unbroken, 10, seed=1)
    want = train(unbroken, 10, seed=2)
    saved = first([start(shape)], **settings)
    p = train(saved, 10, seed=1).clone().requires_grad_()
    resumed = second([p])  # its own defaults, which the saved settings replace
    resumed.load_state_dict(saved.state_dict())
    assert torch.equal(train(resumed, 10, seed=2), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@BOTH_NAMES
def test_follows_torch_on_cuda(name):
    """On a GPU it ends within 1% of where torch.optim.Muon ends, whatever dtype ns_dtype picks."""
    check_follows_torch((96, 32), device="cuda", adjust_lr_fn=name)
