"""Low-rank adaptation of a linear layer: W stays as it is, and a product of two thin matrices is trained beside it."""

from __future__ import annotations

import io
import math

import torch
from torch import Tensor, nn

from llmcourse.counting import TensorWork
from llmcourse.exercise import alternative, case, cost, excuse, exercise, mistake, raised


@exercise(
    points=3,
    minutes=15,
    extension=True,
    hints=(
        "B A has the shape of W, and you never need it to train: which of the two thin matrices does x meet first? "
        "Merged is a state of the layer, so whatever a checkpoint leaves out of it is lost.",
        "alpha is divided by the rank, wherever the product is used. An in-place sum with a tensor that requires a "
        "gradient makes the weight require one too.",
    ),
)
class LoRALinear(nn.Module):
    """A frozen nn.Linear with a trained update of low rank: y = base(x) + (alpha / rank) B A x.

    LoRALinear(base, rank, alpha, dropout=0.0); about 25 lines. base is an nn.Linear of
    any float dtype, with a bias or without. It is kept as `base`, the very module and
    no copy, and frozen: its parameters no longer require gradients. base(x) is a call of
    it, so that its hooks run. Two parameters are trained, on base's device, in float32
    (float64 where base is float64):

        lora_A [rank, in]    random: mean 0, standard deviation within a third and
                             three times 1 / sqrt(in), drawn from torch's global generator
        lora_B [out, rank]   zeros, so that at first y is base(x)

    forward: x [..., in] of base's dtype -> [..., out] of base(x)'s dtype,

        base(x) + (alpha / rank) * D(x) A^T B^T

    where the second term is computed in lora_A's dtype, x being cast to it, and D zeroes
    single values of x with probability `dropout` and divides the others by 1 - dropout
    (torch.nn.functional.dropout), in training only: after eval() D(x) is x. x gets its
    gradient through both terms.

    merge() adds (alpha / rank) B A to base.weight, in place: it stays the same Parameter
    in the same memory. The product is made in lora_A's dtype and rounded to base's, before
    the sum or after it. From then on forward is base(x) alone, also in training: no
    dropout, no gradient for A and B. unmerge() subtracts it again, which restores the
    weight up to rounding. A second merge() changes nothing, nor does unmerge() of a layer
    that is not merged; train() and eval() do not merge. base.weight never requires a
    gradient. A and B do not change while merged.

    state_dict() holds base.weight, base.bias if there is one, lora_A, lora_B and, under a
    name of your choice, whether the layer is merged; load_state_dict() restores that too.
    `.double()`, `.bfloat16()` and the like move everything, and forward goes on in these
    dtypes. ValueError, with base as it was, unless 1 <= rank <= min(in, out) and
    0 <= dropout < 1. (Hu et al. 2021, "LoRA", sec. 4.1.)

    For a third of the points, half of it each: (1) making the layer, forward and backward
    make no tensor as large as base.weight, and for T rows of x forward and backward do
    4 T in out + 6 T rank (in + out) operations in matrix products (2 a multiply-add);
    (2) a merged forward does one product, 2 T in out.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0) -> None:
        ### BEGIN SOLUTION
        super().__init__()
        outputs, inputs = base.weight.shape
        if not 1 <= rank <= min(base.weight.shape):
            raise ValueError(
                f"rank {rank} for a weight [{outputs}, {inputs}]; expected 1 to the smaller of both"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout {dropout}; expected at least 0 and less than 1")
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.dropout = dropout
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(
            base.weight.new_empty((rank, inputs), dtype=dtype).normal_(std=inputs**-0.5)
        )
        self.lora_B = nn.Parameter(base.weight.new_zeros((outputs, rank), dtype=dtype))
        # A buffer, so that a checkpoint says what its weight is.
        self.merged = nn.Buffer(torch.tensor(False))
        ### END SOLUTION

    def forward(self, x: Tensor) -> Tensor:
        ### BEGIN SOLUTION
        y = self.base(x)
        if self.merged:
            return y
        dropped = nn.functional.dropout(x.to(self.lora_A.dtype), self.dropout, self.training)
        return y + (self.scale * (dropped @ self.lora_A.T) @ self.lora_B.T).to(y.dtype)
        ### END SOLUTION

    def merge(self) -> None:
        ### BEGIN SOLUTION
        if not self.merged:
            with torch.no_grad():
                self.base.weight.add_(self.scale * self.lora_B @ self.lora_A)
            self.merged.fill_(True)
        ### END SOLUTION

    def unmerge(self) -> None:
        ### BEGIN SOLUTION
        if self.merged:
            with torch.no_grad():
                self.base.weight.sub_(self.scale * self.lora_B @ self.lora_A)
            self.merged.fill_(False)
        ### END SOLUTION


excuse(
    LoRALinear,
    "torch.promote_types(base.weight.dtype, torch.float32) -> torch.promote_types(torch.float32, base.weight.dtype)",
    "the wider of two dtypes does not depend on their order",
)


# ---------------------------------------------------------------------------------------------------------- cases


def a_base(rng, inputs, outputs, *, bias=True, dtype=torch.float32):
    """A linear layer [out, in] with weights of standard deviation 1 / sqrt(in)."""
    base = nn.Linear(inputs, outputs, bias, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(rng.normal(outputs, inputs) / inputs**0.5)
        if bias:
            base.bias.copy_(rng.normal(outputs))
    return base


def a_layer(answer, rng, base, rank, alpha, *options):
    """The answer's layer, with A and B that are as loud as W, whatever alpha / rank is."""
    layer = answer(base, rank, alpha, *options)
    with torch.no_grad():
        layer.lora_A.copy_(rng.normal(rank, base.in_features) / base.in_features**0.5)
        layer.lora_B.copy_(rng.normal(base.out_features, rank) * rank**0.5 / alpha)
    return layer


def sizes(rng):
    """in, out, rank: none equal to another, in as often below out as above."""
    inputs, outputs = rng.shuffled([rng.integer(7, 9), rng.integer(12, 16)])
    return inputs, outputs, rng.integer(2, 5)


def weight_of(base):
    return base.weight.detach().clone()


@case(LoRALinear)
def a_new_layer(answer, rng):
    """What a new layer gives, what of it is trained, and what A is drawn from."""
    inputs, outputs, rank = rng.integer(300, 400), rng.integer(20, 30), rng.integer(6, 9)
    base, x = a_base(rng, inputs, outputs), rng.normal(3, inputs)
    layers = [
        answer(base, rank, 16),
        answer(a_base(rng, inputs, outputs, bias=False), rank, 0.5, 0.25),
        answer(a_base(rng, outputs, inputs), rank, 2.0),  # the other way round: in is the short side
    ]
    drawn = [layer.lora_A.detach().double() * layer.lora_A.shape[1] ** 0.5 for layer in layers]
    seed, seeded, moved = rng.integer(0, 1 << 30), [], []
    for each in (seed, seed, seed + 1):
        torch.manual_seed(each)
        state = torch.get_rng_state()
        seeded.append(answer(base, rank, 16).lora_A.detach())
        moved.append(not torch.equal(torch.get_rng_state(), state))
    return {
        "trained": [
            sorted(
                f"{name} {list(part.shape)}" for name, part in layer.named_parameters() if part.requires_grad
            )
            for layer in layers
        ],
        "frozen": [
            sorted(f"{name} {list(p.shape)}" for name, p in layer.named_parameters() if not p.requires_grad)
            for layer in layers
        ],
        "base is the one given": layers[0].base is base,
        "base": sorted(name for name, part in base.named_parameters() if not part.requires_grad),
        "y": layers[0](x),
        "B": [layer.lora_B for layer in layers],
        "A is about 1 / sqrt(in)": [bool(1 / 3 < part.square().mean().sqrt() < 3) for part in drawn],
        "A has mean 0": [bool(part.mean().abs() < 0.3 * part.std()) for part in drawn],
        "A has no zeros": [bool((part != 0).all()) for part in drawn],
        "another A each": not torch.equal(drawn[0], drawn[1]),
        "torch.manual_seed decides A": torch.equal(seeded[0], seeded[1]),
        "another seed, another A": not torch.equal(seeded[0], seeded[2]),
        "torch's global generator moves on": moved,
    }


@case(LoRALinear)
def known_matrices(answer, rng):
    """With A and B that are known: rows, batches, no rows at all, a transposed x, several ranks and alphas."""
    inputs, outputs, rank = sizes(rng)
    layer = a_layer(answer, rng, a_base(rng, inputs, outputs), rank, rng.choice([8.0, 16.0]))
    bare = a_layer(answer, rng, a_base(rng, inputs, outputs, bias=False), rank, rank + 0.5)
    integers = a_layer(answer, rng, a_base(rng, outputs, inputs), 3, 4)
    full = a_layer(answer, rng, a_base(rng, inputs, outputs), min(inputs, outputs), 1.0)
    one = a_layer(answer, rng, a_base(rng, inputs, outputs), 1, 1.5)
    return {
        "one row": layer(rng.normal(inputs)),
        "rows": layer(rng.normal(4, inputs)),
        "batches": layer(rng.normal(2, 3, inputs)),
        "no rows": layer(rng.normal(0, inputs)),
        "transposed": layer(rng.normal(inputs, 5).T),
        "without a bias": bare(rng.normal(4, inputs)),
        "integer alpha": integers(rng.normal(4, outputs)),
        "full rank": full(rng.normal(4, inputs)),
        "rank 1": one(rng.normal(4, inputs)),
    }


@case(LoRALinear)
def gradients(answer, rng):
    """Which gradients exist, and what they are: of x, A and B, for quiet rows and loud ones."""
    inputs, outputs, rank = sizes(rng)
    base = a_base(rng, inputs, outputs)
    layer = a_layer(answer, rng, base, rank, 16.0)
    x = (rng.normal(2, 3, inputs) * torch.tensor([1e-3, 1.0, 1e3])[:, None]).requires_grad_()
    (layer(x) * rng.normal(2, 3, outputs)).sum().backward()
    return {
        "x": x.grad,
        "A": layer.lora_A.grad,
        "B": layer.lora_B.grad,
        "of the weight": base.weight.grad,
        "of the bias": base.bias.grad,
    }


@case(LoRALinear)
def three_steps(answer, rng):
    """A new layer with A set and B still zero, trained for three steps of SGD on all its parameters."""
    inputs, outputs, rank = sizes(rng)
    base = a_base(rng, inputs, outputs)
    layer = answer(base, rank, rng.choice([4.0, 8.0]))
    with torch.no_grad():
        layer.lora_A.copy_(rng.normal(rank, inputs) / inputs**0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        (layer(rng.normal(5, inputs)) - rng.normal(5, outputs)).square().mean().backward()
        optimizer.step()
        seen.append([layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), weight_of(base)])
    return seen


@case(LoRALinear)
def merged_and_back(answer, rng):
    """merge() and unmerge(), twice each and in turns: the given layer's weight, and the output."""
    inputs, outputs, rank = sizes(rng)
    base, x = a_base(rng, inputs, outputs), rng.normal(4, inputs)
    layer = a_layer(answer, rng, base, rank, rng.choice([8.0, 16.0]), 0.0)
    seen, given, first_row = {"at first": weight_of(base)}, base.weight, base.weight.detach()[0]
    for step in (
        "unmerge",
        "eval",
        "train",
        "merge",
        "merge",
        "eval",
        "train",
        "unmerge",
        "unmerge",
        "merge",
    ):
        getattr(layer, step)()
        seen[f"{len(seen)} {step}"] = [weight_of(base), layer(x).detach(), base.weight.requires_grad]
    for _ in range(4):
        layer.unmerge()
        layer.merge()
    seen["merged four times more"] = weight_of(base)
    seen["base.weight is the Parameter that was given"] = base.weight is given
    seen["a view of it, merged"] = first_row.clone()
    layer.unmerge()
    return {**seen, "in the end": [weight_of(base), layer(x)]}


@case(LoRALinear)
def gradients_of_a_merged_layer(answer, rng):
    """Merged, x gets its gradient through the weight, and A and B get none; unmerged they get theirs again."""
    inputs, outputs, rank = sizes(rng)
    layer = a_layer(answer, rng, a_base(rng, inputs, outputs), rank, 4.0, 0.5)
    x, g = rng.normal(4, inputs).requires_grad_(), rng.normal(4, outputs)
    layer.merge()
    layer(x).backward(g)
    seen = {"x": x.grad.clone(), "A": layer.lora_A.grad, "B": layer.lora_B.grad}
    x.grad = None
    layer.unmerge()
    layer.eval()
    layer(x).backward(g)
    return {**seen, "x again": x.grad, "A again": layer.lora_A.grad, "B again": layer.lora_B.grad}


@case(LoRALinear)
def values_dropped(answer, rng):
    """What dropout leaves of x = 1, 2, 1, 2, ... where A adds up pairs, B shows them, and the weight is zero."""
    rank, rate, alpha = rng.integer(3, 4), rng.choice([0.25, 0.4]), rng.choice([3.0, 8.0])
    base = nn.Linear(2 * rank, rank + 3, bias=False)
    layer = answer(base, rank, alpha, rate)
    with torch.no_grad():
        base.weight.zero_()
        layer.lora_A.copy_(torch.eye(rank).repeat_interleave(2, dim=1))
        layer.lora_B.copy_(torch.eye(rank + 3)[:, :rank])
    x = torch.tensor([1.0, 2.0]).repeat(1000, rank)
    first, second = layer(x)[:, :rank].detach(), layer(x)[:, :rank].detach()
    # A pair gives 0, 1, 2 or 3 times (alpha / rank) / (1 - rate): each at least 187 of 3,000 on average.
    unit = alpha / rank / (1 - rate)
    pairs = (first / unit).round()
    kept = ((pairs == 1) | (pairs == 3)).double().mean()  # of 3,000 values: 0.1 is more than 11 deviations
    layer.eval()
    return {
        "pairs": torch.unique(torch.round(first / unit, decimals=3)) * unit,
        "as many as said": bool((kept - (1 - rate)).abs() < 0.1),
        "all outputs": bool(((first == 0).double().mean(dim=0) < 0.5).all()),
        "drawn anew": not torch.equal(first, second),
        "eval": layer(x[:2]),
    }


@case(LoRALinear)
def dropout_elsewhere(answer, rng):
    """With dropout, base(x) stays whole, and so does what a merged layer gives."""
    inputs, outputs, rank = sizes(rng)
    base, x = a_base(rng, inputs, outputs), rng.normal(4, inputs)
    layer = answer(base, rank, 8.0, 0.5)
    seen = {"B is zero": layer(x)}
    layer = a_layer(answer, rng, base, rank, 8.0, 0.9)
    layer.merge()
    seen["merged"] = layer(x)
    layer.eval()
    seen["merged, eval"] = layer(x)
    layer.unmerge()
    return {**seen, "eval": layer(x)}


@case(LoRALinear)
def hooks_of_base(answer, rng):
    """base has a forward hook that doubles its output: it runs before merge() and after it."""
    inputs, outputs, rank = sizes(rng)
    base, x = a_base(rng, inputs, outputs), rng.normal(4, inputs)
    layer = a_layer(answer, rng, base, rank, 8.0)
    base.register_forward_hook(lambda module, arguments, y: 2 * y)
    seen = {"y": layer(x).detach()}
    layer.merge()
    return {**seen, "merged": layer(x)}


@case(LoRALinear)
def narrow_weights(answer, rng):
    """bfloat16 and float16: the dtypes of A, B and y, an update that 8 bits would lose, and the merged weight."""
    seen = {}
    for dtype in (torch.bfloat16, torch.float16):
        inputs, outputs, rank = sizes(rng)
        base = a_base(rng, inputs, outputs, dtype=dtype)
        layer = a_layer(answer, rng, base, rank, 4.0)
        with torch.no_grad():
            layer.lora_B.mul_(0.25)  # of a louder update, the weight's rounding after merge() would show
        x = rng.normal(4, inputs, dtype=dtype).requires_grad_()
        y = layer(x)
        y.backward(rng.normal(4, outputs, dtype=dtype))
        thin = [layer.lora_A.detach().clone(), layer.lora_B.detach().clone()]
        layer.merge()
        merged = weight_of(base), layer(x).detach()
        layer.unmerge()
        grads = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
        seen[str(dtype)] = [y, *thin, *grads, *merged, weight_of(base)]
    return seen


def moved_to(answer, rng, dtype, then):
    """A layer of this dtype after .to(then): what it holds and gives, merged and not."""
    inputs, outputs, rank = sizes(rng)
    base = a_base(rng, inputs, outputs, dtype=dtype)
    layer = a_layer(answer, rng, base, rank, 4.0).to(then)
    with torch.no_grad():
        layer.lora_A.copy_(rng.normal(rank, inputs, dtype=torch.float64) / inputs**0.5)
    x = rng.normal(4, inputs, dtype=then)
    y = layer(x).detach()
    layer.merge()
    thin = {"A": layer.lora_A, "B": layer.lora_B}
    return {**thin, "y": y, "merged weight": weight_of(base), "y, merged": layer(x)}


@case(LoRALinear)
def double_precision(answer, rng):
    """A float64 layer; and a float32 one after .double(), whose A and B are then float64 too."""
    return {
        str(dtype): moved_to(answer, rng, dtype, torch.float64) for dtype in (torch.float64, torch.float32)
    }


@case(LoRALinear)
def narrowed_afterwards(answer, rng):
    """A float32 layer after .bfloat16(), whose A and B are then bfloat16 too."""
    return moved_to(answer, rng, torch.float32, torch.bfloat16)


def kept(state):
    """A state_dict as the bytes of a file."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def a_model(answer, rng):
    """Three layers in a model, the second without a bias."""
    return nn.ModuleList(
        a_layer(answer, rng, a_base(rng, 6, 9, bias=bias), 2, 6.0) for bias in (True, False, True)
    )


@case(LoRALinear)
def saved(answer, rng):
    """What state_dict() holds, of two layers that are merged and of one that is not."""
    model, x = a_model(answer, rng), rng.normal(3, 6)
    model[0].merge()
    model[2].merge()
    state = model.state_dict()
    ours = ("base.weight", "base.bias", "lora_A", "lora_B")
    others = [part for name, part in state.items() if not name.endswith(ours) and isinstance(part, Tensor)]
    return {
        "held": {name: part.clone() for name, part in state.items() if name.endswith(ours)},
        "the rest is small": sum(part.nbytes for part in others) <= 3 * 8,
        "held of one": sorted(name for name in model[0].state_dict() if name in ours),
        "y": [layer(x) for layer in model],
        "saved": {"state": kept(state), "x": x},
    }


@case(LoRALinear, after=saved)
def loaded_elsewhere(answer, rng, saved):
    """Another process loads that into layers of which the first is not merged and the others are."""
    model, x = a_model(answer, rng), saved["x"]
    for layer in model:
        with torch.no_grad():
            layer.base.weight.mul_(3)
            layer.lora_A.mul_(-1)
    model[1].merge()
    model[2].merge()
    model.load_state_dict(torch.load(io.BytesIO(saved["state"])))
    seen = {"y": [layer(x) for layer in model]}
    model[0].merge()
    seen["merged"] = [weight_of(layer.base) for layer in model]
    for layer in model:
        layer.unmerge()
    return {
        **seen,
        "unmerged": [weight_of(layer.base) for layer in model],
        "y again": [layer(x) for layer in model],
    }


@case(LoRALinear)
def refused(answer, rng):
    """Ranks and rates of dropout that are out of range; those at the ends are taken."""
    inputs, outputs, _ = sizes(rng)
    short, long = sorted((inputs, outputs))
    base = a_base(rng, inputs, outputs)
    given = {
        "rank 0": (0, 8.0),
        "rank -1": (-1, 8.0),
        "rank above both": (long + 1, 8.0),
        "rank above one": (short + 1, 8.0),
        "dropout -0.1": (2, 8.0, -0.1),
        "dropout 1": (2, 8.0, 1.0),
        "dropout 1.5": (2, 8.0, 1.5),
    }
    x = rng.normal(3, inputs)
    found = {name: raised(answer, base, *options) for name, options in given.items()}
    return {
        **found,
        "base requires gradients after a refusal": [p.requires_grad for p in base.parameters()],
        "largest rank": raised(answer, base, short, 8.0, 0.0),
        "y": a_layer(answer, rng, base, short, 8.0)(x),
        "large dropout": a_layer(answer, rng, base, 1, -2.0, 0.99).eval()(x),
    }


@cost(LoRALinear, share=1 / 6)
def thin_products(answer, rng):
    """Work of a training step, and the largest tensor made in it and while the layer is made."""
    observed, largest, beyond, uncounted = [], [], 0, 0
    for inputs, outputs, rank, rows in ((72, 96, 4, 5), (90, 60, 3, 8)):
        base = a_base(rng, inputs, outputs, bias=rows == 5)
        leading = (rows,) if rows == 5 else (2, rows // 2)
        x, g = rng.normal(*leading, inputs).requires_grad_(), rng.normal(*leading, outputs)
        with TensorWork(large_elements=64) as making:
            layer = answer(base, rank, 8.0)
        a_matrix = rng.normal(rank, inputs)
        with torch.no_grad():
            layer.lora_A.copy_(a_matrix)
            layer.lora_B.copy_(rng.normal(outputs, rank))
        with TensorWork(large_elements=64) as work:
            y = layer(x)
            y.backward(g)
        observed += [y, x.grad, layer.lora_A.grad, layer.lora_B.grad]
        most_bytes = max(making.largest_tensor_bytes, work.largest_tensor_bytes)
        largest.append((-(-most_bytes // 4), inputs * outputs - 1))
        uncounted += len(work.uncounted)
        beyond += max(0, work.flops - 4 * rows * inputs * outputs - 6 * rows * rank * (inputs + outputs))
    return {
        "observed": observed,
        "float32 values in the largest tensor made": max(largest, key=lambda pair: pair[0] / pair[1]),
        "operations without a count": (uncounted, 0),
        "operations beyond 4 T in out + 6 T rank (in + out)": (beyond, 0),
    }


@cost(LoRALinear, share=1 / 6)
def one_product_once_merged(answer, rng):
    """Operations in matrix products of a merged forward, in training and after eval()."""
    observed, beyond, uncounted = [], 0, 0
    for inputs, outputs, rank, rows in ((40, 56, 4, 5), (64, 48, 3, 7)):
        layer = a_layer(answer, rng, a_base(rng, inputs, outputs), rank, 8.0, 0.1)
        x = rng.normal(1, rows, inputs)
        layer.merge()
        for mode in (layer.train, layer.eval):
            mode()
            with TensorWork(large_elements=64) as work:
                observed.append(layer(x))
            uncounted += len(work.uncounted)
            beyond += max(0, work.flops - 2 * rows * inputs * outputs)
    return {
        "observed": observed,
        "operations beyond 2 T in out": (beyond, 0),
        "operations without a count": (uncounted, 0),
    }


# ------------------------------------------------------------------------------------------- mistakes, alternatives


class Steps(nn.Module):
    """A right answer in small steps; a mistake replaces one of them."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.check(rank, base.in_features, base.out_features, dropout)
        self.dropout, self.scale = dropout, self.scaled(alpha, rank)
        self.keep(base)
        self.make(rank, base)
        self.flag()

    def check(self, rank, inputs, outputs, dropout):
        if rank < 1 or rank > inputs or rank > outputs:
            raise ValueError("rank")
        self.check_dropout(dropout)

    def check_dropout(self, dropout):
        if dropout < 0 or dropout >= 1:
            raise ValueError("dropout")

    def scaled(self, alpha, rank):
        return alpha / rank

    def keep(self, base):
        self.base = base
        for part in base.parameters():
            part.requires_grad = False

    def dtype(self, base):
        return torch.float64 if base.weight.dtype == torch.float64 else torch.float32

    def make(self, rank, base):
        self.lora_A = nn.Parameter(self.random(rank, base.in_features).to(self.dtype(base)))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=self.dtype(base)))

    def random(self, rank, inputs):
        return nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5))

    def flag(self):
        self.register_buffer("is_merged", torch.zeros((), dtype=torch.uint8))

    def drop(self, x):
        return nn.functional.dropout(x, self.dropout, self.training)

    def thin(self, x):
        return self.drop(x.to(self.lora_A.dtype))

    def update(self, x):
        """The second term [..., out]."""
        return self.thin(x) @ self.lora_A.T @ self.lora_B.T * self.scale

    def plain(self, x):
        return self.base(x)

    def forward(self, x):
        if self.is_merged:
            return self.merged(x)
        y = self.plain(x)
        return y + self.update(x).to(y.dtype)

    def merged(self, x):
        return self.base(x)

    def product(self):
        return self.scale * (self.lora_B @ self.lora_A)

    def take_off(self):
        return self.product()

    def merge(self):
        if not self.is_merged:
            self.base.weight.data += self.product().data.to(self.base.weight.dtype)
        self.is_merged.fill_(1)

    def unmerge(self):
        if self.is_merged:
            self.base.weight.data -= self.take_off().data.to(self.base.weight.dtype)
        self.is_merged.fill_(0)


@mistake(
    LoRALinear,
    "A and B both begin at zero: each one's gradient is a multiple of the other, so nothing is ever learned.",
    fails=("a_new_layer",),
)
class BothZero(Steps):
    def random(self, rank, inputs):
        return torch.zeros(rank, inputs)


@mistake(
    LoRALinear,
    "A and B are both random, so the first output is no longer the pretrained model's.",
    fails=("a_new_layer", "three_steps", "dropout_elsewhere"),
)
class BothRandom(Steps):
    def make(self, rank, base):
        super().make(rank, base)
        nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))


@mistake(
    LoRALinear,
    "A is zero and B is random: the same first output, but the other way round from what is asked.",
    fails=("a_new_layer", "three_steps"),
)
class RandomTheOtherWay(Steps):
    def make(self, rank, base):
        super().make(rank, base)
        with torch.no_grad():
            self.lora_A.zero_()
            self.lora_B.normal_(std=base.in_features**-0.5)


@mistake(
    LoRALinear,
    "A's standard deviation is not near 1 / sqrt(in), so A x is much louder or quieter than x.",
    fails=("a_new_layer",),
)
class UnscaledNormal(Steps):
    def random(self, rank, inputs):
        return torch.randn(rank, inputs)


@mistake(
    LoRALinear,
    "A is not drawn from torch's global generator: torch.manual_seed does not decide it, and no run can be repeated.",
    fails=("a_new_layer",),
)
class OwnGenerator(Steps):
    def random(self, rank, inputs):
        own = torch.Generator()
        own.seed()
        return torch.randn(rank, inputs, generator=own) / inputs**0.5


@mistake(
    LoRALinear,
    "A is drawn from torch.rand, so all of it is positive and every row of A is nearly the same.",
    fails=("a_new_layer",),
)
class OnlyPositive(Steps):
    def random(self, rank, inputs):
        return torch.rand(rank, inputs) / inputs**0.5


@mistake(
    LoRALinear,
    "A comes from a seed of its own, so every layer of the model gets the same A.",
    fails=("a_new_layer",),
)
class SeedOfItsOwn(Steps):
    def random(self, rank, inputs):
        generator = torch.Generator().manual_seed(0)
        return torch.randn(rank, inputs, generator=generator) / inputs**0.5


@mistake(LoRALinear, "alpha is not divided by the rank, so another rank needs another learning rate.")
class AlphaAlone(Steps):
    def scaled(self, alpha, rank):
        return alpha


@mistake(LoRALinear, "alpha is divided by the square root of the rank: that is rsLoRA, another scale.")
class OverRootOfRank(Steps):
    def scaled(self, alpha, rank):
        return alpha / rank**0.5


@mistake(LoRALinear, "alpha // rank: a whole number, and 0 where alpha is below the rank.")
class WholeNumberScale(Steps):
    def scaled(self, alpha, rank):
        return alpha // rank


@mistake(LoRALinear, "A and B are both scaled by alpha / rank, so the update is scaled twice.")
class ScaledTwice(Steps):
    def update(self, x):
        return super().update(x) * self.scale

    def product(self):
        return super().product() * self.scale


@mistake(LoRALinear, "B A is scaled in forward, but not in merge(): the merged model is another one.")
class MergesUnscaled(Steps):
    def product(self):
        return self.lora_B @ self.lora_A


@mistake(LoRALinear, "unmerge() subtracts B A without alpha / rank, so the weight does not come back.")
class UnmergesUnscaled(Steps):
    def take_off(self):
        return self.lora_B @ self.lora_A


@mistake(
    LoRALinear,
    "A second merge() adds the update a second time.",
    fails=("merged_and_back", "loaded_elsewhere"),
)
class MergesTwice(Steps):
    def merge(self):
        self.is_merged.fill_(0)
        super().merge()


@mistake(
    LoRALinear,
    "unmerge() subtracts an update that was never added, or was taken off already.",
    fails=("merged_and_back", "loaded_elsewhere"),
)
class UnmergesTwice(Steps):
    def unmerge(self):
        self.is_merged.fill_(1)
        super().unmerge()


@mistake(LoRALinear, "The merged layer still adds the update beside the weight that already holds it.")
class AddsOnceMore(Steps):
    def merged(self, x):
        y = self.base(x)
        return y + self.update(x).to(y.dtype)


@mistake(
    LoRALinear,
    "unmerge() only turns the flag back, so the weight keeps the update and forward adds it again.",
)
class OnlyTheFlag(Steps):
    def unmerge(self):
        self.is_merged.fill_(0)


@mistake(LoRALinear, "merge() only sets a flag, and forward makes W + (alpha / rank) B A anew at every call.")
class MergedOnTheFly(Steps):
    def merge(self):
        self.is_merged.fill_(1)

    unmerge = OnlyTheFlag.unmerge

    def merged(self, x):
        return nn.functional.linear(x, self.base.weight + self.product().to(x.dtype), self.base.bias)


@mistake(
    LoRALinear,
    "merge() records a gradient: after the in-place sum base.weight requires one, and A and B are trained through it.",
)
class MergesOnTheTape(Steps):
    def merge(self):
        if not self.is_merged:
            self.base.weight += self.product().to(self.base.weight.dtype)
        self.is_merged.fill_(1)

    def unmerge(self):
        if self.is_merged:
            self.base.weight -= self.product().to(self.base.weight.dtype)
        self.is_merged.fill_(0)


@mistake(
    LoRALinear,
    "merge() puts a new tensor in base.weight that requires a gradient again, as a new Parameter does.",
    fails=("merged_and_back",),
)
class MergesIntoAParameter(Steps):
    def merge(self):
        if not self.is_merged:
            self.base.weight = nn.Parameter(
                (self.base.weight + self.product().to(self.base.weight.dtype)).detach()
            )
        self.is_merged.fill_(1)


@mistake(
    LoRALinear,
    "eval() merges and train() takes the update off again: a call that evaluates changes the weight.",
    fails=("merged_and_back", "gradients_of_a_merged_layer", "one_product_once_merged"),
)
class MergesInEval(Steps):
    def train(self, mode=True):
        self.unmerge() if mode else self.merge()
        return super().train(mode)


@mistake(
    LoRALinear,
    "Whether the layer is merged is a plain attribute: a checkpoint of merged weights is loaded as one that is not.",
    fails=("loaded_elsewhere",),
)
class FlagIsForgotten(Steps):
    def flag(self):
        self.is_merged = torch.zeros((), dtype=torch.uint8)


@mistake(
    LoRALinear,
    "(B A) x: the dense product is made in every step, as large as the weight that was to be left alone.",
    fails=("thin_products",),
)
class DenseProduct(Steps):
    def update(self, x):
        return nn.functional.linear(self.thin(x), self.product())


@mistake(
    LoRALinear,
    "One product with W + (alpha / rank) B A in every step: the sum and its gradient are both dense.",
    fails=("thin_products", "hooks_of_base"),
)
class DenseSum(Steps):
    def forward(self, x):
        if self.is_merged or (self.training and self.dropout):
            return super().forward(x)
        weight = self.base.weight.to(self.lora_A.dtype) + self.product()
        bias = None if self.base.bias is None else self.base.bias.to(weight.dtype)
        return nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


@mistake(
    LoRALinear,
    "The base still requires gradients: the optimizer trains it, and keeps its state for all of it.",
)
class BaseIsTrained(Steps):
    def keep(self, base):
        self.base = base


@mistake(
    LoRALinear,
    "Only the weight is frozen, so the bias is still trained.",
    fails=("a_new_layer", "gradients", "three_steps"),
)
class BiasIsTrained(Steps):
    def keep(self, base):
        self.base = base
        base.weight.requires_grad = False


@mistake(
    LoRALinear,
    "The base runs under no_grad: the layers below get no gradient through W.",
    fails=("gradients", "gradients_of_a_merged_layer", "narrow_weights", "thin_products"),
)
class BaseUnderNoGrad(Steps):
    def plain(self, x):
        with torch.no_grad():
            return self.base(x)


@mistake(
    LoRALinear,
    "x is detached on the way to A: the layers below get no gradient through the update.",
    fails=("gradients", "gradients_of_a_merged_layer", "narrow_weights", "thin_products"),
)
class UpdateIsDetached(Steps):
    def thin(self, x):
        return super().thin(x.detach())


@mistake(LoRALinear, "The bias is added with the base and once more with the update.")
class BiasTwice(Steps):
    def update(self, x):
        update = super().update(x)
        return update if self.base.bias is None else update + self.base.bias


@mistake(
    LoRALinear,
    "The base is copied into a new layer: a second W in memory, and merge() does not reach the model's own.",
)
class CopiesTheBase(Steps):
    def keep(self, base):
        super().keep(base)
        copy = nn.Linear(base.in_features, base.out_features, base.bias is not None, dtype=base.weight.dtype)
        copy.load_state_dict(base.state_dict())
        self.base = copy.requires_grad_(False)


@mistake(
    LoRALinear,
    "The base is hidden from the module, so state_dict() lacks it and `.double()` leaves it behind.",
    fails=("a_new_layer", "double_precision", "narrowed_afterwards", "saved", "loaded_elsewhere"),
)
class HidesTheBase(Steps):
    def keep(self, base):
        super().keep(base)
        del self.base
        object.__setattr__(self, "base", base)


@mistake(
    LoRALinear,
    "A and B are tensors that require gradients, but no Parameters: neither optimizer nor file sees them.",
)
class NoParameters(Steps):
    def make(self, rank, base):
        super().make(rank, base)
        a, b = self.lora_A.data, self.lora_B.data
        del self.lora_A, self.lora_B
        self.lora_A, self.lora_B = a.requires_grad_(), b.requires_grad_()


@mistake(
    LoRALinear, "A and B are laid out for x A B, not like nn.Linear's weights: [in, rank] and [rank, out]."
)
class LaidOutForX(Steps):
    def make(self, rank, base):
        super().make(rank, base)
        self.lora_A = nn.Parameter(self.lora_A.data.T.contiguous())
        self.lora_B = nn.Parameter(self.lora_B.data.T.contiguous())

    def update(self, x):
        return self.thin(x) @ self.lora_A @ self.lora_B * self.scale

    def product(self):
        return (self.lora_A @ self.lora_B).T * self.scale


@mistake(
    LoRALinear,
    "A and B take the dtype of the base: in 8 bits of bfloat16 small steps of training are lost.",
    fails=("narrow_weights",),
)
class NarrowAdapters(Steps):
    def dtype(self, base):
        return base.weight.dtype


@mistake(
    LoRALinear,
    "The sum comes out in float32 where the base is narrower, and the next layer gets another dtype.",
    fails=("narrow_weights",),
)
class WideOutput(Steps):
    def forward(self, x):
        return self.base(x) if self.is_merged else self.base(x) + self.update(x)


@mistake(
    LoRALinear,
    "x goes into A as it is: a product of bfloat16 and float32, which torch refuses.",
    fails=("narrow_weights",),
)
class NoCast(Steps):
    def thin(self, x):
        return self.drop(x)


@mistake(
    LoRALinear,
    "The path of the update is float32 by name, not by the dtype of A: it breaks in float64.",
    fails=("double_precision", "narrowed_afterwards"),
)
class AlwaysFloat32(Steps):
    def dtype(self, base):
        return torch.float32

    def thin(self, x):
        return self.drop(x.float())


@mistake(
    LoRALinear,
    "x is cast to float32 unless it is float64, and not to the dtype of A: it breaks after .bfloat16().",
    fails=("narrowed_afterwards",),
)
class CastByName(Steps):
    def thin(self, x):
        return self.drop(x if x.dtype == torch.float64 else x.float())


@mistake(
    LoRALinear,
    "base is not called, only multiplied with: its hooks do not run.",
    fails=("hooks_of_base",),
)
class BaseIsNotCalled(Steps):
    def plain(self, x):
        return nn.functional.linear(x, self.base.weight, self.base.bias)

    merged = plain


@mistake(
    LoRALinear,
    "base is frozen before rank and dropout are looked at, and stays so when they are refused.",
    fails=("refused",),
)
class FreezesThenRefuses(Steps):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base.requires_grad_(False), rank, alpha, dropout)


@mistake(
    LoRALinear,
    "The base is widened to float32 to fit A and B: the frozen weight takes twice its bytes.",
    fails=("narrow_weights",),
)
class WidensTheBase(Steps):
    def keep(self, base):
        super().keep(base.to(self.dtype(base)))

    def forward(self, x):
        return super().forward(x.to(self.lora_A.dtype)).to(x.dtype)


@mistake(
    LoRALinear,
    "Dropout falls on the input of the base too: the pretrained model is disturbed, and not the update alone.",
    fails=("dropout_elsewhere",),
)
class DropsForTheBase(Steps):
    def forward(self, x):
        return super().forward(x if self.is_merged else self.drop(x))

    def thin(self, x):
        return x.to(self.lora_A.dtype)


@mistake(
    LoRALinear,
    "Dropout stays on in eval mode, because functional.dropout is not told of it.",
    fails=("gradients_of_a_merged_layer", "values_dropped", "dropout_elsewhere", "refused"),
)
class DropsInEval(Steps):
    def drop(self, x):
        return nn.functional.dropout(x, self.dropout)


@mistake(
    LoRALinear,
    "Dropout falls on A x, rank values a row, and not on the values of x.",
    fails=("values_dropped",),
)
class DropsTheThin(Steps):
    def update(self, x):
        return self.drop(x.to(self.lora_A.dtype) @ self.lora_A.T) @ self.lora_B.T * self.scale


@mistake(LoRALinear, "Dropout is accepted and not applied.", fails=("values_dropped",))
class NeverDrops(Steps):
    def drop(self, x):
        return x


@mistake(
    LoRALinear,
    "What dropout leaves is not divided by 1 - dropout, so the update is quieter in training than after it.",
    fails=("values_dropped",),
)
class NotRescaled(Steps):
    def drop(self, x):
        return super().drop(x) * (1 - self.dropout if self.training else 1)


@mistake(LoRALinear, "`dropout` is taken for the part that stays.", fails=("values_dropped",))
class KeepsThatMuch(Steps):
    def drop(self, x):
        return nn.functional.dropout(x, 1 - self.dropout, self.training and self.dropout > 0)


@mistake(
    LoRALinear,
    "One mask serves all rows, so a whole batch loses the same inputs.",
    fails=("known_matrices", "values_dropped"),
)
class OneMaskForAll(Steps):
    def drop(self, x):
        return x * nn.functional.dropout(torch.ones_like(x[..., :1, :]), self.dropout, self.training)


@mistake(
    LoRALinear,
    "Any rank is taken: rank 0 divides by zero, and one above min(in, out) costs more than it can express.",
    fails=("refused",),
)
class AnyRank(Steps):
    def check(self, rank, inputs, outputs, dropout):
        self.check_dropout(dropout)


@mistake(
    LoRALinear,
    "The rank is held against the larger of in and out, and above the smaller one B A gains nothing.",
    fails=("refused",),
)
class RankUpToTheLarger(Steps):
    def check(self, rank, inputs, outputs, dropout):
        super().check(rank, max(inputs, outputs), max(inputs, outputs), dropout)


@mistake(
    LoRALinear,
    "A rank of min(in, out) is refused, although B A may have full rank.",
    fails=("known_matrices", "refused"),
)
class FullRankRefused(Steps):
    def check(self, rank, inputs, outputs, dropout):
        super().check(rank, inputs - 1, outputs - 1, dropout)


@mistake(
    LoRALinear,
    "dropout = 1 is accepted: the update is zero in training and nothing is learned.",
    fails=("refused",),
)
class DropsEverything(Steps):
    def check_dropout(self, dropout):
        if dropout < 0 or dropout > 1:
            raise ValueError("dropout")


@alternative(LoRALinear, "Calls functional.linear with a B that is scaled, and keeps the flag as extra state")
class ScaledB(Steps):
    def flag(self):
        self.is_merged = torch.zeros(1)

    def get_extra_state(self):
        return {"merged": bool(self.is_merged)}

    def set_extra_state(self, state):
        self.is_merged.fill_(state["merged"])

    def update(self, x):
        return nn.functional.linear(nn.functional.linear(self.thin(x), self.lora_A), self.lora_B * self.scale)


@alternative(LoRALinear, "Flattens the batch, multiplies with einsum, and merges rank by rank in float64")
class RankByRank(Steps):
    def update(self, x):
        rows = self.thin(x).reshape(-1, x.shape[-1])
        thin = torch.einsum("ti,ri->tr", rows, self.lora_A * self.scale)
        update = torch.einsum("tr,or->to", thin, self.lora_B)
        return update.reshape(*x.shape[:-1], self.lora_B.shape[0])

    def product(self):
        total = 0
        for column, row in zip(self.lora_B.double().T, self.lora_A.double(), strict=True):
            total = total + torch.outer(column, row)
        return total * self.scale


@alternative(LoRALinear, "Adds in the dtype of A before it rounds, both in forward and when it merges")
class RoundsOnce(Steps):
    def forward(self, x):
        y = self.base(x)
        return y if self.is_merged else torch.add(y.to(self.lora_A.dtype), self.update(x)).to(y.dtype)

    @torch.no_grad()
    def put(self, weight):
        self.base.weight.copy_(weight)

    def merge(self):
        if not self.is_merged:
            self.put(self.base.weight + self.product())
        self.is_merged.fill_(1)

    def unmerge(self):
        if self.is_merged:
            self.put(self.base.weight - self.product())
        self.is_merged.fill_(0)


@mistake(
    LoRALinear,
    "merge() puts a new tensor in the place of base.weight: whatever shares the weight keeps the old values.",
    fails=("merged_and_back",),
)
class NewFrozenParameter(RoundsOnce):
    def put(self, weight):
        self.base.weight = nn.Parameter(weight.detach().to(self.base.weight.dtype), requires_grad=False)


@mistake(
    LoRALinear,
    "state_dict() of the layer leaves the base out, as a file of adapters does: here it is to hold it.",
    fails=("saved", "loaded_elsewhere"),
)
class SavesTheAdaptersAlone(Steps):
    def state_dict(self, *arguments, **options):
        state = super().state_dict(*arguments, **options)
        for name in [name for name in state if ".base." in f".{name}"]:
            del state[name]
        return state


class WithTheWeightOfBefore(Steps):
    """Keeps the weight of before merge(), and puts it back bit for bit."""

    before = None

    def merge(self):
        if not self.is_merged:
            self.before = self.base.weight.clone()
        super().merge()

    def unmerge(self):
        if self.is_merged and self.before is not None:
            self.base.weight.data.copy_(self.before)
            self.is_merged.fill_(0)
        self.before = None
        super().unmerge()


@mistake(
    LoRALinear,
    "unmerge() puts back a copy that merge() made: of the old weight, where a checkpoint was loaded in between.",
    fails=("loaded_elsewhere",),
)
class CopyOfAnOldWeight(WithTheWeightOfBefore):
    pass


@alternative(LoRALinear, "Keeps the weight of before merge(), and forgets it when a checkpoint is loaded")
class CopyThatIsForgotten(WithTheWeightOfBefore):
    def _load_from_state_dict(self, *arguments):
        self.before = None
        super()._load_from_state_dict(*arguments)
