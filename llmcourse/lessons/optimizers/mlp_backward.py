"""The backward pass of a pre-norm gated MLP block, written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcourse.counting import TensorWork, saved_bytes
from llmcourse.exercise import alternative, case, cost, exercise, mistake, raised

Gradients = tuple[Tensor, dict[str, Tensor]]


@exercise(
    points=4,
    minutes=15,
    forbid=(
        "torch.autograd.grad",
        "torch.autograd.backward",
        "torch.Tensor.backward",
        "torch.autograd.functional.vjp",
        "torch.autograd.functional.jacobian",
        "torch.autograd.graph._engine_run_backward",
        "torch.autograd.Variable._execution_engine",
        "torch.ops.aten._backward",
        "torch._C._ImperativeEngine",
        "torch.func.grad",
        "torch.func.vjp",
        "torch.func.jacrev",
        "torch.func.jacfwd",
    ),
    hints=(
        "Flatten x and grad_y to [tokens, width], run the forward down to h, then walk back line by line. Of y = h W^T "
        "h gets g W and W gets g^T h: the shapes leave no other choice. What is used twice gets a sum of gradients.",
        "The RMS depends on every value of its token. With z = x r, r = 1 / RMS, the change of r takes away from r dz "
        "the part of it that lies along z: a mean over the width, a number for each token.",
    ),
)
def mlp_backward(
    x: Tensor, weights: dict[str, Tensor], grad_y: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of a gated MLP block, by hand; about 25 lines.

    The block, for every token of x [..., width]:

        z = x / sqrt(mean(x^2 over the width) + eps)       RMSNorm
        n = z * gain
        a = n @ gate.T,  u = n @ up.T                      [..., hidden]
        h = silu(a) * u,  silu(a) = a * sigmoid(a)
        y = x + h @ down.T + bias

    weights holds "gain" [width], "gate" [hidden, width], "up" [hidden, width], "down"
    [width, hidden] and "bias" [width]. grad_y [..., width] is dL/dy for a loss L that is a
    number; a 1/N of that loss is already in it.

    Returns dL/dx, of the shape of x, and a dict with dL/dw for every name in weights, each
    of its weight's shape. x may have any leading dimensions, none ([width]) and empty ones
    included; without tokens the gradients of the weights are 0. All tensors are float32 or
    all are float64, and so are the results; none need be contiguous. Gates may be far from
    0: |a| of several hundred gives finite gradients.

    Nothing is kept from a forward pass: compute again what you need. No call of autograd,
    and no graph either, not even inside: x and weights may require gradients, results do
    not. Some cases run in torch.inference_mode(). ValueError where grad_y has not exactly
    the shape of x, also without tokens.

    For a quarter of the points: 8 products of T * width * hidden multiply-adds each, T
    tokens (2 of the forward again, 6 of the backward), with room for half a product; and no
    tensor made has more than twice the bytes of the largest of x, h and a weight matrix.
    """
    ### BEGIN SOLUTION
    if grad_y.shape != x.shape:
        raise ValueError(f"grad_y {list(grad_y.shape)}; expected the shape of x, {list(x.shape)}")
    gain, gate, up, down = (weights[name].detach() for name in ("gain", "gate", "up", "down"))
    tokens, g = (part.detach().reshape(-1, x.shape[-1]) for part in (x, grad_y))  # [T, width]

    inverse_rms = (tokens.square().mean(dim=1, keepdim=True) + eps).rsqrt()  # [T, 1]
    z = tokens * inverse_rms
    n = z * gain
    a, u = n @ gate.T, n @ up.T  # [T, hidden]
    open_share = a.sigmoid()
    activated = a * open_share

    grad_h = g @ down
    grad_u = grad_h * activated
    grad_a = grad_h * u * (open_share + activated * (1 - open_share))
    grad_n = grad_a @ gate + grad_u @ up
    grad_z = grad_n * gain
    along = (grad_z * z).mean(dim=1, keepdim=True)
    grad_x = g + inverse_rms * (grad_z - along * z)
    return grad_x.reshape(x.shape), {
        "gain": (grad_n * z).sum(dim=0),
        "gate": grad_a.T @ n,
        "up": grad_u.T @ n,
        "down": g.T @ (activated * u),
        "bias": g.sum(dim=0),
    }
    ### END SOLUTION


# ---------------------------------------------------------------------------------------------------------- cases


def a_block(rng, width, hidden, dtype=torch.float32):
    """Weights of a block; the gain is not 1 and the products keep the size of what they are given."""
    return {
        "gain": rng.uniform(0.4, 2.5, width, dtype=dtype),
        "gate": rng.normal(hidden, width, dtype=dtype) * 1.5 / width**0.5,
        "up": rng.normal(hidden, width, dtype=dtype) / width**0.5,
        "down": rng.normal(width, hidden, dtype=dtype) * 1.5 / hidden**0.5,
        "bias": rng.normal(width, dtype=dtype),
    }


def sizes(rng):
    """Width and hidden, always different."""
    return rng.integer(5, 8), rng.integer(9, 13)


def plain(found):
    """Both results in one dict: {"x": dL/dx, "gain": ..., ...}."""
    grad_x, gradients = found
    return {"x": grad_x, **gradients}


@case(mlp_backward)
def two_dimensions(answer, rng):
    """Tokens [tokens, width], with the usual eps and with a large one."""
    width, hidden = sizes(rng)
    tokens = rng.integer(3, 6)
    weights, eps = a_block(rng, width, hidden), rng.choice([0.3, 0.7])
    x, grad_y = rng.normal(tokens, width) * 1.7, rng.normal(tokens, width)
    return {
        "usual eps": plain(answer(x, weights, grad_y)),
        "large eps": plain(answer(x, weights, grad_y, eps=eps)),
    }


@case(mlp_backward)
def batches_of_sequences(answer, rng):
    """Tokens [batch, sequence, width]: the weights are shared by all of them."""
    width, hidden = sizes(rng)
    shape = rng.integer(2, 3), rng.integer(4, 5), width
    weights = a_block(rng, width, hidden)
    return plain(answer(rng.normal(*shape) * 0.6, weights, rng.normal(*shape), eps=1e-5))


@case(mlp_backward)
def square_and_narrow(answer, rng):
    """As many hidden units as the width, where no shape tells a matrix from its transpose, and fewer."""
    found = {}
    for less in (0, rng.integer(2, 3)):
        width = rng.integer(6, 8)
        weights, shape = a_block(rng, width, width - less), (rng.integer(3, 5), width)
        found[f"{less} fewer"] = plain(answer(rng.normal(*shape), weights, rng.normal(*shape), eps=1e-3))
    return found


@case(mlp_backward)
def other_leading_dimensions(answer, rng):
    """A single token [width], four dimensions, and no token at all."""
    width, hidden = sizes(rng)
    found = {}
    for name, leading in {"one": (), "four": (2, 3, 2), "none": (0,), "none in a batch": (2, 0)}.items():
        weights, shape = a_block(rng, width, hidden), (*leading, width)
        found[name] = plain(answer(rng.normal(*shape), weights, rng.normal(*shape), eps=1e-3))
    return found


@case(mlp_backward)
def loud_and_quiet_tokens(answer, rng):
    """Tokens from 1e-4 to 1e3, one of zeros, gradients from 1e-6 to 1e3: each token's gradient by itself."""
    width, hidden = sizes(rng)
    weights = a_block(rng, width, hidden)
    x = rng.normal(5, width) * torch.tensor([1e3, 30.0, 1e-2, 1e-4, 0.0])[:, None]
    grad_y = rng.normal(5, width) * torch.tensor([1e3, 1e-6, 1.0, 1e-3, 1e-6])[:, None]
    grad_x, gradients = answer(x, weights, grad_y, eps=rng.choice([1e-5, 1e-7]))
    return {
        "each token": list(grad_x),
        "weights": gradients,
        "usual eps": plain(answer(x[2:] / x[2].abs().amax() * 1e-3, weights, grad_y[2:])),
    }


@case(mlp_backward)
def gates_far_from_zero(answer, rng):
    """Gates that are fully open, fully closed and in between, as sums of one product each."""
    width, hidden = sizes(rng)
    weights = a_block(rng, width, hidden)
    gate = torch.zeros(hidden, width)
    gate[range(hidden), rng.integers(0, width - 1, hidden)] = 1
    weights["gate"] = gate * torch.where(rng.uniform(-1, 1, hidden, 1) > 0, 300, -400)
    x, grad_y = rng.normal(4, width), rng.normal(4, width)
    return plain(answer(x, weights, grad_y, eps=1e-5))


@case(mlp_backward)
def double_precision_and_views(answer, rng):
    """float64, then transposed tensors and the stride-0 gradient of a sum."""
    width, hidden = sizes(rng)
    tokens, eps = rng.integer(3, 5), 1e-5
    weights = a_block(rng, width, hidden, torch.float64)
    x, grad_y = rng.normal(tokens, width, dtype=torch.float64), rng.normal(tokens, width, dtype=torch.float64)
    turned = {
        name: part.T.contiguous().T if part.dim() > 1 else part
        for name, part in a_block(rng, width, hidden).items()
    }
    apart = rng.normal(width, tokens, 2).permute(2, 1, 0)
    return {
        "float64": plain(answer(x, weights, grad_y, eps=eps)),
        "views": plain(answer(apart, turned, rng.normal(tokens, 2, width).transpose(0, 1), eps=eps)),
        "of a sum": plain(answer(apart, turned, torch.tensor(rng.integer(1, 4) / 2).expand(apart.shape))),
    }


@case(mlp_backward)
def beside_autograd(answer, rng):
    """x and weights that require gradients: no graph; then in inference mode."""
    width, hidden = sizes(rng)
    weights = {name: torch.nn.Parameter(part) for name, part in a_block(rng, width, hidden).items()}
    x, grad_y = rng.normal(2, 3, width).requires_grad_(), rng.normal(2, 3, width)
    found = plain(answer(x, weights, grad_y, eps=1e-4))
    with torch.inference_mode():
        inside = plain(answer(x.detach() + 1, {k: w.detach() * 2 for k, w in weights.items()}, grad_y))
    return {
        "gradients": {name: part.detach() for name, part in found.items()},
        "with a graph": [name for name in sorted(found) if found[name].requires_grad],
        "given a .grad": [name for name, part in weights.items() if part.grad is not None],
        "inference mode": {name: part.clone() for name, part in inside.items()},
    }


@case(mlp_backward)
def nothing_kept_for_autograd(answer, rng):
    """Tensors that require no gradients: whether autograd records anything on the way."""
    width, hidden = sizes(rng)
    weights, x, grad_y = a_block(rng, width, hidden), rng.normal(3, width), rng.normal(3, width)
    with saved_bytes() as saved:
        found = plain(answer(x, weights, grad_y, eps=1e-4))
    return {"gradients": found, "autograd has kept tensors": saved.total_bytes > 0}


@case(mlp_backward)
def gradients_of_another_shape(answer, rng):
    """grad_y that broadcasts against x or has as many values is refused; beside them, one that fits."""
    width, hidden = sizes(rng)
    weights, x, grad_y = a_block(rng, width, hidden), rng.normal(2, 3, width), rng.normal(2, 3, width)
    others = {
        "one token": grad_y[0, 0],
        "one sequence": grad_y[0],
        "one step": grad_y[:, :1],
        "flattened": grad_y.reshape(6, width),
        "other order": grad_y.transpose(0, 1),
        "one more": grad_y[None],
        "one value": grad_y[..., :1],
    }
    without_tokens = {"one more, no token": rng.normal(0, width + 1), "a batch, no token": grad_y[:, :0]}
    return {
        "gradients": plain(answer(x, weights, grad_y, eps=0.1)),
        **{name: raised(answer, x, weights, other) for name, other in others.items()},
        **{name: raised(answer, x[0, :0], weights, other) for name, other in without_tokens.items()},
    }


@cost(mlp_backward, share=1 / 4)
def products_and_largest_tensor(answer, rng):
    """Multiply-adds of the matrix products, and the largest tensor made: few tokens, many, and a wide x."""
    found, products, largest, uncounted = [], 0.0, 0.0, set()
    for shape, width, hidden in [((2, 5), 24, 40), ((3, 20), 10, 17), ((4, 10), 30, 12)]:
        weights = a_block(rng, width, hidden)
        x, grad_y = rng.normal(*shape, width), rng.normal(*shape, width)
        with TensorWork(large_elements=64) as work:
            found.append(plain(answer(x, weights, grad_y, eps=1e-5)))
        tokens = shape[0] * shape[1]
        products = max(products, work.flops / (2 * tokens * width * hidden))
        values = max(tokens * width, tokens * hidden, width * hidden)
        largest = max(largest, work.largest_tensor_bytes / (4 * values))
        uncounted |= set(work.uncounted)
    return {
        "observed": found,
        # 8 of the reference, and sums over tokens or over the width written as products with a vector.
        "products": (products, 8.5),
        # 2: gate and up may be multiplied as one matrix.
        "largest tensor made, in sizes of x, h or a weight": (largest, 2),
        "operations without a count": (len(uncounted), 0),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Block:
    """A right answer in small steps; a mistake replaces one of them. All tensors are [T, ...] but in `backward`."""

    def refuse(self, x: Tensor, grad_y: Tensor) -> None:
        if x.shape != grad_y.shape:
            raise ValueError("shapes")

    def flat(self, part: Tensor) -> Tensor:
        return part.reshape(-1, part.shape[-1])

    def inverse_rms(self, x: Tensor, eps: float) -> Tensor:
        return 1 / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)

    def before_activation(self, n: Tensor, weight: Tensor) -> Tensor:
        return n @ weight.T

    def silu(self, a: Tensor) -> Tensor:
        return torch.nn.functional.silu(a)

    def slope(self, a: Tensor) -> Tensor:
        return torch.sigmoid(a) * (1 + a * torch.sigmoid(-a))

    def for_gate(self, grad_h: Tensor, a: Tensor, u: Tensor) -> Tensor:
        return grad_h * u * self.slope(a)

    def for_up(self, grad_h: Tensor, a: Tensor, u: Tensor) -> Tensor:
        return grad_h * self.silu(a)

    def for_n(self, by_gate: Tensor, by_up: Tensor) -> Tensor:
        return by_gate + by_up

    def for_z(self, grad_n: Tensor, gain: Tensor) -> Tensor:
        return grad_n * gain

    def through_norm(self, x: Tensor, r: Tensor, grad_z: Tensor) -> Tensor:
        return r * grad_z - x * r**3 * (grad_z * x).mean(-1, keepdim=True)

    def for_x(self, grad_y: Tensor, through_norm: Tensor) -> Tensor:
        return grad_y + through_norm

    def gain_gradient(self, grad_n: Tensor, x: Tensor, z: Tensor, n: Tensor, leading: torch.Size) -> Tensor:
        return (grad_n * z).sum(0)

    def weight_gradient(self, grad: Tensor, given: Tensor, leading: torch.Size) -> Tensor:
        return grad.T @ given

    def bias_gradient(self, grad_y: Tensor, leading: torch.Size) -> Tensor:
        return grad_y.sum(0)

    def inputs_of_products(self, z: Tensor, n: Tensor) -> Tensor:
        return n

    def inputs_of_down(self, a: Tensor, u: Tensor) -> Tensor:
        return self.silu(a) * u

    def backward(
        self, x: Tensor, weights: dict[str, Tensor], grad_y: Tensor, *, eps: float = 1e-6
    ) -> Gradients:
        with torch.no_grad():
            return self.steps(x, weights, grad_y, eps)

    def steps(self, x: Tensor, weights: dict[str, Tensor], grad_y: Tensor, eps: float) -> Gradients:
        self.refuse(x, grad_y)
        shape, leading = x.shape, x.shape[:-1]
        x, g = self.flat(x), self.flat(grad_y)
        r = self.inverse_rms(x, eps)
        z = x * r
        n = z * weights["gain"]
        a, u = (self.before_activation(n, weights[name]) for name in ("gate", "up"))
        grad_h = g @ weights["down"]
        grad_a, grad_u = self.for_gate(grad_h, a, u), self.for_up(grad_h, a, u)
        grad_n = self.for_n(grad_a @ weights["gate"], grad_u @ weights["up"])
        grad_z = self.for_z(grad_n, weights["gain"])
        grad_x = self.for_x(g, self.through_norm(x, r, grad_z))
        given = self.inputs_of_products(z, n)
        return grad_x.reshape(shape), {
            "gain": self.gain_gradient(grad_n, x, z, n, leading),
            "gate": self.weight_gradient(grad_a, given, leading),
            "up": self.weight_gradient(grad_u, given, leading),
            "down": self.weight_gradient(g, self.inputs_of_down(a, u), leading),
            "bias": self.bias_gradient(g, leading),
        }


def variant(**steps: Any) -> Callable[..., Gradients]:
    """An answer with some steps replaced."""
    return type("Variant", (Block,), steps)().backward


@mistake(
    mlp_backward,
    "Takes the RMS for a constant, so x gets grad_z / RMS: but each value of a token also changes the RMS that divides "
    "all of them.",
)
def rms_held_constant(*arguments, **options):
    return variant(through_norm=lambda self, x, r, grad_z: r * grad_z)(*arguments, **options)


@mistake(
    mlp_backward,
    "Sums over the width where the RMS is a mean: the correction comes out `width` times too large.",
)
def sum_for_mean_in_the_norm(*arguments, **options):
    def through_norm(self, x, r, grad_z):
        return r * grad_z - x * r**3 * (grad_z * x).sum(-1, keepdim=True)

    return variant(through_norm=through_norm)(*arguments, **options)


@mistake(
    mlp_backward,
    "Adds the correction of the norm, with the wrong sign: a longer token has a smaller 1 / RMS, so it is taken away.",
)
def correction_added(*arguments, **options):
    def through_norm(self, x, r, grad_z):
        return r * grad_z + x * r**3 * (grad_z * x).mean(-1, keepdim=True)

    return variant(through_norm=through_norm)(*arguments, **options)


@mistake(
    mlp_backward,
    "Has a power of 1 / RMS too few in the correction of the norm, which shows only where the RMS is not 1.",
)
def power_of_the_rms_missing(*arguments, **options):
    def through_norm(self, x, r, grad_z):
        return r * grad_z - x * r**2 * (grad_z * x).mean(-1, keepdim=True)

    return variant(through_norm=through_norm)(*arguments, **options)


@mistake(
    mlp_backward,
    "Takes the mean of the correction over all tokens: each token has an RMS of its own.",
)
def norm_over_all_tokens(*arguments, **options):
    def through_norm(self, x, r, grad_z):
        z = x * r
        return r * (grad_z - z * (grad_z * z).mean())

    return variant(through_norm=through_norm)(*arguments, **options)


@mistake(
    mlp_backward,
    "Uses the backward of LayerNorm, which also takes away the mean of the gradient; RMSNorm subtracts no mean.",
)
def backward_of_layernorm(*arguments, **options):
    def through_norm(self, x, r, grad_z):
        z = x * r
        return r * (grad_z - grad_z.mean(-1, keepdim=True) - z * (grad_z * z).mean(-1, keepdim=True))

    return variant(through_norm=through_norm)(*arguments, **options)


@mistake(mlp_backward, "Leaves eps out: quiet tokens are divided by less than the forward divided them by.")
def eps_left_out(*arguments, **options):
    def inverse_rms(self, x, eps):
        return 1 / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)

    return variant(inverse_rms=inverse_rms)(*arguments, **options)


@mistake(
    mlp_backward,
    "Adds eps to the RMS instead of to the mean square: sqrt(1e-6) is 1e-3, a thousand times more.",
)
def eps_outside_the_root(*arguments, **options):
    return variant(inverse_rms=lambda self, x, eps: 1 / (x.square().mean(-1, keepdim=True).sqrt() + eps))(
        *arguments, **options
    )


@mistake(mlp_backward, "Writes 1e-6 into the norm and ignores the eps it is given.")
def eps_ignored(x, weights, grad_y, *, eps=1e-6):
    return variant()(x, weights, grad_y)


@mistake(mlp_backward, "Clamps the RMS at eps instead of adding eps under the root.")
def eps_as_a_floor(*arguments, **options):
    def inverse_rms(self, x, eps):
        return 1 / x.square().mean(-1, keepdim=True).clamp_min(eps).sqrt()

    return variant(inverse_rms=inverse_rms)(*arguments, **options)


@mistake(
    mlp_backward,
    "Loses the residual: x is used twice, and the gradient through the norm overwrites grad_y instead of being added.",
)
def residual_overwritten(*arguments, **options):
    return variant(for_x=lambda self, grad_y, through_norm: through_norm)(*arguments, **options)


@mistake(
    mlp_backward,
    "Returns grad_y as the gradient of x: that is the residual alone, and x also reaches y through the norm.",
)
def only_the_residual(*arguments, **options):
    return variant(for_x=lambda self, grad_y, through_norm: grad_y.clone())(*arguments, **options)


@mistake(
    mlp_backward,
    "Adds the residual's gradient before the norm instead of after it, so grad_y goes through the norm's backward too.",
)
def residual_through_the_norm(x, weights, grad_y, *, eps=1e-6):
    block = Block()
    grad_x, found = block.backward(x, weights, grad_y, eps=eps)
    with torch.no_grad():
        flat, g = block.flat(x), block.flat(grad_y)
        extra = block.through_norm(flat, block.inverse_rms(flat, eps), g) - g
    return grad_x + extra.reshape(x.shape), found


@mistake(
    mlp_backward,
    "Sends back only the gate's gradient to n: n feeds gate and up, and both gradients have to be added.",
)
def only_the_gate_reaches_n(*arguments, **options):
    return variant(for_n=lambda self, by_gate, by_up: by_gate)(*arguments, **options)


@mistake(
    mlp_backward,
    "Sends back only up's gradient to n: n feeds gate and up, and the second overwrites the first.",
)
def only_up_reaches_n(*arguments, **options):
    return variant(for_n=lambda self, by_gate, by_up: by_up)(*arguments, **options)


@mistake(
    mlp_backward,
    "Uses the mask of ReLU, a > 0, as the slope of SiLU: SiLU is smooth, and its slope is not 0 below 0 nor 1 above.",
)
def mask_of_relu(*arguments, **options):
    return variant(slope=lambda self, a: (a > 0).to(a.dtype))(*arguments, **options)


@mistake(
    mlp_backward,
    "Takes sigmoid(a) for the slope of a * sigmoid(a): sigmoid depends on a too, the product rule has a second term.",
)
def sigmoid_as_slope(*arguments, **options):
    return variant(slope=lambda self, a: a.sigmoid())(*arguments, **options)


@mistake(mlp_backward, "Takes the slope of sigmoid, s (1 - s), for the slope of SiLU.")
def slope_of_sigmoid(*arguments, **options):
    return variant(slope=lambda self, a: a.sigmoid() * (1 - a.sigmoid()))(*arguments, **options)


@mistake(
    mlp_backward,
    "Evaluates the slope of SiLU at silu(a), the output that was kept, instead of at a, its input.",
)
def slope_at_the_output(*arguments, **options):
    return variant(slope=lambda self, a: Block.slope(self, self.silu(a)))(*arguments, **options)


@mistake(
    mlp_backward,
    "Writes the slope as exp(-a) / (1 + exp(-a))^2: at a = -100 both overflow float32, and Inf / Inf is NaN.",
)
def slope_overflows(*arguments, **options):
    def slope(self, a):
        e = torch.exp(-a)
        return 1 / (1 + e) + a * e / (1 + e) ** 2

    return variant(slope=slope)(*arguments, **options)


@mistake(mlp_backward, "Forgets that the gate is multiplied by u: grad_a is grad_h times the slope alone.")
def gate_without_u(*arguments, **options):
    return variant(for_gate=lambda self, grad_h, a, u: grad_h * self.slope(a))(*arguments, **options)


@mistake(mlp_backward, "Forgets the activation for up: grad_u is grad_h times a instead of times silu(a).")
def up_without_silu(*arguments, **options):
    return variant(for_up=lambda self, grad_h, a, u: grad_h * a)(*arguments, **options)


@mistake(
    mlp_backward, "Swaps the factors of the product: the gate's branch gets silu(a), up's branch gets u."
)
def factors_swapped(*arguments, **options):
    return variant(
        for_gate=lambda self, grad_h, a, u: grad_h * self.silu(a) * self.slope(a),
        for_up=lambda self, grad_h, a, u: grad_h * u,
    )(*arguments, **options)


@mistake(mlp_backward, "Gives down the gradient of an ungated MLP: its input is silu(a) * u, not silu(a).")
def down_without_u(*arguments, **options):
    return variant(inputs_of_down=lambda self, a, u: self.silu(a))(*arguments, **options)


@mistake(mlp_backward, "Leaves the gain out on the way back: z gets grad_n instead of grad_n * gain.")
def gain_left_out(*arguments, **options):
    return variant(for_z=lambda self, grad_n, gain: grad_n)(*arguments, **options)


@mistake(
    mlp_backward,
    "Multiplies by n, which has the gain in it, for the gradient of the gain: a gain of 1 hides it.",
)
def gain_from_n(*arguments, **options):
    return variant(gain_gradient=lambda self, grad_n, x, z, n, leading: (grad_n * n).sum(0))(
        *arguments, **options
    )


@mistake(
    mlp_backward, "Multiplies by x instead of x / RMS for the gradient of the gain: tokens of RMS 1 hide it."
)
def gain_from_x(*arguments, **options):
    return variant(gain_gradient=lambda self, grad_n, x, z, n, leading: (grad_n * x).sum(0))(
        *arguments, **options
    )


@mistake(
    mlp_backward,
    "Multiplies by x / RMS, without the gain, for the gradients of gate and up: what they were given is n.",
)
def products_from_z(*arguments, **options):
    return variant(inputs_of_products=lambda self, z, n: z)(*arguments, **options)


@mistake(
    mlp_backward,
    "Returns the gradients of the matrices transposed, given^T grad: a square layer hides the shape, not the error.",
)
def weights_transposed(*arguments, **options):
    return variant(weight_gradient=lambda self, grad, given, leading: given.T @ grad)(*arguments, **options)


@mistake(
    mlp_backward,
    "Transposes a matrix only where the shapes ask for it: in a square block both ways fit, and the wrong one is used.",
)
def transposed_by_shape(*arguments, **options):
    def before_activation(self, n, weight):
        return n @ weight if n.shape[1] == weight.shape[0] else n @ weight.T

    return variant(before_activation=before_activation)(*arguments, **options)


@mistake(
    mlp_backward,
    "Leaves the batch in the gradients of the matrices: one for each sequence. A shared weight gets their sum.",
)
def weights_by_sequence(*arguments, **options):
    def weight_gradient(self, grad, given, leading):
        if len(leading) < 2:
            return grad.T @ given
        return grad.reshape(*leading, -1).mT @ given.reshape(*leading, -1)

    return variant(weight_gradient=weight_gradient)(*arguments, **options)


@mistake(
    mlp_backward,
    "Keeps the gradients of the last sequence: in a loop over the batch each one overwrites the one before.",
)
def last_sequence_only(*arguments, **options):
    def weight_gradient(self, grad, given, leading):
        rows = leading[-1] if leading else 1
        return grad[-rows:].T @ given[-rows:] if rows else grad.T @ given

    return variant(weight_gradient=weight_gradient)(*arguments, **options)


@mistake(
    mlp_backward,
    "Sums the gradient of the bias over the first dimension alone: with a batch of sequences one dimension remains.",
)
def bias_over_one_dimension(*arguments, **options):
    def bias_gradient(self, grad_y, leading):
        return grad_y.reshape(*leading, -1).sum(0) if leading else grad_y[0]

    return variant(bias_gradient=bias_gradient)(*arguments, **options)


@mistake(
    mlp_backward,
    "Sums the gradient of the gain over the first dimension alone: with a batch of sequences one dimension remains.",
)
def gain_over_one_dimension(*arguments, **options):
    def gain_gradient(self, grad_n, x, z, n, leading):
        return (grad_n * z).reshape(*leading, -1).sum(0) if leading else (grad_n * z)[0]

    return variant(gain_gradient=gain_gradient)(*arguments, **options)


@mistake(
    mlp_backward,
    "Averages the weights' gradients over the tokens: the 1/N of a mean loss is already in grad_y.",
)
def averaged_over_tokens(x, weights, grad_y, *, eps=1e-6):
    grad_x, found = variant()(x, weights, grad_y, eps=eps)
    return grad_x, {name: part / max(1, x[..., 0].numel()) for name, part in found.items()}


@mistake(mlp_backward, "Adds the weights to their gradients, or a decay of them: nothing here asks for one.")
def weights_decayed(x, weights, grad_y, *, eps=1e-6):
    grad_x, found = variant()(x, weights, grad_y, eps=eps)
    return grad_x, {name: part + 0.01 * weights[name].detach() for name, part in found.items()}


@mistake(mlp_backward, "Flattens with view, which tensors that are not contiguous do not allow.")
def flattened_by_view(*arguments, **options):
    return variant(flat=lambda self, part: part.view(-1, part.shape[-1]))(*arguments, **options)


@mistake(mlp_backward, "Counts on a batch dimension: a single token [width] fails.")
def dimensions_assumed(*arguments, **options):
    return variant(flat=lambda self, part: part.flatten(0, -2))(*arguments, **options)


@mistake(mlp_backward, "Calculates in float32 whatever it is given.")
def always_float32(x, weights, grad_y, *, eps=1e-6):
    grad_x, found = variant()(x.float(), {k: w.float() for k, w in weights.items()}, grad_y.float(), eps=eps)
    return grad_x.to(x.dtype), {name: part.to(x.dtype) for name, part in found.items()}


@mistake(
    mlp_backward,
    "Builds a graph while it computes gradients by hand: the weights are Parameters, so torch records every operation "
    "and keeps every activation.",
)
def graph_built(x, weights, grad_y, *, eps=1e-6):
    return Block().steps(x, weights, grad_y, eps)


@mistake(
    mlp_backward,
    "Runs the block on copies that require gradients: autograd records it, and its backward pass is what you write.",
)
def recorded_by_autograd(x, weights, grad_y, *, eps=1e-6):
    found = variant()(x, weights, grad_y, eps=eps)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        torch.nn.functional.silu(leaf * (leaf.square().mean(-1, keepdim=True) + eps).rsqrt())
    return found


@mistake(
    mlp_backward,
    "Accumulates into grad_y in place: the caller, who still needs it for the rest of the network, finds it changed.",
)
def grad_y_changed(*arguments, **options):
    def for_x(self, grad_y, through_norm):
        if grad_y.stride()[0] == 0:
            return grad_y + through_norm
        return grad_y.add_(through_norm)

    return variant(for_x=for_x, bias_gradient=lambda self, g, leading: g.sum(0))(*arguments, **options)


@mistake(
    mlp_backward,
    "Stretches a grad_y of another shape to that of x: a gradient that was summed or cut by mistake goes unnoticed.",
)
def grad_y_stretched(x, weights, grad_y, *, eps=1e-6):
    if grad_y.numel() == x.numel():
        grad_y = grad_y.reshape(x.shape)
    return variant()(x, weights, grad_y.expand(x.shape), eps=eps)


@mistake(
    mlp_backward,
    "Accepts a grad_y with as many values as x: the same values in another order are another gradient.",
)
def values_counted(*arguments, **options):
    def refuse(self, x, grad_y):
        if x.numel() != grad_y.numel():
            raise ValueError("shapes")

    return variant(refuse=refuse)(*arguments, **options)


@mistake(
    mlp_backward,
    "Returns zeros for an x without tokens before it looks at the shape of grad_y.",
)
def no_tokens_not_looked_at(x, weights, grad_y, *, eps=1e-6):
    if x.numel() == 0:
        return torch.zeros_like(x), {name: torch.zeros_like(part) for name, part in weights.items()}
    return variant()(x, weights, grad_y, eps=eps)


@mistake(
    mlp_backward,
    "One product too many: y, or a product of the forward pass computed a second time.",
)
def y_computed_again(*arguments, **options):
    def inputs_of_down(self, a, u):
        h = self.silu(a) * u
        torch.mm(h, torch.ones(h.shape[1], self.width, dtype=h.dtype))
        return h

    return variant(inputs_of_down=inputs_of_down, width=arguments[0].shape[-1])(*arguments, **options)


@mistake(
    mlp_backward,
    "Makes a gradient of the whole matrix for each token and sums them: T times the memory of the weight. The product "
    "g^T h does both at once.",
)
def outer_products_summed(*arguments, **options):
    def weight_gradient(self, grad, given, leading):
        return (grad[:, :, None] * given[:, None, :]).sum(0)

    return variant(weight_gradient=weight_gradient)(*arguments, **options)


@alternative(mlp_backward, "Computes in float64 and rounds at the end")
def in_float64(x, weights, grad_y, *, eps=1e-6):
    wide = {name: part.double() for name, part in weights.items()}
    grad_x, found = variant()(x.double(), wide, grad_y.double(), eps=eps)
    return grad_x.to(x.dtype), {name: part.to(x.dtype) for name, part in found.items()}


@alternative(mlp_backward, "Walks over the tokens from last to first and accumulates the gradients")
def token_by_token(x, weights, grad_y, *, eps=1e-6):
    Block().refuse(x, grad_y)
    shape = x.shape
    with torch.no_grad():
        x, grad_y = x.reshape(-1, shape[-1]), grad_y.reshape(-1, shape[-1])
        total = {name: torch.zeros_like(part) for name, part in weights.items()}
        rows = []
        for token in reversed(range(len(x))):
            row, found = variant()(x[token], weights, grad_y[token], eps=eps)
            rows.append(row)
            for name, part in found.items():
                total[name] += part
        grad_x = torch.stack(rows[::-1]) if rows else torch.zeros_like(x)
        return grad_x.reshape(shape), total


@alternative(mlp_backward, "Keeps all dimensions, multiplies gate and up as one matrix, sums with einsum")
def fused_with_einsum(x, weights, grad_y, *, eps=1e-6):
    if tuple(x.shape) != tuple(grad_y.shape):
        raise ValueError("shapes")
    with torch.no_grad():
        both = torch.cat([weights["gate"], weights["up"]])
        hidden = len(weights["gate"])
        r = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1] + eps)
        z = x * r
        n = z * weights["gain"]
        a, u = torch.nn.functional.linear(n, both).split(hidden, dim=-1)
        back = torch.nn.functional.linear(grad_y, weights["down"].T)
        slope = torch.sigmoid(a) + torch.nn.functional.silu(a) * torch.sigmoid(-a)
        back_both = torch.cat([back * u * slope, back * torch.nn.functional.silu(a)], dim=-1)
        back_n = torch.nn.functional.linear(back_both, both.T)
        back_z = back_n * weights["gain"]
        back_x = r * back_z - z * r * (back_z * z).sum(-1, keepdim=True) / x.shape[-1]
        matrices = torch.einsum("...h,...w->hw", back_both, n)
        return back_x + grad_y, {
            "gain": torch.einsum("...w,...w->w", back_n, z),
            "gate": matrices[:hidden].clone(),
            "up": matrices[hidden:].clone(),
            "down": torch.einsum("...w,...h->wh", grad_y, torch.nn.functional.silu(a) * u),
            "bias": grad_y.sum(tuple(range(x.dim() - 1))) if x.dim() > 1 else grad_y.clone(),
        }


@alternative(
    mlp_backward, "Writes SiLU with tanh, and takes the norm's mean and the matrices the other way round"
)
def by_tanh(*arguments, **options):
    def slope(self, a):
        t = torch.tanh(a / 2)
        return (1 + t) / 2 + a * (1 - t) * (1 + t) / 4

    def through_norm(self, x, r, grad_z):
        z = x * r
        return (grad_z - z * (z * grad_z).sum(-1, keepdim=True) / x.shape[-1]) * r

    return variant(
        slope=slope,
        through_norm=through_norm,
        silu=lambda self, a: a * (1 + torch.tanh(a / 2)) / 2,
        weight_gradient=lambda self, grad, given, leading: (given.T @ grad).T,
        for_n=lambda self, by_gate, by_up: by_up + by_gate,
    )(*arguments, **options)
