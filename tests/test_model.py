"""Tests of model.py: one property each, stated in the docstring.

`llama` below is an independent GPT by other means: complex numbers for the rotary positions, a
written-out softmax and mask, no modules. The logits of model.py have to equal its own. A mutant is
model.py with one small slip: `assert_mutant_fails` runs a check with the right code and expects it
to fail with the mutant.

    python -m pytest -m model
"""
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as model_py
import train
from conftest import assert_mutant_fails
from model import GPT, BadInput, GPTConfig, placement_of
from multipliers import is_multiplier, merge, multipliers_of, raw_weight

pytestmark = pytest.mark.model

TOKENS = torch.arange(16).view(2, 8)
TARGETS = TOKENS.roll(-1, 1)
KINDS = ["none", "scalar", "vector", "both"]
# All logits here are below 10. float64 rounds by 1.1e-16, and a logit is the result of less than
# 10,000 operations: the error is below 10 * 10,000 * 1.1e-16 = 1e-11.
ROUNDING = 1e-11


def tiny(seed=0, **settings):
    """A GPT in float64."""
    small = dict(vocab_size=17, block_size=8, n_embd=16)
    return GPT(GPTConfig(**small | settings), seed).double()


def randomise(model):
    """Move multipliers and gains away from 1, where a missing one would make no difference."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.ndim < 2:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


# ---------------------------------------------------------------- settings
def test_defaults():
    """The defaults of the shape, of the multipliers and of generate. A top_k above the number of
    tokens leaves them all."""
    assert vars(GPTConfig()) == dict(
        vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=64, multipliers="scalar",
        placement="all", final_gain="vector", block_gains="vector")
    assert GPT.generate.__wrapped__.__kwdefaults__ == dict(
        temperature=0.8, top_k=50, generator=None)
    assert tiny().generate(TOKENS, 1).shape == (2, 9)


@pytest.mark.parametrize("bad", [
    {"vocab_size": 0}, {"block_size": 0}, {"n_layer": 0}, {"n_head": 0}, {"n_embd": 0},
    {"n_embd": 12, "n_head": 4}], ids=str)
def test_bad_shapes_are_errors(bad):
    """A shape that no GPT can have is a BadInput, which is a ValueError, and names the setting."""
    with pytest.raises(BadInput, match=next(iter(bad))):
        GPT(GPTConfig(**bad))
    assert issubclass(BadInput, ValueError)


# ---------------------------------------------------------------- which matrix gets which
MATRICES = [
    "blocks.1.attn.q", "blocks.1.attn.k", "blocks.1.attn.v", "blocks.1.attn.out",
    "blocks.1.mlp.gate", "blocks.1.mlp.up", "blocks.1.mlp.down", "embedding", "head"]
# In the order of MATRICES: r for row, c for column
PLACEMENTS = {
    "all": "rc rc rc rc rc rc rc rc -",
    "hidden": "rc rc rc rc rc rc rc - -",
    "symmetry_free": "r - - rc r - rc rc -",
    "mlp": "- - - - rc rc rc - -",
}
VECTOR = {"-": [], "r": ["row"], "rc": ["row", "column"]}
SCALAR = {"-": [], "r": ["scalar"], "rc": ["scalar"]}
BOTH = {"-": [], "r": ["scalar", "row"], "rc": ["scalar", "row", "column"]}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements(placement):
    """The matrices have the multipliers of the paper's Appendix B and C. With "scalar", a scalar
    stands for the row and column multipliers of a matrix."""
    vector = tiny(multipliers="vector", placement=placement)
    scalar = tiny(multipliers="scalar", placement=placement)
    both = tiny(multipliers="both", placement=placement)
    for name, letters in zip(MATRICES, PLACEMENTS[placement].split()):
        assert list(multipliers_of(vector.get_submodule(name))) == VECTOR[letters], name
        assert list(multipliers_of(scalar.get_submodule(name))) == SCALAR[letters], name
        assert list(multipliers_of(both.get_submodule(name))) == BOTH[letters], name


def test_unknown_words_are_errors():
    """Words that placement_of does not know are ValueErrors."""
    with pytest.raises(ValueError, match="none, scalar, vector or both, not 'row'"):
        placement_of("q", "row", "all")
    with pytest.raises(ValueError, match="all, hidden, symmetry_free or mlp, not 'some'"):
        placement_of("q", "none", "some")


def parameter(model, name):
    """A gain of block 0, e.g. "attn_norm.gain", or a multiplier, e.g. "attn.q/row"."""
    return model.blocks[0].get_parameter(name.replace("/", ".parametrizations.weight.0."))


@pytest.mark.parametrize("first, second, redundant", [
    ("attn.q/row", ["attn.k/row"], True), ("attn.v/row", ["attn.out/column"], True),
    ("mlp.up/row", ["mlp.down/column"], True),
    # SiLU follows the gate.
    ("mlp.gate/row", ["mlp.down/column"], False),
    ("mlp_norm.gain", ["mlp.gate/column", "mlp.up/column"], True),
    ("attn_norm.gain", ["attn.q/column", "attn.k/column", "attn.v/column"], True),
    ("attn_norm.gain", ["attn.q/column", "attn.k/column"], False)])
def test_redundant_pairs(first, second, redundant):
    """Multipliers a and b are redundant if 2 a and b / 2 give the same logits. (In the table above,
    "symmetry_free" keeps one side of each redundant pair.)"""
    model = randomise(tiny(multipliers="vector"))
    before = model(TOKENS)[0]
    parameter(model, first).data *= 2
    for name in second:
        parameter(model, name).data /= 2
    change = (model(TOKENS)[0] - before).abs().max()
    assert (change < ROUNDING) == redundant


# ---------------------------------------------------------------- the start
def check_start():
    plain = tiny(multipliers="none")(TOKENS)[0]
    for kind, placement, final in product(KINDS[1:], PLACEMENTS, ["vector", "scalar", "frozen"]):
        model = tiny(multipliers=kind, placement=placement, final_gain=final, block_gains="frozen")
        assert torch.equal(model(TOKENS)[0], plain), "another start"
    assert not torch.equal(tiny(seed=1)(TOKENS)[0], plain)


def init_with_multipliers_first(self, generator, right=GPT.init_weights):
    for name, p in self.named_parameters():
        if is_multiplier(name):
            torch.rand(p.shape, generator=generator)
    right(self, generator)


def test_all_kinds_start_with_the_same_function(monkeypatch):
    """With one seed, all choices of multipliers and gains start from equal logits; another seed
    gives others. Multipliers that use up random numbers fail."""
    assert_mutant_fails(
        check_start, monkeypatch, GPT, "init_weights", init_with_multipliers_first, "start")


@pytest.mark.parametrize("name, std", [
    ("embedding", 1.0), ("head", 0.02), ("blocks.1.attn.q", 0.125),
    # 2 n_layer = 4 matrices add to the residual stream. So these start at half of 64^-1/2 and of
    # 192^-1/2.
    ("blocks.1.attn.out", 0.0625), ("blocks.1.mlp.down", 0.0361)])
def test_initial_weights(name, std):
    """Each kind of matrix starts with the std that init_weights describes."""
    W = raw_weight(tiny(vocab_size=64, n_embd=64).get_submodule(name))
    # The RMS of 64^2 normal numbers has the relative standard error 1 / sqrt(2 * 64^2) = 1.1 %.
    assert W.square().mean().sqrt().item() == pytest.approx(std, rel=4 * 0.011)


# ---------------------------------------------------------------- the maths
def norm(x, gain):
    return gain * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


# e^{i t frequency} for the positions t and the 4 frequencies of a head: [T, 1, D/2]
FREQUENCY = 10000.0 ** (-torch.arange(4) / 4)
ROTATION = torch.exp(1j * torch.outer(torch.arange(8), FREQUENCY))[:, None]


def turn(x):
    """x [T, H, D]: the numbers x_i + i x_{i + D/2} are multiplied by e^{i t frequency}."""
    z = torch.complex(x[..., :4], x[..., 4:]) * ROTATION
    return torch.cat((z.real, z.imag), dim=-1)


def llama(model, tokens):
    """tokens [8] -> logits [8, V], from the weights of a plain GPT with C = 16 and 2 heads."""
    future = torch.ones(8, 8).triu(1) > 0
    x = model.embedding.weight[tokens]
    for block in model.blocks:
        h = norm(x, block.attn_norm.gain)
        layers = (block.attn.q, block.attn.k, block.attn.v)
        q, k, v = [(h @ layer.weight.T).view(8, 2, 8) for layer in layers]
        scores = torch.einsum("thd,shd->hts", turn(q), turn(k)) / math.sqrt(8)
        attention = scores.masked_fill(future, -math.inf).softmax(-1)     # t must not see s > t
        y = torch.einsum("hts,shd->thd", attention, v).reshape(8, 16)
        x = x + y @ block.attn.out.weight.T
        h = norm(x, block.mlp_norm.gain)
        gate = h @ block.mlp.gate.weight.T
        y = gate * gate.sigmoid() * (h @ block.mlp.up.weight.T)
        x = x + y @ block.mlp.down.weight.T
    return norm(x, model.final_norm.gain) @ model.head.weight.T


def check_llama(kind="none"):
    model = randomise(tiny(multipliers=kind))
    logits, loss = model(TOKENS[1:], TARGETS[1:])
    want = llama(merge(model), TOKENS[1])
    # The angles, up to 7, are rounded to float32, which rounds by 6e-8: an error of 4e-7 radians.
    assert (logits - want).abs().max() < 1e-5 * want.std(), "not a Llama"
    assert (loss - F.cross_entropy(want, TARGETS[1])).abs() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_is_a_llama(kind):
    """The merged model is an independent Llama-type model: the same logits. The loss is the mean of
    -log p(target) in nats."""
    check_llama(kind)


def wrong_pairs(x, cos, sin, right=model_py.rotate):
    """Turns the pairs (x_2i, x_{2i+1}) instead of (x_i, x_{i + D/2})."""
    return right(x.unflatten(-1, (-1, 2)).mT.flatten(-2), cos, sin)


def without_sqrt(q, k, v, is_causal, right=F.scaled_dot_product_attention):
    return right(q, k, v, is_causal=is_causal, scale=1.0)


@pytest.mark.parametrize("place, name, mutant", [
    (model_py, "rotate", wrong_pairs), (F, "silu", F.gelu),
    (F, "scaled_dot_product_attention", without_sqrt)])
def test_mutants_of_the_llama_fail(place, name, mutant, monkeypatch):
    """Other rotary pairs, another nonlinearity, and no 1 / sqrt(D) fail."""
    assert_mutant_fails(check_llama, monkeypatch, place, name, mutant, "Llama")


@pytest.mark.parametrize("final, inside, shapes", [
    ("vector", "vector", [(16,), (16,), (16,), (16,), (16,)]), ("frozen", "frozen", []),
    ("scalar", "frozen", [()])])
def test_gains(final, inside, shapes):
    """A gain is a vector [C], one number [], or no parameter where it is frozen at 1. Each
    parameter of the model gets a gradient."""
    model = tiny(final_gain=final, block_gains=inside)
    assert [p.shape for name, p in model.named_parameters() if name.endswith("gain")] == shapes
    model(TOKENS, TARGETS)[1].backward()
    assert all(p.grad.any() for p in model.parameters())


def test_compiles_as_one_graph():
    """torch.compile with fullgraph=True, where leaving the graph is an error, gives the same
    gradients to all parameters. The logits beside the loss are detached."""
    model = randomise(tiny(multipliers="vector", n_layer=1))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    gradients = []
    for run in (model, compiled):
        logits, loss = run(TOKENS, TARGETS)
        assert not logits.requires_grad
        gradients.append(torch.autograd.grad(loss, model.parameters()))
    # The loss is float32. Its rounding error of 6e-8 is multiplied by numbers below 10.
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- on another device
class OnlyMeta(TorchDispatchMode):
    """An operation on a tensor of the CPU fails. Single numbers may be there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            assert not isinstance(x, torch.Tensor) or x.is_meta or x.ndim == 0, function
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_on_the_device_of_the_model(kind, optimizer):
    """Forward, backward, clipping, both optimizers and generate use no tensor of the CPU. The
    device "meta" stands for any other: its tensors have shapes, but no numbers."""
    config = train.Config(n_layer=1, n_embd=16, multipliers=kind, optimizer=optimizer)
    model = GPT(config).to("meta")
    tokens = TOKENS.to("meta")
    groups = train.parameter_groups(model, config)
    # The fused AdamW knows no "meta". The ordinary one computes the same.
    for group in groups:
        group["fused"] = False
    with OnlyMeta():
        model(tokens, tokens)[1].backward()
        train.clip_gradients(groups, 1.0)
        for optimizer in train.make_optimizers(groups):
            optimizer.step()
        model.generate(tokens, 2)
        # A mutant: a table that stays on the CPU
        model.cos = torch.ones(64, 8)
        with pytest.raises(AssertionError, match="slice"):
            model(tokens)


# ---------------------------------------------------------------- text
def add(tokens):
    """Logits [B, T, 17] as from a model. The likeliest token is the sum of all tokens before."""
    return F.one_hot(tokens.cumsum(1), 17), None


def test_greedy_text():
    """At temperature 0 the likeliest token after the last block_size tokens comes next."""
    model = tiny(block_size=2)
    model.forward = add
    text = model.generate(torch.tensor([[1]]), 6, temperature=0)
    assert text.tolist() == [[1, 1, 2, 3, 5, 8, 13]]


def test_tokens_are_drawn_from_the_tempered_softmax(monkeypatch):
    """The generator draws from softmax(logits / temperature) over the top_k likeliest tokens."""
    def multinomial(p, count, generator):
        assert generator == "a generator"
        # Here torch.multinomial would draw a token.
        torch.testing.assert_close(p, torch.tensor([[0.0, 0.25, 0.75]]))
        return torch.tensor([[1]])
    monkeypatch.setattr(torch, "multinomial", multinomial)
    model = tiny()
    # softmax([0, 2 log 3] / 2) = [1, 3] / 4
    logits = torch.tensor([[[-1.0, 0.0, 2 * math.log(3)]]])
    model.forward = lambda tokens: (logits, None)
    text = model.generate(torch.tensor([[2]]), 1, top_k=2, temperature=2, generator="a generator")
    assert text.tolist() == [[2, 1]]


def test_too_long_a_sequence_is_an_error():
    """More than block_size tokens are a ValueError that gives both numbers."""
    with pytest.raises(ValueError, match="9 tokens, but block_size is 8"):
        tiny()(torch.zeros(1, 9, dtype=torch.long))
