"""quantize_kv_cache against Python's floats, appending in all ways, and attention in float64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import judging
from llmcourse.counting import TensorWork
from llmcourse.exercise import find
from llmcourse.lessons.quantization import quantize_kv_cache as lesson

found = find("quantize_kv_cache")
quantize_kv_cache = found.reference
EPS = torch.finfo(torch.float32).eps


def keys_and_values(seed: int, heads: int, tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    """Two channels of keys are loud and off zero, as those of large models are; a constructed law of inputs."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, tokens, channels, generator=generator)
    keys[..., :2] = keys[..., :2] * 3 + 30
    return keys, torch.randn(heads, tokens, channels, generator=generator)


def appended(keys: Tensor, values: Tensor, sizes: list[int], **options: int) -> dict[str, Tensor]:
    cache = None
    for part_of_keys, part_of_values in zip(
        keys.split(sizes, dim=1), values.split(sizes, dim=1), strict=True
    ):
        cache = quantize_kv_cache(cache, part_of_keys, part_of_values, **options)
    assert cache is not None
    return cache


def restored(cache: dict[str, Tensor], group_size: int) -> tuple[Tensor, Tensor]:
    """Keys and values that a cache stands for, float64 [H, n, D]."""
    scales, minima = (
        cache[name].double().repeat_interleave(group_size, dim=1) for name in ("key_scales", "key_minima")
    )
    keys = cache["key_codes"] * scales + minima
    scales, minima = (cache[name].double()[..., None] for name in ("value_scales", "value_minima"))
    values = cache["value_codes"] * scales + minima
    return torch.cat([keys, cache["recent_keys"]], 1), torch.cat([values, cache["recent_values"]], 1)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_what_python_s_floats_give(seed: int, bits: int) -> None:
    keys, values = keys_and_values(seed, 2, 17, 5)
    found = quantize_kv_cache(None, keys, values, bits=bits, group_size=4, window=3)
    assert found["key_codes"].shape == (2, 12, 5)
    assert found["value_codes"].shape == (2, 14, 5)

    def check(group: Tensor, codes: Tensor, scale: Tensor, minimum: Tensor) -> None:
        step = (float(max(group)) - float(min(group))) / (2**bits - 1)
        assert minimum.item() == float(min(group))
        assert scale.item() == pytest.approx(step, rel=2 * EPS)
        assert (codes.min(), codes.max()) == (0, 2**bits - 1)
        for value, code in zip(group.tolist(), codes.tolist(), strict=True):
            exact = (value - float(min(group))) / step
            # x - minimum, the scale and the quotient are rounded, half an eps each and two for the scale.
            assert abs(code - exact) <= 0.5 + 2.5 * EPS * exact

    for head in range(2):
        for group in range(3):
            rows = slice(4 * group, 4 * group + 4)
            for channel in range(5):
                check(
                    keys[head, rows, channel],
                    found["key_codes"][head, rows, channel],
                    found["key_scales"][head, group, channel],
                    found["key_minima"][head, group, channel],
                )
        for token in range(14):
            check(
                values[head, token],
                found["value_codes"][head, token],
                found["value_scales"][head, token],
                found["value_minima"][head, token],
            )


def test_appending_in_any_runs_gives_what_one_call_gives(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        options = {
            "bits": draw.randint(2, 8),
            "group_size": draw.randint(1, 9),
            "window": draw.randint(0, 12),
        }
        tokens = draw.randint(1, 60)
        keys, values = keys_and_values(draw.getrandbits(32), draw.randint(1, 3), tokens, draw.randint(1, 8))
        sizes: list[int] = []
        while sum(sizes) < tokens:
            sizes.append(min(draw.randint(1, 15), tokens - sum(sizes)))
        at_once = quantize_kv_cache(None, keys, values, **options)
        assert same(appended(keys, values, sizes, **options), at_once), (sizes, options)
        assert same(appended(keys, values, [1] * tokens, **options), at_once), options


def test_codes_once_written_stay_and_no_token_is_lost_over_a_hundred_appends(seed: int) -> None:
    keys, values = keys_and_values(seed, 2, 120, 6)
    options = {"bits": 2, "group_size": 7, "window": 5}
    cache = quantize_kv_cache(None, keys[:, :20], values[:, :20], **options)
    for n in range(21, 121):
        new = quantize_kv_cache(cache, keys[:, n - 1 : n], values[:, n - 1 : n], **options)
        for name in ("key_codes", "key_scales", "key_minima", "value_codes", "value_scales", "value_minima"):
            assert torch.equal(new[name][:, : cache[name].shape[1]], cache[name])
        assert new["key_codes"].shape[1] == max(0, n - 5) // 7 * 7
        assert new["value_codes"].shape[1] == n - 5
        assert torch.equal(new["recent_keys"], keys[:, new["key_codes"].shape[1] : n])
        assert torch.equal(new["recent_values"], values[:, n - 5 : n])
        cache = new


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_value_is_restored_to_half_a_step(seed: int, bits: int) -> None:
    keys, values = keys_and_values(seed, 3, 50, 10)
    cache = quantize_kv_cache(None, keys, values, bits=bits, group_size=8, window=4)
    for found, given, scales in zip(
        restored(cache, 8),
        (keys, values),
        (cache["key_scales"].repeat_interleave(8, dim=1), cache["value_scales"][..., None]),
        strict=True,
    ):
        old = scales.shape[1]
        # Half a step, and what float32 rounds off of a code of up to 2^bits and of x - minimum.
        room = scales * (0.5 + 4 * EPS * 2**bits)
        assert ((found - given)[:, :old].abs() <= room).all()
        assert torch.equal(found[:, old:], given[:, old:].double())


def attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = query.double() @ keys.double().mT / math.sqrt(keys.shape[-1])
    return scores.softmax(dim=-1) @ values.double()


def per_token(x: Tensor, bits: int) -> Tensor:
    """x through codes with one scale a token, float64."""
    x = x.double()
    low, high = x.aminmax(dim=-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


@pytest.mark.parametrize("bits", [2, 4])
def test_with_loud_channels_keys_per_channel_serve_attention_better_than_keys_per_token(
    seed: int, bits: int
) -> None:
    keys, values = keys_and_values(seed, 4, 256, 32)
    query = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(seed + 1))
    query[..., :2] /= 10  # else the loud channels alone decide which token is looked at
    exact = attention(query, keys, values)
    restored_keys, _ = restored(quantize_kv_cache(None, keys, values, bits=bits, group_size=32, window=0), 32)
    error = (attention(query, restored_keys, values) - exact).norm()
    error_per_token = (attention(query, per_token(keys, bits), values) - exact).norm()
    assert error < error_per_token / 2


@pytest.mark.parametrize("values_in", [torch.bfloat16, torch.float32])
def test_recent_tokens_keep_their_dtype(values_in: torch.dtype) -> None:
    keys, values = keys_and_values(0, 2, 12, 4)
    cache = appended(keys.bfloat16(), values.to(values_in), [7, 5], bits=4, group_size=4, window=3)
    assert (cache["recent_keys"].dtype, cache["recent_values"].dtype) == (torch.bfloat16, values_in)
    assert {cache[name].dtype for name in ("key_scales", "key_minima", "value_scales", "value_minima")} == {
        torch.float32
    }


def test_groups_of_one_value_come_back_exactly() -> None:
    keys = torch.full((1, 8, 3), -7.25)
    cache = quantize_kv_cache(None, keys, keys, bits=2, group_size=4, window=0)
    assert not cache["key_codes"].any()
    assert (cache["key_scales"] == 1).all()
    assert all(torch.equal(part, keys.double()) for part in restored(cache, 4))


def test_the_cache_holds_no_storage_beside_what_it_shows(seed: int) -> None:
    keys, values = keys_and_values(seed, 2, 200, 8)
    for tokens in range(100, 112):
        sizes = [tokens - 2, 1, 1]
        cache = appended(keys[:, :tokens], values[:, :tokens], sizes, bits=4, group_size=4, window=6)
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in cache.values())
        assert len({part.untyped_storage().data_ptr() for part in cache.values()}) == len(cache)


def test_one_more_token_makes_nothing_larger_than_the_codes(seed: int) -> None:
    keys, values = keys_and_values(seed, 2, 1024, 16)
    options = {"bits": 2, "group_size": 32, "window": 32}
    cache = quantize_kv_cache(None, keys[:, :-1], values[:, :-1], **options)
    with TensorWork() as work:
        cache = quantize_kv_cache(cache, keys[:, -1:], values[:, -1:], **options)
    assert cache["key_codes"].shape[1] == 992
    assert work.largest_tensor_bytes <= cache["key_codes"].nbytes


def test_the_arguments_are_left_alone(seed: int) -> None:
    keys, values = keys_and_values(seed, 2, 30, 4)
    options = {"bits": 3, "group_size": 4, "window": 6}
    prompt = quantize_kv_cache(None, keys[:, :20], values[:, :20], **options)
    kept = {name: part.clone() for name, part in prompt.items()}
    quantize_kv_cache(prompt, keys[:, 20:], values[:, 20:], **options)["recent_keys"].zero_()
    assert same(prompt, kept)


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1, "group_size": 4, "window": 2},
        {"bits": 9, "group_size": 4, "window": 2},
        {"bits": 4, "group_size": 0, "window": 2},
        {"bits": 4, "group_size": 4, "window": -1},
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"expected 2\.\.8"):
        quantize_kv_cache(None, *keys_and_values(0, 2, 6, 4), **options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda k, v: (k, v[:, 1:]), "expected the same"),
        (lambda k, v: (k[:, :0], v[:, :0]), "not empty"),
        (lambda k, v: (k[..., :0], v[..., :0]), "not empty"),
        (lambda k, v: (k[0], v[0]), "values to unpack"),
        (lambda k, v: (k * torch.nan, v), "NaN or Inf"),
        (lambda k, v: (k, v / 0), "NaN or Inf"),
        (lambda k, v: (k[:1], v[:1]), "the cache has"),
        (lambda k, v: (k[..., 1:], v[..., 1:]), "the cache has"),
    ],
)
def test_tokens_that_do_not_fit_or_are_broken_are_refused(spoil: Any, message: str) -> None:
    options = {"bits": 4, "group_size": 4, "window": 2}
    keys, values = keys_and_values(0, 2, 6, 4)
    cache = quantize_kv_cache(None, keys, values, **options)
    with pytest.raises(ValueError, match=message):
        quantize_kv_cache(cache, *spoil(keys, values), **options)


# ------------------------------------------------------------------------------- answers that are wrong somewhere


def points_of(answer: Any, seed: int) -> float:
    """What an answer earns."""
    runner = judging.InProcess()
    expected = judging.expectations(runner, found, seed)
    return judging.judge(runner, found, answer, seed, expected, naming=False).points


Step = Callable[..., Any]


def refusing(is_bad: Callable[[Tensor], Any]) -> Step:
    """An answer that refuses by another test of keys and of values."""

    def refuse_values(self: Any, keys: Tensor, values: Tensor) -> None:
        if is_bad(keys) or is_bad(values):
            raise ValueError("values")

    return lesson.variant(refuse_values=refuse_values)


def scaled(scale_of: Callable[[Tensor], Tensor]) -> Step:
    return lesson.variant(
        scale=lambda self, span, bits: torch.where(span == 0, 1.0, scale_of(span / self.levels(bits)))
    )


def allowing(allowed: Callable[[Tensor, Tensor], bool]) -> Step:
    """An answer that works for some keys and values only."""

    def answer(cache: Any, keys: Tensor, values: Tensor, **options: int) -> Any:
        assert keys.dim() != 3 or allowed(keys, values)
        return lesson.variant()(cache, keys, values, **options)

    return answer


def at_most(option: str, most: int) -> Step:
    return lambda *given, **options: lesson.variant()(
        *given, **{**options, option: min(options[option], most)}
    )


WRONG: dict[str, Step] = {
    "sum": refusing(lambda x: ~x.float().sum().isfinite()),
    "sum as it is": refusing(lambda x: ~x.sum().isfinite()),
    "NaN alone": refusing(lambda x: x.isnan().any()),
    "Inf alone": refusing(lambda x: x.isinf().any()),
    "plus Inf and NaN": refusing(lambda x: (x.isnan() | (x == torch.inf)).any()),
    "minus Inf and NaN": refusing(lambda x: (x.isnan() | (x == -torch.inf)).any()),
    "first head": refusing(lambda x: ~x[0].isfinite().all()),
    "last head": refusing(lambda x: ~x[-1].isfinite().all()),
    "first token": refusing(lambda x: ~x[:, 0].isfinite().all()),
    "last token": refusing(lambda x: ~x[:, -1].isfinite().all()),
    **{f"above {floor}": scaled(lambda s, floor=floor: s.clamp_min(floor)) for floor in (1e-5, 1e-11, 1e-30)},
    **{
        f"1 below {floor}": scaled(lambda s, floor=floor: torch.where(s < floor, 1.0, s))
        for floor in (1e-8, 1e-30, 1e-35)
    },
    "epsilon added": scaled(lambda s: s + 1e-8),
    "no float16": allowing(lambda keys, values: keys.dtype != torch.float16),
    "one dtype": allowing(lambda keys, values: keys.dtype == values.dtype),
    "several heads": allowing(lambda keys, values: len(keys) > 1),
    "several channels": allowing(lambda keys, values: keys.shape[2] > 1),
    "groups of 8": at_most("group_size", 8),
    "a window of 18": at_most("window", 18),
    **{f"at most {most} bits": at_most("bits", most) for most in (5, 6, 7)},
}


@pytest.mark.parametrize("name", WRONG)
def test_an_answer_that_is_wrong_somewhere_loses_points(name: str, seed: int) -> None:
    assert points_of(WRONG[name], seed) < found.points


def test_the_answer_that_these_are_made_of_is_right(seed: int) -> None:
    assert points_of(lesson.variant(), seed) == found.points
