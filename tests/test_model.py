"""What model.py promises, one property per test: the maths, causality, positions, text, FLOPs.

The centre is `llama`, an independent GPT of thirty lines with other means: complex numbers for the
rotary positions, a written-out softmax and mask, no modules. model.py has to agree with it.

A tolerance stands beside the error it was set from, measured with torch 2.13 on a CPU. A property
that a small slip could break is a `check_...` function; its mutant, model.py with that slip made,
has to fail the very same function.

    python -m pytest -m model
"""
import itertools
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model as model_py
import train
from model import CHOICES, GPT, GPTConfig, RMSNorm, rotary_table
from multipliers import is_multiplier, merge

pytestmark = pytest.mark.model

TOKENS = torch.randint(17, (2, 8), generator=torch.Generator().manual_seed(0))
EACH_MULTIPLIERS = pytest.mark.parametrize("multipliers", CHOICES["multipliers"])
EACH_PLACEMENT = pytest.mark.parametrize("placement", CHOICES["placement"])


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


def check_identity_at_init(**settings):
    plain, other = tiny(multipliers="none"), tiny(**settings)
    assert torch.equal(plain(TOKENS)[0], other(TOKENS)[0])


@pytest.mark.parametrize("final_gain", CHOICES["final_gain"])
@pytest.mark.parametrize("block_gains", CHOICES["block_gains"])
@EACH_PLACEMENT
@EACH_MULTIPLIERS
def test_identity_at_init(multipliers, placement, final_gain, block_gains):
    """With the same seed, every choice of multipliers and gains starts from the same logits, bit
    for bit: the same weights are drawn, and all multipliers are 1."""
    check_identity_at_init(multipliers=multipliers, placement=placement, final_gain=final_gain,
                           block_gains=block_gains)


def test_mutant_multipliers_that_take_random_numbers_are_caught(monkeypatch):
    """Multipliers that use up random numbers of the weights, even if set to 1, are noticed."""
    def init_weights(self, generator, right=GPT.init_weights):
        for name, p in self.named_parameters():
            if is_multiplier(name):
                torch.rand(p.shape, generator=generator)
        right(self, generator)
    monkeypatch.setattr(GPT, "init_weights", init_weights)
    check_identity_at_init(multipliers="none")
    with pytest.raises(AssertionError):
        check_identity_at_init(multipliers="vector")


def test_another_seed_is_another_model():
    """The seed decides the weights: another one gives other logits."""
    assert torch.equal(tiny(seed=1)(TOKENS)[0], tiny(seed=1)(TOKENS)[0])
    assert not torch.equal(tiny(seed=1)(TOKENS)[0], tiny(seed=2)(TOKENS)[0])


@pytest.mark.parametrize("name, std", [
    ("embedding.weight", 1.0), ("head.weight", 0.02),
    *((f"blocks.1.attn.{matrix}.weight", 64 ** -0.5) for matrix in "qkv"),
    ("blocks.1.mlp.gate.weight", 64 ** -0.5), ("blocks.1.mlp.up.weight", 64 ** -0.5),
    # the two that add to the residual stream: 2 n_layer = 4 of them keep its variance near 1 more
    ("blocks.1.attn.out.weight", 64 ** -0.5 / 2), ("blocks.1.mlp.down.weight", 192 ** -0.5 / 2)])
def test_initial_std(name, std):
    """Each kind of matrix starts with the standard deviation that init_weights describes."""
    W = tiny(vocab_size=64, n_embd=64).get_parameter(name)
    # the std of n normal numbers has a relative standard deviation of (2n)^-1/2, here 0.6-1.1%
    assert W.std().item() == pytest.approx(std, rel=3 * (2 * W.numel()) ** -0.5)
    assert abs(W.mean().item()) < 3 * std * W.numel() ** -0.5


def test_first_prediction_is_nearly_uniform():
    """An untrained model's loss is ln V: it has no opinion yet."""
    _, loss = tiny()(TOKENS, TOKENS.roll(-1, 1))
    # logits of std 0.02 sqrt(16) = 0.08 on 16 targets: 3 standard deviations are 0.06
    assert loss.item() == pytest.approx(math.log(17), abs=0.06)        # measured: 0.009


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


def check_maths():
    model = randomise(tiny(multipliers="none")).double()
    for tokens in TOKENS:
        want = llama(model.state_dict(), tokens, n_layer=2, n_head=2)
        error = (model(tokens[None])[0][0] - want).abs().max() / want.square().mean().sqrt()
        assert error < 1e-6                # measured: 8e-8, the rotary table being float32


def test_model_without_multipliers_is_a_llama():
    """With multipliers="none" the logits are those of an independent Llama-type model."""
    check_maths()


def rotate_neighbours(x, cos, sin):
    """Mutant: turns the pairs (x_2i, x_2i+1), each by its right angle: the other convention."""
    half = x.shape[-1] // 2
    cos, sin = (t[..., :half].repeat_interleave(2, -1) for t in (cos, sin))
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + turned * sin


def rotate_wrong_pairs(x, cos, sin):
    """Mutant: turns the pairs (x_2i, x_2i+1) by the angles of the pairs (x_i, x_{i + D/2})."""
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def attention_without_mask(q, k, v, is_causal, right=model_py.F.scaled_dot_product_attention):
    return right(q, k, v, is_causal=False)


def attention_without_sqrt(q, k, v, is_causal, right=model_py.F.scaled_dot_product_attention):
    return right(q, k, v, is_causal=is_causal, scale=1.0)


@pytest.mark.parametrize("place, mutant", [
    ("rotate", rotate_neighbours), ("rotate", rotate_wrong_pairs),
    ("F.scaled_dot_product_attention", attention_without_mask),
    ("F.scaled_dot_product_attention", attention_without_sqrt),
    ("F.silu", torch.nn.functional.gelu)])
def test_mutants_of_the_maths_are_caught(place, mutant, monkeypatch):
    """Other rotary pairs, no mask, no 1 / sqrt(D), another nonlinearity: the logits differ."""
    monkeypatch.setattr(f"model.{place}", mutant)
    with pytest.raises(AssertionError):    # measured: 0.2 to 2.4
        check_maths()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: run it on a machine with one"))])
def test_attention_is_the_flash_kernel(device):
    """Forward and backward run with PyTorch's flash kernel as the only attention allowed, in bf16
    on a GPU, so that no T x T matrix is ever stored."""
    model, tokens = tiny(n_embd=32).to(device), TOKENS.to(device)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), train.autocast(torch.device(device)):
        model(tokens, tokens)[1].backward()                 # raises where flash cannot be used


@pytest.mark.parametrize("gain", ["vector", "scalar", "frozen"])
def test_norm_ignores_the_scale_of_its_input(gain):
    """RMSNorm's output has RMS 1 for an input of any size, until a gain is learned."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    rms = RMSNorm(16, gain)(torch.tensor([1.0, 10, 1e3, 1e6, 1e9])[:, None] * x).square().mean(-1)
    torch.testing.assert_close(rms, torch.ones(5), rtol=1e-5, atol=0)  # eps = 1e-6 shows at size 1


def test_loss_is_the_mean_cross_entropy():
    """The loss is the mean of -log p(target) over all tokens of the batch, in nats."""
    targets = TOKENS.roll(-1, 1)
    logits, loss = randomise(tiny())(TOKENS, targets)
    log_p = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    want = -log_p.gather(-1, targets[..., None]).mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)         # measured: 4e-8


# ---------------------------------------------------------------- time: causality and positions


def check_causality():
    model = randomise(tiny())
    logits = model(TOKENS)[0]
    for t in range(8):
        changed = TOKENS.clone()
        changed[:, t] = (changed[:, t] + 1) % 17
        same = (model(changed)[0] == logits).all(-1)                   # (B, T)
        assert same[:, :t].all() and not same[:, t:].any()


def test_no_token_sees_the_future():
    """Another token at position t changes the logits from t on, and no bit before it."""
    check_causality()


def test_mutant_missing_mask_is_caught(monkeypatch):
    """Attention without its causal mask lets the future through."""
    monkeypatch.setattr("model.F.scaled_dot_product_attention", attention_without_mask)
    with pytest.raises(AssertionError):
        check_causality()


def check_positions_are_relative():
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cos, sin = rotary_table(64, 16)
    Q, K = (model_py.rotate(x.expand(1, 1, 64, 16), cos, sin)[0, 0] for x in (q, k))   # (T, D)
    scores = Q @ K.T
    by_distance = [scores.diagonal(-distance) for distance in range(64)]
    for d in by_distance:
        assert (d - d.mean()).abs().max() < 1e-5                       # measured: 2e-6
    means = torch.stack([d.mean() for d in by_distance])
    assert (means[1:] - means[0]).abs().min() > 1e-2                   # and on it they do depend
    assert torch.allclose(Q.norm(dim=-1), q.norm(), rtol=1e-6)         # a rotation


def test_scores_depend_on_the_distance_alone():
    """The same query and key have the same product wherever they stand, if equally far apart."""
    check_positions_are_relative()


def test_mutant_wrong_rotary_pairs_are_caught(monkeypatch):
    """Neighbours turned by the angles of the two halves fail: no distance, not even a rotation."""
    monkeypatch.setattr("model.rotate", rotate_wrong_pairs)
    with pytest.raises(AssertionError):    # measured: 8
        check_positions_are_relative()


# ---------------------------------------------------------------- text


def generate(model, new_tokens=12, prompt=TOKENS[:, :3], seed=0, **settings):
    return model.generate(prompt, new_tokens, generator=torch.Generator().manual_seed(seed),
                          **settings)


@pytest.fixture
def talker():
    """A tiny model that has opinions: its head is 50 times larger than at the start."""
    model = randomise(tiny(block_size=6))
    model.head.weight.data *= 50
    return model


def test_greedy_is_argmax_step_by_step(talker):
    """Temperature 0 appends the likeliest token, given the last block_size tokens and no others."""
    want = TOKENS[:, :3]
    for _ in range(12):                    # 15 tokens in the end, of which the model sees 6
        new = talker(want[:, -6:])[0][:, -1].argmax(-1, keepdim=True)
        want = torch.cat((want, new), dim=1)
    assert torch.equal(generate(talker, temperature=0), want)


def test_top_1_is_greedy(talker):
    """top_k = 1 leaves one token to draw: the likeliest."""
    assert torch.equal(generate(talker, top_k=1), generate(talker, temperature=0))


def test_only_the_last_block_size_tokens_count(talker):
    """Of two prompts that differ only before their last block_size tokens, the text is the same."""
    longer = torch.cat((torch.zeros_like(TOKENS), TOKENS), dim=1)
    texts = [generate(talker, prompt=prompt)[:, -12:] for prompt in (TOKENS, longer)]
    assert torch.equal(*texts)


def test_the_generator_decides_the_text(talker):
    """The same generator draws the same text, another seed another one."""
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
    # 4 standard deviations, and 2 more where so few are expected that these mean nothing
    assert ((count - n * p).abs() <= 4 * (n * p * (1 - p)).sqrt() + 2).all()


# ---------------------------------------------------------------- FLOPs, gradients, configurations

SMALL = dict(vocab_size=10, block_size=4, n_layer=2, n_head=2, n_embd=8)


@EACH_MULTIPLIERS
def test_flops_by_hand(multipliers):
    """flops_per_token is a count by hand, in which multipliers, on weights alone, do not appear."""
    # C = 8, hidden = 32: q, k, v, out have 64 entries each, gate, up, down 256, the head 80
    entries = 2 * (4 * 64 + 3 * 256) + 80
    # 2 layers; the scores take 2 C FLOPs for each of T = 4 keys, so do the values; backward twice
    attention = 2 * 3 * (2 * 8 * 4 + 2 * 8 * 4)
    assert tiny(**SMALL, multipliers=multipliers).flops_per_token() == 6 * entries + attention


def test_flops_against_torchs_counter():
    """A full context costs flops_per_token per token by torch's count: a third of it forward."""
    model, tokens = tiny(**SMALL), torch.tensor([[1, 2, 3, 4]])
    counts = []
    with sdpa_kernel(SDPBackend.MATH):     # the fused CPU attention is not in torch's table
        with FlopCounterMode(display=False) as counter:
            loss = model(tokens, tokens)[1]
        counts.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        counts.append(counter.get_total_flops())
    per_token = [count / 4 for count in counts]
    assert per_token == [model.flops_per_token() / 3, model.flops_per_token() * 2 / 3]


@pytest.mark.parametrize("final_gain", CHOICES["final_gain"])
@EACH_PLACEMENT
@EACH_MULTIPLIERS
def test_every_parameter_gets_a_gradient(multipliers, placement, final_gain):
    """No parameter is left out of the graph: the loss has a gradient, not zero, for each."""
    model = randomise(tiny(multipliers=multipliers, placement=placement, final_gain=final_gain))
    model(TOKENS, TOKENS.roll(-1, 1))[1].backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.norm() > 0, name


@EACH_PLACEMENT
@EACH_MULTIPLIERS
def test_merged_weights_load_into_a_plain_model(multipliers, placement):
    """The state dict of a merged model is that of a GPT without multipliers, and works there."""
    model = randomise(tiny(multipliers=multipliers, placement=placement))
    plain = tiny(multipliers="none", seed=1)
    plain.load_state_dict(merge(model).state_dict())
    # measured: 0; allowed: a few units in the last place of logits of size 0.1
    torch.testing.assert_close(plain(TOKENS)[0], model(TOKENS)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("final_gain, block_gains", list(itertools.product(
    CHOICES["final_gain"], CHOICES["block_gains"])))
def test_gain_modes(final_gain, block_gains):
    """A gain is a vector [C], one number [], or no parameter at all where it is frozen at 1."""
    model = tiny(final_gain=final_gain, block_gains=block_gains)
    gains = {name: p.shape for name, p in model.named_parameters() if name.endswith("gain")}
    final = {"vector": {"final_norm.gain": (16,)}, "scalar": {"final_norm.gain": ()}, "frozen": {}}
    inside = {f"blocks.{i}.{part}_norm.gain": (16,) for i in (0, 1) for part in ("attn", "mlp")}
    assert gains == final[final_gain] | (inside if block_gains == "vector" else {})


@pytest.mark.parametrize("bad, words", [
    ({"multipliers": "both"}, "multipliers must be one of none, scalar, vector, not 'both'"),
    ({"placement": "some"}, "placement must be one of all, symmetry_free, mlp, not 'some'"),
    ({"final_gain": None}, "final_gain must be one of vector, scalar, frozen, not None"),
    ({"block_gains": "scalar"}, "block_gains must be one of vector, frozen, not 'scalar'"),
    ({"n_layer": 0}, "n_layer must be at least 1, not 0"),
    ({"vocab_size": -1}, "vocab_size must be at least 1, not -1"),
    ({"n_embd": 100, "n_head": 3}, "n_embd 100 must be divisible by n_head 3"),
    ({"n_embd": 12, "n_head": 4}, "heads of even width")])
def test_bad_configurations_are_one_clear_sentence(bad, words):
    """A bad setting is a ValueError that names the setting, its value and what is allowed."""
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{"vocab_size": 17, **bad})


def test_too_long_a_sequence_is_an_error():
    """More than block_size tokens are a ValueError that gives both numbers."""
    with pytest.raises(ValueError, match="9 tokens, but block_size is 8"):
        tiny()(torch.zeros(1, 9, dtype=torch.long))
