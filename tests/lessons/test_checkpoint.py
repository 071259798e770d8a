"""checkpoint against a plain run, bit for bit, and against torch.utils.checkpoint; what lives, and what runs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as torchs
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from llmcourse import judging
from llmcourse.counting import Counted, TensorWork, saved_bytes
from llmcourse.exercise import find
from llmcourse.lessons.optimizers.checkpoint import Hooked, hooked, rerun
from llmcourse.model import Decoder, ModelConfig

exercise = find("checkpoint")
checkpoint = exercise.reference


def plain(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return function(*inputs, **options)


def torchs_own(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return torchs.checkpoint(function, *inputs, use_reentrant=False, **options)


def some_module(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(7, 19), nn.GELU(), nn.Dropout(0.4), nn.Linear(19, 5), nn.LayerNorm(5), nn.Dropout(0.2)
    ).to(dtype)


def trained(how: Callable[..., Any], seed: int, dtype: torch.dtype, segments: int = 3) -> list[Tensor]:
    """Two steps of gradients through segments, with a draw between, and where the generator ends."""
    first = some_module(seed, dtype)
    modules = [
        first,
        *(nn.Sequential(nn.Linear(5, 7).to(dtype), copy.deepcopy(first)) for _ in range(segments)),
    ]
    x = torch.randn(4, 7, dtype=dtype, requires_grad=True)
    found = []
    for _ in range(2):
        h = x
        for module in modules:
            h = how(module, h)
        found.append(torch.rand(2))
        h.square().sum().backward()
        found += [h.detach(), torch.rand(2)]
    return [*found, x.grad, *(p.grad for module in modules for p in module.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("how", [checkpoint, torchs_own], ids=["ours", "torch's"])
def test_everything_is_bit_equal_to_a_plain_run_with_dropout(
    seed: int, how: Callable[..., Any], dtype: torch.dtype
) -> None:
    for one, other in zip(trained(plain, seed, dtype), trained(how, seed, dtype), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_forward(seed: int, dtype: torch.dtype) -> None:
    found = []
    for how in (plain, checkpoint):
        module = some_module(seed)
        x = torch.randn(4, 7, requires_grad=True)
        with torch.autocast("cpu", dtype=dtype):
            y = how(module, x)
        y.float().square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in module.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not torch.is_autocast_enabled("cpu")


def test_a_block_of_the_course_s_decoder_is_bit_equal(seed: int) -> None:
    torch.manual_seed(seed)
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Decoder(config)
    tokens = torch.randint(0, 50, (2, 9))
    found = []
    for how in (plain, checkpoint):
        model.zero_grad()
        logits = how(model, tokens)  # no input requires a gradient
        logits.square().mean().backward()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_it_saves_nothing_through_autograd_and_runs_twice(seed: int) -> None:
    module, x = Counted(some_module(seed)), torch.randn(4, 7, requires_grad=True)
    parameters = list(module.parameters())
    with saved_bytes(ignore=[*parameters, x]) as without:
        module(x)
    with saved_bytes(ignore=[*parameters, x]) as with_it:
        y = checkpoint(module, x)
    assert with_it.total_bytes == 0
    assert without.total_bytes > 4 * 19 * 4
    assert module.calls == 2
    y.sum().backward()
    assert module.calls == 3


def test_no_tensor_of_the_inside_lives_between(seed: int) -> None:
    torch.manual_seed(seed)
    made: list[StorageWeakRef] = []

    def noted(x: Tensor) -> Tensor:
        inside = [x.exp()]
        for _ in range(3):
            inside.append(inside[-1].tanh() * 2)
        made.extend(StorageWeakRef(part.untyped_storage()) for part in inside)
        return inside[-1] + 1

    x = torch.randn(50, 50, requires_grad=True)
    for how, living in ((plain, [True]), (checkpoint, [])):
        made.clear()
        y = how(noted, x)
        gc.collect()
        assert [True for one in made if not one.expired()][:1] == living
        y.sum().backward()
        gc.collect()
        assert all(one.expired() for one in made)


@pytest.mark.parametrize(("rows", "width", "hidden"), [(8, 16, 40), (3, 30, 11)])
def test_products_are_four_thirds_of_a_plain_run(seed: int, rows: int, width: int, hidden: int) -> None:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))
    x = torch.randn(rows, width, requires_grad=True)
    flops = []
    for how in (plain, checkpoint):
        with TensorWork() as work:
            how(module, x).sum().backward()
        flops.append(work.flops)
    assert flops[0] == 3 * 2 * rows * 2 * width * hidden
    assert 3 * flops[1] == 4 * flops[0]


def test_gradients_are_those_of_a_formula() -> None:
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    checkpoint(lambda x, power, *, scale: (scale * x) ** power, x, 3, scale=scale).sum().backward()
    # d/dx (s x)^3 = 3 s^3 x^2; d/ds = 3 s^2 x^3, summed.
    assert x.grad is not None
    assert scale.grad is not None
    assert x.grad.tolist() == [3 * 27 * 0.25, 3 * 27 * 1.0, 3 * 27 * 4.0]
    assert scale.grad.item() == 3 * 9 * (0.125 - 1 + 8)


def test_gradcheck_through_a_checkpoint(seed: int) -> None:
    torch.manual_seed(seed)
    w = torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: checkpoint(lambda x: (x @ w.T).sin().cumsum(1), x), (x,))


def test_torch_autograd_grad_works_too(seed: int) -> None:
    module, x = some_module(seed).eval(), torch.randn(4, 7)
    asked = list(module.parameters())
    for one, other in zip(
        torch.autograd.grad(module(x).sum(), asked),
        torch.autograd.grad(checkpoint(module, x).sum(), asked),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_outputs_keep_their_kind_and_whether_they_require_gradients() -> None:
    x = torch.ones(3, requires_grad=True)
    y = checkpoint(lambda x: (x.exp(), None, 3, "a", x.detach(), x.argmax()), x)
    assert isinstance(y, tuple)
    assert y[1:4] == (None, 3, "a")
    assert [part.requires_grad for part in (y[0], y[4], y[5])] == [True, False, False]
    assert checkpoint(lambda: None) is None
    with torch.no_grad():
        assert not checkpoint(torch.exp, x).requires_grad


@pytest.mark.parametrize("by_name", [False, True])
def test_an_input_changed_in_place_is_an_error_as_it_is_in_a_plain_run(by_name: bool) -> None:
    for how in (plain, checkpoint, torchs_own):
        x, factor = torch.ones(3, requires_grad=True), torch.ones(3)
        y = how(lambda x, factor: x * factor, x, factor=factor) if by_name else how(torch.mul, x, factor)
        factor.mul_(2)
        if how is torchs_own and by_name:
            continue  # which watches positional inputs only
        with pytest.raises(RuntimeError, match="in ?place"):
            y.sum().backward()


def test_errors_of_the_function_go_through_and_leave_nothing_behind() -> None:
    x = torch.ones(3, requires_grad=True)

    def breaks(x: Tensor) -> Tensor:
        raise LookupError(f"a {len(x.exp())}")

    with pytest.raises(LookupError, match="a 3"):
        checkpoint(breaks, x)
    with saved_bytes() as saved:
        x.exp()
    assert saved.total_bytes == 12  # hooks of ours would have taken it


# ----------------------------------------------------------------------------------------------------- attacks


def parameters_of_modules(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Gradients by autograd.grad, of the inputs and of what is found in function.parameters()."""
    found = list(function.parameters()) if isinstance(function, nn.Module) else []

    def ends(self, tensors, results, gradients):
        pairs = self.pairs(results, gradients)
        asked = [part for part in [*tensors, *found] if part.requires_grad]
        taken = torch.autograd.grad([p for p, _ in pairs], asked, [g for _, g in pairs], allow_unused=True)
        by = dict(zip(map(id, asked), taken, strict=True))
        for part in found:
            part.grad = by[id(part)] if part.grad is None else part.grad + by[id(part)]
        return [by.get(id(tensor)) for tensor in tensors]

    return rerun(ends=ends)(function, *inputs, **options)


def without_dropout(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """The second run in eval mode, where dropout cannot differ."""

    def call_again(self):
        if isinstance(function, nn.Module):
            function.eval()
        return self.call()

    return hooked(call_again=call_again)(function, *inputs, **options)


def small_ones_as_they_are(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    small = sum(part.numel() for part in inputs if isinstance(part, Tensor)) < 1000
    return (plain if small else hooked())(function, *inputs, **options)


def large_ones_as_they_are(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    small = sum(part.numel() for part in inputs if isinstance(part, Tensor)) < 1000
    return (hooked() if small else plain)(function, *inputs, **options)


def hooks_left_on_after_an_error(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    segment = Hooked(function, inputs, options)
    torch._C._autograd._push_saved_tensors_default_hooks(segment.number, segment.take)
    result = segment.call()
    torch._C._autograd._pop_saved_tensors_default_hooks()
    return result


def errors_swallowed(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    try:
        return hooked()(function, *inputs, **options)
    except LookupError:
        return None


def lists_for_tuples(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    result = hooked()(function, *inputs, **options)
    return list(result) if isinstance(result, tuple) else result


def tensors_of_a_tuple_only(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    result = hooked()(function, *inputs, **options)
    return tuple(p for p in result if isinstance(p, Tensor)) if isinstance(result, tuple) else result


def generator_of_the_caller_only(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Puts the state of forward back, and leaves it there."""

    def run_again(self):
        torch.set_rng_state(self.generator)
        Hooked.run_again(self)
        torch.set_rng_state(self.generator)

    return hooked(run_again=run_again)(function, *inputs, **options)


def gradients_set_not_added(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    for part in inputs:
        if isinstance(part, Tensor) and part.is_leaf:
            part.grad = None
    return hooked()(function, *inputs, **options)


ATTACKS = {
    attack.__name__: attack
    for attack in (
        *(parameters_of_modules, small_ones_as_they_are, large_ones_as_they_are, errors_swallowed),
        *(hooks_left_on_after_an_error, lists_for_tuples, tensors_of_a_tuple_only),
        *(generator_of_the_caller_only, gradients_set_not_added, without_dropout),
    )
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_answer_that_is_wrong_at_the_edge_loses_points(name: str, seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, ATTACKS[name], seed, expected, naming=False)
    if name == "hooks_left_on_after_an_error":
        while torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
            torch._C._autograd._pop_saved_tensors_default_hooks()
    assert verdict.points < exercise.points


@pytest.mark.parametrize("right", [hooked(), rerun()], ids=["hooks", "function"])
def test_the_answers_that_the_attacks_are_made_of_are_right(right: Callable[..., Any], seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, right, seed, expected, naming=False)
    assert verdict.points == exercise.points, verdict.reason


def test_torch_s_own_is_right_where_it_is_not_switched_off(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    names = [
        name for name in exercise.items if name != "changed_in_between"
    ]  # it watches no keyword arguments
    own = torchs.checkpoint
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exercise, "forbid", ())
        verdict = judging.judge(
            runner,
            exercise,
            lambda function, *inputs, **options: own(function, *inputs, use_reentrant=False, **options),
            seed,
            expected,
            naming=False,
        )
    wrong = [r.item.name for r in verdict.results if not r.agrees and r.item.name in names]
    assert wrong == []


def test_torch_s_own_is_switched_off(seed: int) -> None:
    runner = judging.InProcess()
    expected = judging.expectations(runner, exercise, seed)
    verdict = judging.judge(runner, exercise, torchs_own, seed, expected, naming=False)
    assert verdict.points == 0
