"""Tests of model.py: one property each, stated in the docstring.

`llama` below is an independent GPT of thirty lines by other means: complex numbers for the rotary
positions, a written-out softmax and mask, no modules. The logits of model.py have to equal its own.

A tolerance stands beside the error that was measured with torch 2.13 on a CPU. A mutant is model.py
with one small slip. `assert_mutant_fails` runs a property's test with the right code, then makes
the slip, and expects the same test to fail.

    python -m pytest -m model
"""
import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import model as model_py
from conftest import assert_mutant_fails
from model import GPT, GPTConfig
from multipliers import MultiplierLinear, is_multiplier, merge

pytestmark = pytest.mark.model

TOKENS = torch.randint(17, (2, 8), generator=torch.Generator().manual_seed(0))
CHOICES = {name: get_args(get_type_hints(GPTConfig)[name])
           for name in ("multipliers", "placement", "final_gain", "block_gains")}

def each(*names):
    """Every combination of the choices for these fields of GPTConfig, as keyword arguments."""
    return [dict(zip(names, values)) for values in itertools.product(*map(CHOICES.get, names))]

def tiny(seed=0, **settings):
    return GPT(GPTConfig(**{**dict(vocab_size=17, block_size=8, n_layer=2, n_head=2, n_embd=16),
                            **settings}), seed)

def randomise(model):
    """Move multipliers and gains away from 1, where a missing one would make no difference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("weight"):
                p.copy_((0.5 * torch.randn(p.shape, generator=generator)).exp())
    return model

# ---------------------------------------------------------------- the start
def test_identity_at_init():
    """With one seed, all choices of multipliers and gains start from bitwise equal logits. Another
    seed gives others."""
    plain = tiny(multipliers="none")(TOKENS)[0]
    for settings in each(*CHOICES):
        assert torch.equal(tiny(**settings)(TOKENS)[0], plain), settings
    assert not torch.equal(tiny(seed=1)(TOKENS)[0], plain)

def init_with_multipliers_first(self, generator, right=GPT.init_weights):
    for name, p in self.named_parameters():
        if is_multiplier(name):
            torch.rand(p.shape, generator=generator)
    right(self, generator)

@pytest.mark.parametrize("name, std", [
    ("embedding.weight", 1.0), ("head.weight", 0.02),
    *((f"blocks.1.{matrix}.weight", 64 ** -0.5)
      for matrix in ("attn.q", "attn.k", "attn.v", "mlp.gate", "mlp.up")),
    # 2 n_layer = 4 matrices add to the residual stream: 4^-1/2 of the usual std
    ("blocks.1.attn.out.weight", 64 ** -0.5 / 2), ("blocks.1.mlp.down.weight", 192 ** -0.5 / 2)])
def test_initial_weights(name, std):
    """Each kind of matrix starts with mean 0 and the std that init_weights describes."""
    W = tiny(vocab_size=64, n_embd=64).get_parameter(name)
    # the std of n normal numbers has a relative standard error of (2n)^-1/2, here 0.6 to 1.1 %
    assert W.std().item() == pytest.approx(std, rel=3 * (2 * W.numel()) ** -0.5)
    assert abs(W.mean().item()) < 3 * std * W.numel() ** -0.5

# ---------------------------------------------------------------- the maths
def llama(weights, tokens, n_layer, n_head):
    """tokens [T] -> logits [T, V], from a state dict, in float64: one sequence, no modules."""
    T = len(tokens)
    position = torch.arange(T, dtype=torch.float64)

    def norm(x, gain):
        return gain * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def turn(x):                           # (T, H, D): x_i + i x_{i + D/2} times e^{i t frequency}
        half = x.shape[-1] // 2
        frequency = 10000.0 ** (-torch.arange(half) / half).double()
        angle = (position[:, None] * frequency)[:, None]               # (T, 1, D/2)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((z.real, z.imag), dim=-1)

    x = weights["embedding.weight"][tokens]
    for layer in range(n_layer):
        w = {name.removeprefix(f"blocks.{layer}."): p for name, p in weights.items()}
        h = norm(x, w["attn_norm.gain"])
        q, k, v = ((h @ w[f"attn.{name}.weight"].T).reshape(T, n_head, -1) for name in "qkv")
        scores = torch.einsum("thd,shd->hts", turn(q), turn(k)) / math.sqrt(q.shape[-1])
        scores[:, position[None, :] > position[:, None]] = -math.inf   # t must not see s > t
        attention = scores.exp() / scores.exp().sum(-1, keepdim=True)
        y = torch.einsum("hts,shd->thd", attention, v).reshape(T, -1)
        x = x + y @ w["attn.out.weight"].T
        h = norm(x, w["mlp_norm.gain"])
        gate, up = h @ w["mlp.gate.weight"].T, h @ w["mlp.up.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ w["mlp.down.weight"].T
    return norm(x, weights["final_norm.gain"]) @ weights["head.weight"].T

def test_model_without_multipliers_is_a_llama():
    """With multipliers="none" the logits are those of an independent Llama-type model."""
    model = randomise(tiny(multipliers="none")).double()
    for tokens in TOKENS:
        want = llama(model.state_dict(), tokens, n_layer=2, n_head=2)
        error = (model(tokens[None])[0][0] - want).abs().max() / want.square().mean().sqrt()
        # measured: 8e-8, since the rotary table is float32
        assert error < 1e-6

def rotate_wrong_pairs(x, cos, sin):
    """Turns the pairs (x_2i, x_2i+1) by the angles of the pairs (x_i, x_{i + D/2})."""
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

def attention_without_sqrt(q, k, v, is_causal, right=F.scaled_dot_product_attention):
    return right(q, k, v, is_causal=is_causal, scale=1.0)

@pytest.mark.parametrize("test, place, name, mutant", [
    (test_identity_at_init, GPT, "init_weights", init_with_multipliers_first),
    (test_model_without_multipliers_is_a_llama, model_py, "rotate", rotate_wrong_pairs),
    (test_model_without_multipliers_is_a_llama, F, "silu", F.gelu),
    (test_model_without_multipliers_is_a_llama, F, "scaled_dot_product_attention",
     attention_without_sqrt)])
def test_mutants_fail(test, place, name, mutant, monkeypatch):
    """Multipliers that use up random numbers, other rotary pairs, no 1 / sqrt(D), another
    nonlinearity: each fails."""
    # measured: an error of 0.2 to 2.4 in the logits of llama
    assert_mutant_fails(test, monkeypatch, place, name, mutant)

@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU"))])
def test_attention_is_the_flash_kernel(device):
    """PyTorch's flash kernel does the attention, so that no T x T matrix is stored."""
    model, tokens = tiny(n_embd=32).to(device), TOKENS.to(device)
    # sdpa_kernel raises an error where the flash kernel cannot be used.
    with (sdpa_kernel(SDPBackend.FLASH_ATTENTION),
          torch.autocast(device, torch.bfloat16, enabled=device == "cuda")):
        model(tokens, tokens)[1].backward()

def test_loss_is_the_mean_cross_entropy():
    """The loss is the mean of -log p(target) in nats; the logits beside the loss are detached."""
    targets = TOKENS.roll(-1, 1)
    logits, loss = randomise(tiny())(TOKENS, targets)
    log_p = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    want = -log_p.gather(-1, targets[..., None]).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)         # measured: 4e-8
    assert loss.requires_grad and not logits.requires_grad

# ---------------------------------------------------------------- text
def generate(model, new_tokens=12, prompt=TOKENS[:, :3], seed=0, **settings):
    return model.generate(prompt, new_tokens, generator=torch.Generator().manual_seed(seed),
                          **settings)

@pytest.fixture
def talker():
    """A tiny model with strong preferences: its head is 50 times larger than at the start."""
    model = randomise(tiny(block_size=6))
    model.head.weight.data *= 50
    return model

def test_greedy_text_is_argmax_step_by_step(talker):
    """Temperature 0, or top_k 1, appends the likeliest token after the last block_size tokens."""
    want = TOKENS[:, :3]
    for _ in range(12):
        new = talker(want[:, -6:])[0][:, -1].argmax(-1, keepdim=True)
        want = torch.cat((want, new), dim=1)
    assert torch.equal(generate(talker, temperature=0), want)
    assert torch.equal(generate(talker, top_k=1), want)

def test_the_generator_decides_the_text(talker):
    """The same generator draws the same text, another seed another one; temperature 0.8, top 50."""
    defaults = GPT.generate.__wrapped__.__kwdefaults__
    assert defaults == dict(temperature=0.8, top_k=50, generator=None)
    assert torch.equal(generate(talker, seed=3), generate(talker, seed=3))
    assert not torch.equal(generate(talker, seed=3), generate(talker, seed=4))

@pytest.mark.parametrize("top_k, temperature", [(None, 1.0), (None, 0.5), (4, 1.0), (4, 2.0)])
def test_tokens_are_drawn_from_the_tempered_softmax(talker, top_k, temperature):
    """Tokens come as often as softmax(logits / temperature) over the top_k likeliest says."""
    prompt, n = TOKENS[:1, :5], 10_000
    logits = talker(prompt)[0][0, -1].double()
    likeliest = logits.argsort(descending=True)[:top_k]
    p = torch.zeros(17).double()
    p[likeliest] = (logits[likeliest] / temperature).softmax(0)
    drawn = generate(talker, 1, prompt.expand(n, -1), top_k=top_k, temperature=temperature)
    count = drawn[:, -1].bincount(minlength=17)
    assert count[p == 0].sum() == 0
    # Four standard errors, and 2 more for rare tokens, whose counts are not normal.
    assert ((count - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt() + 2).all()

# ---------------------------------------------------------------- gradients, configurations
@pytest.mark.parametrize("settings", each("multipliers", "placement", "final_gain"))
def test_every_parameter_gets_a_gradient(settings):
    """The loss has a gradient, not zero, for each parameter."""
    model = randomise(tiny(**settings))
    model(TOKENS, TOKENS.roll(-1, 1))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.norm() > 0, name

@pytest.mark.parametrize("settings", each("multipliers", "placement"))
def test_merged_weights_load_into_a_plain_model(settings):
    """A merged state dict is that of a GPT without multipliers, with the same logits."""
    model, plain = randomise(tiny(**settings)), tiny(multipliers="none", seed=1)
    plain.load_state_dict(merge(model).state_dict())
    # measured: 0; allowed: a few units in the last place of logits of size 0.1
    torch.testing.assert_close(plain(TOKENS)[0], model(TOKENS)[0], rtol=0, atol=1e-6)

@pytest.mark.parametrize("settings", each("final_gain", "block_gains"))
def test_gain_modes(settings):
    """A gain is a vector [C], one number [], or no parameter at all where it is frozen at 1."""
    gains = {name: p.shape for name, p in tiny(**settings).named_parameters()
             if name.endswith("gain")}
    final = {"vector": {"final_norm.gain": (16,)}, "scalar": {"final_norm.gain": ()}, "frozen": {}}
    inside = {f"blocks.{i}.{part}_norm.gain": (16,) for i in (0, 1) for part in ("attn", "mlp")}
    assert gains == final[settings["final_gain"]] | (
        inside if settings["block_gains"] == "vector" else {})

@dataclass
class WithOptimizer(GPTConfig):
    optimizer: Literal["adamw", "muon"] = "adamw"

@pytest.mark.parametrize("bad, words", [
    ({"multipliers": "both"}, "multipliers must be one of none, scalar, vector, not 'both'"),
    ({"placement": "some"}, "placement must be one of all, symmetry_free, mlp, not 'some'"),
    ({"final_gain": None}, "final_gain must be one of vector, scalar, frozen, not None"),
    ({"block_gains": "scalar"}, "block_gains must be one of vector, frozen, not 'scalar'"),
    ({"optimizer": "sgd"}, "optimizer must be one of adamw, muon, not 'sgd'"),
    *(({name: 0}, f"{name} must be at least 1, not 0")
      for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")),
    ({"n_embd": 12, "n_head": 4}, r"n_embd 12 must be divisible by 2 \* n_head = 8: rotary")])
def test_bad_configurations_are_one_clear_sentence(bad, words):
    """A bad value, also of an inherited field, is a ValueError that says what is allowed."""
    with pytest.raises(ValueError, match=words):
        WithOptimizer(**bad).check()

def check_norms():
    model = tiny(multipliers="vector")
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape))
    rows = {row.pop("name"): row for row in model.norms(7)}
    assert len(rows) == 2 + 7 * 2 + 2 * 2 + 1 and {row["step"] for row in rows.values()} == {7}
    up, found = model.blocks[1].mlp.up, rows["blocks.1.mlp.up"]
    W_eff = up.row[:, None] * up.weight * up.column
    for key, x in {"W": up.weight, "W_eff": W_eff, "row": up.row, "column": up.column}.items():
        assert found[key] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-6)
    assert set(rows["head"]) == {"step", "W", "W_eff"}
    assert set(rows["final_norm"]) == {"step", "gain"}

def test_norms(monkeypatch):
    """norms() gives the RMS of W, of W_eff and of the multipliers of each matrix, and of each gain.
    A mutant that takes W for W_eff fails."""
    assert_mutant_fails(check_norms, monkeypatch, MultiplierLinear, "effective_weight",
                        lambda layer: layer.weight)

def test_too_long_a_sequence_is_an_error():
    """More than block_size tokens are a ValueError that gives both numbers."""
    with pytest.raises(ValueError, match="9 tokens, but block_size is 8"):
        tiny()(torch.zeros(1, 9, dtype=torch.long))
