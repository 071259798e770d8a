"""The numbers that the interview of lesson 07 speaks of, each computed here from its definition or by a few lines."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmcourse import sizing
from llmcourse.counting import TensorWork
from llmcourse.interview_source import read_interview

PATH = Path(__file__).parents[2] / "solutions" / "07_optimizers" / "interview.toml"
CONFIG = sizing.PUBLIC_CONFIGS["Llama-3.1-8B"]
COUNT = sizing.parameter_breakdown(CONFIG)
LINEAR = COUNT.attention + COUNT.mlp
HIDDEN, INNER, LAYERS, VOCABULARY = 4096, 14_336, 32, 128_256
KEYS = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
TOKENS = 8192  # of a batch, as the interview says


def gb(count: float) -> float:
    return round(count / 1e9, 1)


def adam_steps(
    gradients: Tensor,
    *,
    rate: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Tensor:
    """What Adam subtracts, for gradients [steps, ...] that do not depend on the weights: [steps, ...]."""
    m, v, found = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0]), []
    for t, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        found.append(rate * m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps))
    return torch.stack(found)


# ------------------------------------------------------------------------------------------------------- the file


def test_the_file_is_read_and_every_text_has_its_chinese() -> None:
    interview = read_interview(PATH)
    texts = [interview.question, interview.frequency, interview.one_minute, interview.five_minutes]
    texts += [part for step in interview.followups for part in (step.question, step.strong, step.weak)]
    texts += [line.criterion for line in interview.rubric]
    assert len(interview.followups) >= 5 and sum(line.points for line in interview.rubric) == 10
    for text in texts:
        assert text.zh != text.en and any("\u4e00" <= sign <= "\u9fff" for sign in text.zh), text.en
    raw = PATH.read_text(encoding="utf-8")
    assert not set(raw) & set("!！—–…") and tomllib.loads(raw)


# --------------------------------------------------------------------------------------------- sizes and operations


def test_memory_of_training() -> None:
    assert (CONFIG["hidden_size"], CONFIG["intermediate_size"]) == (HIDDEN, INNER)
    assert (CONFIG["num_hidden_layers"], CONFIG["vocab_size"]) == (LAYERS, VOCABULARY)
    assert 2 + 2 + 4 + 4 + 4 == 16 and gb(16 * COUNT.total) == 128.5 and gb(2 * COUNT.total) == 16.1
    assert round(COUNT.total / 1e9, 2) == 8.03 and gb(4 * COUNT.total) == 32.1
    eighth = 2 + 2 + 4 + 2 * (1 + 4 / 256)
    assert round(eighth, 2) == 10.03 and gb(eighth * COUNT.total) == 80.6
    assert round(4 + 12 / 64, 2) == 4.19 and gb((4 + 12 / 64) * COUNT.total) == 33.6
    assert gb(80e9 - 16 * COUNT.total) < 0 < gb(80e9 - 2 * COUNT.total)


def test_operations_of_a_token() -> None:
    used = COUNT.total - COUNT.embedding  # the embedding is a look-up
    assert round(used / 1e9, 2) == 7.50 and round(6 * used / 1e9) == 45
    assert 2 + 4 == 6 and pytest.approx(4 / 3) == (2 + 2 + 4) / 6  # forward, backward; and the forward again
    assert round(math.log(VOCABULARY), 2) == 11.76


def test_logits_of_a_batch() -> None:
    assert gb(4 * TOKENS * VOCABULARY) == 4.2 and round(4 * 1024 * VOCABULARY / 1e9, 2) == 0.53
    assert gb(2 * 4 * TOKENS * VOCABULARY) == 8.4


def saved_values(run: Callable[[], Tensor], weights: list[nn.Parameter]) -> int:
    """Values that autograd keeps for the backward pass, storages once; weights and numbers a token left out."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-1] > 1 and tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run().sum()
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


def test_activations_of_a_layer() -> None:
    """A layer keeps two tensors at each norm, q, k, v and what attention gives, and four of the gated MLP."""
    torch.manual_seed(0)
    tokens, hidden, inner, heads = 12, 32, 56, 4
    keys = hidden  # as many heads as queries have
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    weights = [nn.Parameter(torch.randn(*shape) / 8) for shape in shapes]
    q, k, v, o, gate, up, down = weights
    x = torch.randn(tokens, hidden, requires_grad=True)

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, hidden // heads)).transpose(0, 1)[None]

    def layer() -> Tensor:
        n = norm(x)
        mixed = F.scaled_dot_product_attention(split(n @ q.T), split(n @ k.T), split(n @ v.T), is_causal=True)
        y = x + mixed[0].transpose(0, 1).flatten(1) @ o.T
        n = norm(y)
        return y + (F.silu(n @ gate.T) * (n @ up.T)) @ down.T

    kept = saved_values(layer, weights) / tokens
    rows = 6 * hidden + 2 * keys + 4 * inner
    assert rows <= kept <= rows + 2 * heads  # where attention is fused, it keeps a number a head and token
    of_a_layer = 2 * TOKENS * (6 * HIDDEN + 2 * KEYS + 4 * INNER)  # bfloat16
    assert gb(LAYERS * of_a_layer) == 44.0 and gb(of_a_layer) == 1.4
    assert gb(LAYERS * 2 * TOKENS * HIDDEN) == 2.1


def test_lora_parameters_bytes_and_operations() -> None:
    shapes = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, KEYS), "v": (HIDDEN, KEYS), "o": (HIDDEN, HIDDEN)}
    attention = LAYERS * sum(16 * (a + b) for a, b in shapes.values())
    everywhere = attention + LAYERS * 16 * 3 * (HIDDEN + INNER)
    assert (attention, everywhere) == (13_631_488, 41_943_040)
    assert sum(a * b for a, b in shapes.values()) * LAYERS == COUNT.attention
    assert round(100 * everywhere / COUNT.total, 1) == 0.5
    # float32 A and B: 4 for the weight, 4 for the gradient, 8 for the moments
    assert round(16 * everywhere / 1e9, 2) == 0.67 and gb(2 * COUNT.total + 16 * everywhere) == 16.7
    four_bit = LINEAR * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * (COUNT.total - LINEAR)
    assert gb(four_bit) == 5.7
    assert round((2 + 2) / 6, 2) == 0.67  # no gradient of the frozen weights
    assert round(4 * HIDDEN * INNER / 1e6) == 235  # B A of one layer, made dense in float32


def test_lora_moves_b_first() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(8, 6), torch.randn(5, 6)
    for a, b, moved in (
        (torch.randn(2, 6), torch.zeros(5, 2), "b"),
        (torch.zeros(2, 6), torch.zeros(5, 2), ""),
    ):
        a, b = a.requires_grad_(), b.requires_grad_()
        y = x @ w.T + x @ a.T @ b.T
        assert torch.equal(y, x @ w.T)
        y.square().sum().backward()
        assert bool(a.grad.any()) == ("a" in moved) and bool(b.grad.any()) == ("b" in moved)


# --------------------------------------------------------------------------------------------- backward and the loss


def test_a_directional_derivative_checks_all_parameters_at_once() -> None:
    """(L(w + hd) - L(w - hd)) / 2h against <gradient, d>, by hand, at h = 1e-5 and in both precisions."""
    errors: dict[torch.dtype, list[float]] = {torch.float64: [], torch.float32: []}
    for seed in range(20):
        for dtype, found in errors.items():
            torch.manual_seed(seed)
            x = torch.randn(4, 6, 24, dtype=torch.float64).to(
                dtype
            )  # leading dimensions, and no square layer
            w, d = (torch.randn(40, 24, dtype=torch.float64).to(dtype) for _ in range(2))

            def loss(w: Tensor, x: Tensor = x) -> Tensor:
                return (x @ w.T).sigmoid().square().mean()

            s = (x @ w.T).sigmoid()
            g = 2 * s * s * (1 - s) / s.numel()  # dL/dy
            gradient = g.flatten(0, 1).T @ x.flatten(0, 1)
            wanted = (gradient.double() * d.double()).sum().item()
            numeric = (loss(w + 1e-5 * d) - loss(w - 1e-5 * d)).item() / 2e-5
            found.append(abs(numeric - wanted) / gradient.double().norm().item())
    medians = {dtype: sorted(found)[10] for dtype, found in errors.items()}
    # float64 rounds L at 1e-16, and 1e-16 / 1e-5 = 1e-11 of an L of 0.3 beside a gradient of 0.01 leaves 1e-9
    assert medians[torch.float64] < 2e-9 and medians[torch.float32] == pytest.approx(0.06, abs=0.04)


def test_an_rms_norm_s_gradient_is_orthogonal_to_its_input() -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(7, 33, dtype=torch.float64)).requires_grad_()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True))
    g = torch.randn_like(y)
    y.backward(g)
    constant = g * torch.rsqrt(x.detach().square().mean(-1, keepdim=True))  # the mistake
    size = x.detach().norm(dim=-1) * x.grad.norm(dim=-1)
    assert ((x.detach() * x.grad).sum(-1).abs() < 1e-12 * size).all()
    assert ((x.detach() * constant).sum(-1).abs() > 1e-3 * size).all()


def test_ten_steps_on_noise() -> None:
    """Two linear layers, 10 to 20 to 5, batches of 32, rate 0.01, targets that no input tells of; 600 runs."""
    torch.manual_seed(0)
    runs = 600

    def drawn(*shape: int, inputs: int) -> Tensor:  # as nn.Linear starts
        return (2 * torch.rand(runs, *shape) - 1) / math.sqrt(inputs)

    w1, b1 = drawn(10, 20, inputs=10), drawn(1, 20, inputs=10)
    w2, b2 = drawn(20, 5, inputs=20), drawn(1, 5, inputs=20)

    def expected() -> float:  # over inputs and targets: their variance 1, and the mean square of the outputs
        outputs = (w1 @ w2).square().sum(1) + (b1 @ w2 + b2)[:, 0].square()
        return 1 + float(outputs.mean())

    losses, ideal = [], []
    for _ in range(10):
        ideal.append(expected())
        x, y = torch.randn(runs, 32, 10), torch.randn(runs, 32, 5)
        h = torch.baddbmm(b1, x, w1)
        error = torch.baddbmm(b2, h, w2) - y
        losses.append(error.square().mean((1, 2)))
        g = error * (2 / 160)
        back = g @ w2.mT
        w2 -= 0.01 * h.mT @ g
        b2 -= 0.01 * g.sum(1, keepdim=True)
        w1 -= 0.01 * x.mT @ back
        b1 -= 0.01 * back.sum(1, keepdim=True)
    hidden = 10 / 30 + 1 / 30  # the variance of a uniform draw in +-1/sqrt(n) is 1 / 3n
    assert round(1 + 20 * hidden / 60 + 1 / 60, 2) == 1.14 == pytest.approx(ideal[0], abs=0.01)
    assert ideal[0] - ideal[-1] == pytest.approx(0.015, abs=0.001)
    # 600 runs: standard errors are 0.13 / sqrt(1200) = 0.004 and sqrt(0.25 / 600) = 0.02
    assert losses[0].std().item() == pytest.approx(0.13, abs=0.012)
    assert (losses[-1] > losses[0]).float().mean().item() == pytest.approx(0.47, abs=0.06)


def test_cross_entropy_in_chunks() -> None:
    """By tokens, with the gradient in the same pass: what autograd finds with all logits at once, masks included."""
    torch.manual_seed(0)
    x = torch.randn(37, 12, dtype=torch.float64, requires_grad=True)
    w = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(50, (37,))
    targets[::4] = -100
    wanted = F.cross_entropy(x @ w.T, targets, ignore_index=-100)
    wanted.backward()
    total, count = 0.0, int((targets != -100).sum())
    grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(w)
    with torch.no_grad():
        for at in range(0, 37, 8):
            rows, labels = x[at : at + 8], targets[at : at + 8]
            valid = labels != -100
            logits = rows[valid] @ w.T
            places = torch.arange(len(logits)), labels[valid]
            highest = logits.amax(1, keepdim=True)
            p = (logits - highest).exp()
            total += float((p.sum(1).log() + highest[:, 0] - logits[places]).sum())
            p /= p.sum(1, keepdim=True)
            p[places] -= 1
            grad_x[at : at + 8][valid] = p @ w / count
            grad_w += p.T @ rows[valid] / count
    # float64, sums of about 2,000 terms of order 1
    assert total / count == pytest.approx(wanted.item(), rel=1e-12)
    torch.testing.assert_close((grad_x, grad_w), (x.grad, w.grad), rtol=1e-10, atol=1e-12)


def test_a_mean_of_means_weighs_short_micro_batches_more() -> None:
    torch.manual_seed(0)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    long, short = torch.randn(900, 6, dtype=torch.float64), torch.randn(100, 6, dtype=torch.float64) + 1

    def losses(x: Tensor) -> Tensor:
        return (x @ w - 1).square()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, w)[0]

    whole = gradient(losses(torch.cat([long, short])).mean())
    right = sum(gradient(losses(part).sum() / 1000) for part in (long, short))
    means = sum(gradient(losses(part).mean() / 2) for part in (long, short))
    torch.testing.assert_close(right, whole)
    assert (means - whole).norm() > 0.1 * whole.norm()
    assert round((1 / 2 / 100) / (1 / 2 / 900), 12) == 9
    assert round((2.0 + 4.0) / 2, 1) == 3.0 and round((900 * 2.0 + 100 * 4.0) / 1000, 1) == 2.2
    # two ranks whose gradients are averaged: each divides by the tokens of all, and multiplies by the ranks
    ranks = [gradient(2 * losses(part).sum() / 1000) for part in (long, short)]
    torch.testing.assert_close((ranks[0] + ranks[1]) / 2, whole)


# ----------------------------------------------------------------------------------------------------------- Adam


def test_adam_s_first_step_is_the_sign() -> None:
    g = torch.tensor([[1e-6, -1e-2, 1.0, 1e4, 1e-8, -1e-8]], dtype=torch.float64)
    moved = adam_steps(g, rate=1e-3)[0] / 1e-3
    assert moved[:4].tolist() == pytest.approx([1, -1, 1, 1], rel=0.01)  # eps is a hundredth of the smallest
    assert moved[4:].tolist() == pytest.approx([0.5, -0.5])
    steps = torch.randn(30, 100, dtype=torch.float64)
    torch.testing.assert_close(adam_steps(steps, eps=0), adam_steps(50 * steps, eps=0))


def test_early_steps_on_noise_are_the_large_ones() -> None:
    """Root mean square of the step, in rates, where the gradient is white noise; 4,000 weights."""
    torch.manual_seed(0)
    steps = adam_steps(torch.randn(60, 4000), betas=(0.9, 0.999)).square().mean(1).sqrt()
    # m's variance (1 - b1) (1 - b1^2t) / ((1 + b1) (1 - b1^t)^2) over v's mean, which is 1 by its correction
    law = [math.sqrt(0.1 / 1.9 * (1 - 0.9 ** (2 * t)) / (1 - 0.9**t) ** 2) for t in (1, 10, 60)]
    assert [round(value, 2) for value in law] == [1.0, 0.33, 0.23]
    # 4,000 weights: a root mean square has a standard error of 1 / sqrt(8000) = 1.1 %
    assert steps[[0, 9, 59]].tolist() == pytest.approx(law, rel=0.045)
    usual = adam_steps(torch.randn(100, 4000), betas=(0.9, 0.95))[-1]
    assert usual.square().mean().sqrt().item() == pytest.approx(0.23, rel=0.06)
    # sign(gradient) of one token is sign(g) sign(x)': it moves every output of that token by rate times sum |x|
    x = torch.randn(4096)
    moved = float(3e-4 * torch.outer(torch.randn(3).sign(), x.sign())[0] @ x)
    assert abs(moved) == pytest.approx(
        3e-4 * 4096 * math.sqrt(2 / math.pi), rel=0.05
    )  # 4 of sqrt(pi / 2 - 1) / 64
    assert round(3e-4 * 4096 * math.sqrt(2 / math.pi), 1) == 1.0


def decayed(noise: Tensor, *, in_the_gradient: bool) -> Tensor:
    """Weights of 1.0 after Adam at 0.001 with decay 0.1, fed with this noise [steps, ...]."""
    p, m, v = (torch.full_like(noise[0], start) for start in (1.0, 0.0, 0.0))
    for t, g in enumerate(noise, 1):
        if in_the_gradient:
            g = g + 0.1 * p
        else:
            p = p * (1 - 1e-3 * 0.1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - 1e-3 * m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return p


def test_decay_in_the_gradient_and_beside_it() -> None:
    sizes = torch.tensor([1e-3, 1.0])
    torch.manual_seed(0)
    one = torch.stack([torch.randn(2) for _ in range(200)]) * sizes
    assert decayed(one, in_the_gradient=False).tolist() == pytest.approx([0.990, 0.966], abs=5e-4)
    assert decayed(one, in_the_gradient=True).tolist() == pytest.approx([0.808, 0.966], abs=5e-4)
    many = torch.randn(200, 1000, 2) * sizes
    beside, inside = (decayed(many, in_the_gradient=mixed) for mixed in (False, True))
    assert round((1 - 1e-3 * 0.1) ** 200, 3) == 0.980
    # the walk scatters by 0.015; 1,000 draws have the mean to 0.0005
    assert beside.mean(0).tolist() == pytest.approx([0.980, 0.980], abs=0.002)
    assert beside.std(0).tolist() == pytest.approx([0.015, 0.015], abs=0.0015)
    assert inside.mean(0).tolist() == pytest.approx([0.808, 0.980], abs=0.002)
    # a history of zeros: only the decoupled decay moves the weight
    assert pytest.approx(10_000) == 1 / (1e-3 * 0.1)


def test_one_loud_gradient() -> None:
    """A gradient beyond all before it: its step in rates is (1 - b1) / sqrt(1 - b2), late in a run."""
    assert round(0.1 / math.sqrt(0.001), 1) == 3.2 and round(0.1 / math.sqrt(0.05), 2) == 0.45
    for b2, wanted in ((0.999, 3.16), (0.95, 0.447)):
        m, v = 0.0, 1.0  # long after the start, on noise of size 1
        m, v = 0.9 * m + 0.1 * 1e6, b2 * v + (1 - b2) * 1e12
        assert m / math.sqrt(v) == pytest.approx(wanted, rel=0.01)
    # all gradients of a step by one factor: the norm over all tensors is what is cut
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert math.hypot(a.norm(), b.norm()) == 5


# ------------------------------------------------------------------------------------------------- narrow numbers


def test_bfloat16_weights_stand_still() -> None:
    one = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        one = one + 0.001
    assert one.item() == 1.0
    near = torch.tensor([1 + 2**-8, 1 + 2**-8 + 2**-16, 1 - 2**-9, 1 - 2**-9 - 2**-17], dtype=torch.float64)
    assert near.to(torch.bfloat16).tolist() == [1.0, 1 + 2**-7, 1.0, 1 - 2**-8]
    assert round(100 * 2**-8, 1) == 0.4 and round(100 * 2**-9, 1) == 0.2
    small = torch.tensor(0.02, dtype=torch.bfloat16)
    assert small + 6e-5 == small and small + 6.2e-5 != small and round(2**-14, 6) == 6.1e-5
    mean = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(1000):
        mean = mean * 0.999  # a second moment that should fall to 0.37
    assert mean.item() == 1.0 and round(0.999**1000, 2) == 0.37


def test_rounding_by_chance_and_kahan_arrive() -> None:
    torch.manual_seed(0)
    weights = torch.ones(2000)
    for _ in range(1000):  # to one of the two neighbours, by chance: 16 random bits below the last, then cut
        bits = (weights + 0.001).view(torch.int32) + torch.randint(2**16, (2000,), dtype=torch.int32)
        weights = (bits & ~0xFFFF).view(torch.float32)
    # a step rounds by 2^-7 with chance p = 0.128: 1,000 of them scatter by 2^-7 sqrt(1000 p (1 - p)) = 0.083
    assert round(2**-7 * math.sqrt(1000 * 0.128 * 0.872), 2) == 0.08
    assert weights.mean().item() == pytest.approx(2.0, abs=4 * 0.083 / math.sqrt(2000))
    assert weights.std().item() == pytest.approx(0.083, abs=0.006)
    total, lost = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(1000):
        step = lost + 0.001
        new = total + step
        total, lost = new, step - (new - total)
    assert total.item() == pytest.approx(2.0, abs=0.02)


def test_float16_needs_a_scale() -> None:
    assert torch.finfo(torch.float16).max == 65_504 and torch.tensor(1e-8).half() == 0
    assert torch.tensor(1e-8 * 65_536).half() > 0 and torch.tensor(1e-8).bfloat16() > 0
    assert f"{2**-24:.0e}" == "6e-08" and torch.tensor(2.0**-24).half() == 2**-24


def test_a_linear_code_for_the_second_moment() -> None:
    """Codes 0 to 255 over a block's largest v: a gradient 23 times smaller has v = 0, and its step is m / eps."""
    v = torch.tensor([1.0, 1 / 22.0, 1 / 23.0, 0.01], dtype=torch.float64).square()
    kept = (v / v.max() * 255).round() / 255 * v.max()
    assert kept[1] > 0 and kept[2:].tolist() == [0, 0] and round(math.sqrt(510), 1) == 22.6
    assert round(0.01 / (math.sqrt(kept[3]) + 1e-8)) == 1_000_000
    assert round((1 + 4 / 256) / 4, 3) == 0.254
    assert INNER + HIDDEN == 18_432 and round(INNER * HIDDEN / 1e6, 1) == 58.7  # Adafactor, of one matrix


# ----------------------------------------------------------------------------------------------------------- Muon


def orthogonalized(x: Tensor, steps: int = 5) -> Tensor:
    x = x / x.norm()
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muon_s_polynomial_and_what_it_costs() -> None:
    s = torch.logspace(math.log10(0.003), 0, 20_000, dtype=torch.float64)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert s.min() >= 0.68 and s.max() <= 1.21
    m, batch = 24, 40
    for wide in (m, 3 * m):
        with TensorWork() as work:
            orthogonalized(torch.randn(m, wide))
        assert work.flops == 5 * (2 * m * m * wide + 2 * m**3 + 2 * m * m * wide)
        share = work.flops / (6 * m * wide * batch)
        assert share == pytest.approx(5 * m / batch) if wide == m else share < 5 * m / batch
    assert round(100 * 5 * 4096 / 4e6, 1) == 0.5 and round(100 * 5 * 256 / 4096) == 31
    rest = COUNT.total - LINEAR
    assert gb(4 * LINEAR + 8 * rest) == 36.3 and gb(8 * COUNT.total) == 64.2


def test_muon_keeps_singular_vectors_and_needs_the_whole_matrix() -> None:
    torch.manual_seed(0)
    g = torch.randn(64, 64, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(g)
    turned = u.T @ orthogonalized(g) @ vt.T
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-9
    large = turned.diagonal()[s >= 0.003 * s.norm()]
    assert large.min() >= 0.68 and large.max() <= 1.21
    whole, halves = orthogonalized(g), torch.cat([orthogonalized(half) for half in g.split(32)])
    assert ((halves - whole).norm() / whole.norm()).item() == pytest.approx(0.54, abs=0.03)
    # of m x n with orthogonal rows the root mean square is 1 / sqrt(max(m, n)); 0.2 sqrt(max) makes it 0.2
    wide, _ = torch.linalg.qr(torch.randn(96, 32, dtype=torch.float64))
    assert wide.square().mean().sqrt().item() == pytest.approx(1 / math.sqrt(96))
