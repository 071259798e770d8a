from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse import compression
from llmcourse.compression import Method, Quantized, Windows
from llmcourse.model import Decoder, ModelConfig

# ------------------------------------------- stand-ins for the exercises, so that these tests need no lesson


def nearest(weight: Tensor, *, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    codes, scales = torch.zeros(weight.shape, dtype=torch.int8), []
    for start in range(0, weight.shape[1], group_size):
        group = weight[:, start : start + group_size]
        scale = group.abs().amax(1) / top
        scale[scale == 0] = 1
        codes[:, start : start + group_size] = (group / scale[:, None]).round().clamp(-top, top)
        scales.append(scale)
    return codes, torch.stack(scales, dim=1)


def scaled_by_input(
    weight: Tensor, x: Tensor, *, bits: int, group_size: int, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    largest = x.abs().mean(0).clamp_min(1e-6)
    best: tuple[float, Any] = (math.inf, None)
    for step in range(steps + 1):
        s = largest ** (step / steps)
        s = s / (s.max() * s.min()).sqrt()
        codes, scales = nearest(weight * s, bits=bits, group_size=group_size)
        made = codes * scales.repeat_interleave(group_size, dim=1)[:, : weight.shape[1]] / s
        error = (x @ (made - weight).T).square().sum().item()
        if error < best[0]:
            best = (error, (s, codes, scales))
    return best[1]


def column_wise(
    weight: Tensor, x: Tensor, *, bits: int, group_size: int, damping: float, act_order: bool
) -> tuple[Tensor, Tensor]:
    """Gauss-Seidel on the output error from round-to-nearest's codes: not GPTQ, but it lowers what GPTQ lowers."""
    codes, scales = nearest(weight, bits=bits, group_size=group_size)
    top = 2 ** (bits - 1) - 1
    each = scales.repeat_interleave(group_size, dim=1)[:, : weight.shape[1]]
    hessian = x.T @ x + damping * torch.eye(weight.shape[1])
    current = codes.float()
    for column in range(weight.shape[1]):
        rest = (current * each - weight) @ hessian[:, column]
        step = rest / (hessian[column, column] * each[:, column])
        current[:, column] = (current[:, column] - step).round().clamp(-top, top)
    return current.to(torch.int8), scales


def folded(
    norm: Tensor, weights: list[Tensor], x_max: Tensor, *, alpha: float
) -> tuple[Tensor, list[Tensor]]:
    w_max = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    s = x_max.clamp_min(1e-6) ** alpha / w_max.clamp_min(1e-6) ** (1 - alpha)
    return norm / s, [weight * s for weight in weights]


def one_scale(x: Tensor, bits: int, *, symmetric: bool, signed: bool) -> tuple[Tensor, Tensor]:
    assert symmetric and signed
    return x.abs().max() / (2 ** (bits - 1) - 1), torch.tensor(0, dtype=torch.int32)


OWN: dict[str, Callable[..., Any]] = {
    "quantize_groups": nearest,
    "affine_parameters": one_scale,
    "smooth_scales": folded,
}

# ------------------------------------------------------------------------------------------------ a small model


def small_model(*, key_value_heads: int = 1, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(
        ModelConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=key_value_heads,
            head_dim=16,
            tie_word_embeddings=True,
        )
    ).eval()
    with torch.no_grad():  # initial weights this small leave every logit at 0: make the model say something
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


@pytest.fixture
def model() -> Decoder:
    return small_model()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def windows(model: Decoder) -> Windows:
    """Inputs, and as targets what the model itself finds likeliest: every damage then costs something."""
    inputs = torch.randint(0, 64, (6, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return inputs, model(inputs).argmax(-1)


@torch.no_grad()
def logits(model: Decoder, tokens: Tensor) -> Tensor:
    return model(tokens)


# --------------------------------------------------------------------------------------------- sites and inputs


def test_every_linear_of_the_layers_is_at_exactly_one_site(model: Decoder) -> None:
    named = [name for site in compression.sites(model) for name in site.linears]
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(named) == sorted(set(linears) - {"lm_head"})
    assert len(named) == len(set(named)) == 14


def test_scales_before_o_proj_fold_only_where_every_head_has_its_own_values() -> None:
    shared = {site.name: site.folds for site in compression.sites(small_model(key_value_heads=1))}
    own = {site.name: site.folds for site in compression.sites(small_model(key_value_heads=2))}
    assert not shared["model.layers.0.self_attn.o"]
    assert own["model.layers.0.self_attn.o"]


def test_calibration_inputs_reproduce_what_each_layer_was_given(model: Decoder, tokens: Tensor) -> None:
    found = compression.calibration_inputs(model, tokens)
    with torch.no_grad():
        embedded = model.model.embed_tokens(tokens)
        normed = model.model.layers[0].get_submodule("input_layernorm")(embedded)
    assert torch.equal(found["model.layers.0.self_attn.qkv"], normed.flatten(0, 1))
    assert found["model.layers.1.mlp.down"].shape == (96, 80)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_empty_calibration_set_is_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match="at least one"):
        compression.calibration_inputs(model, torch.zeros(0, 24, dtype=torch.long))


def test_hooks_are_gone_after_a_failure(model: Decoder) -> None:
    with pytest.raises(IndexError):
        compression.calibration_inputs(model, torch.full((1, 4), 10**6))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_window_losses_average_to_the_loss_of_the_windows(model: Decoder, windows: Windows) -> None:
    inputs, targets = windows
    whole = torch.nn.functional.cross_entropy(logits(model, inputs).flatten(0, 1), targets.flatten())
    losses = compression.window_losses(model, windows, batch_size=4)
    assert losses.shape == (6,)
    # Sums of 144 float32 terms in another order: 144 * 2^-24 relative at most.
    assert losses.mean().item() == pytest.approx(whole.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), (32, 3), (64, 2)])
def test_bits_count_codes_and_scales_of_short_groups_too(group_size: int | None, groups: int) -> None:
    weight = torch.randn(10, 80, generator=torch.Generator().manual_seed(3))
    made = compression.round_to_nearest(nearest, group_size=group_size).quantize(weight, weight, 3)
    assert made.stored_bits == 3 * 800 + 16 * 10 * groups


def test_rounding_moves_no_weight_by_more_than_half_a_step_and_its_scale_s_rounding() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(4))
    for bits in compression.BITS:
        made = compression.round_to_nearest(nearest, group_size=32).quantize(weight, weight, bits)
        largest = weight.view(16, 2, 32).abs().amax(-1)
        step = (largest / (2 ** (bits - 1) - 1)).repeat_interleave(32, dim=1)
        # Half a step, and |w| * 2^-11 for the scale's rounding to float16 (normal at these magnitudes).
        bound = step / 2 + largest.repeat_interleave(32, dim=1) * 2**-11 * 1.01
        assert (made.weight - weight).abs().le(bound).all()


def test_awq_s_input_scales_are_divided_out_and_counted_apart() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(5))

    def doubled(weight: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        del options["steps"]
        return torch.full((64,), 2.0), *nearest(weight * 2, **options)

    made = compression.awq(doubled, group_size=32).quantize(weight, weight, 8)
    plain = compression.round_to_nearest(nearest, group_size=32).quantize(weight, weight, 8)
    # Doubling and halving are exact, so nothing but the counting differs.
    assert torch.equal(made.weight, plain.weight)
    assert made.stored_bits == plain.stored_bits
    assert made.input_scale_bits == 16 * 64


def test_awq_sees_evenly_spaced_tokens_and_no_more_than_it_may() -> None:
    seen: list[Tensor] = []

    def record(weight: Tensor, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(x)
        del options["steps"]
        return torch.ones(64), *nearest(weight, **options)

    inputs = torch.arange(10.0)[:, None].expand(10, 64)
    compression.awq(record, most_tokens=4).quantize(torch.ones(2, 64), inputs, 8)
    assert seen[0][:, 0].tolist() == [0, 3, 6, 9]


def test_scales_that_float16_cannot_hold_are_refused() -> None:
    assert compression.stored_scales(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    for scale in (1e-9, 1e9):
        with pytest.raises(ValueError, match="float16"):
            compression.stored_scales(torch.tensor([1.0, scale]))


@pytest.mark.parametrize(
    ("codes", "scales", "match"),
    [
        (torch.zeros(4, 8, dtype=torch.int8), torch.ones(4, 1), "expected codes"),
        (torch.full((4, 8), 9, dtype=torch.int8), torch.ones(4, 2), "do not fit 4 bits"),
    ],
    ids=["a scale for two groups", "a code beyond the bits"],
)
def test_an_answer_that_stores_less_or_more_than_it_says_is_refused(
    codes: Tensor, scales: Tensor, match: str
) -> None:
    method = compression.round_to_nearest(lambda *_, **__: (codes, scales), group_size=4)
    with pytest.raises(ValueError, match=match):
        method.quantize(torch.zeros(4, 8), torch.zeros(2, 8), 4)


def test_mxfp4_values_by_hand() -> None:
    # Codes 0..15 in order, low nibble first, then sixteen codes of 1.0 (code 2); the block's scale is 2^(128 - 127).
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] + [0x22] * 8], dtype=torch.uint8)
    scales = torch.tensor([[128]], dtype=torch.uint8)
    values = compression.fp4_values(packed, scales, None, form="mxfp4")[0]
    positive = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0]
    assert values.tolist() == [*positive, *(-value for value in positive), *[2.0] * 16]


def test_the_smallest_and_largest_power_of_a_block_are_exact() -> None:
    packed = torch.full((1, 32), 0x22, dtype=torch.uint8)  # two blocks of code 2, which stands for 1
    values = compression.fp4_values(packed, torch.tensor([[0, 254]], dtype=torch.uint8), None, form="mxfp4")
    assert values[0, 0].item() == 2.0**-127
    assert values[0, -1].item() == 2.0**127


def test_fp4_bits_count_scale_bytes_and_nvfp4_s_float32() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(6))

    def zeros(x: Tensor, *, form: str) -> tuple[Tensor, Tensor, Tensor | None]:
        block = compression.FP4_BLOCKS[form]
        packed = torch.zeros(x.shape[0], x.shape[1] // 2, dtype=torch.uint8)
        scales = torch.zeros(x.shape[0], x.shape[1] // block, dtype=torch.uint8)
        return packed, scales, torch.tensor(2.0) if form == "nvfp4" else None

    assert compression.mxfp4(zeros).quantize(weight, weight, 4).stored_bits == 256 * 4.25
    assert compression.nvfp4(zeros).quantize(weight, weight, 4).stored_bits == 256 * 4.5 + 32


def test_nvfp4_values_multiply_both_scales() -> None:
    packed = torch.full((1, 8), 0x22, dtype=torch.uint8)
    scales = torch.tensor([[1.5]]).to(torch.float8_e4m3fn).view(torch.uint8)
    assert compression.fp4_values(packed, scales, torch.tensor(0.25), form="nvfp4").unique().item() == 0.375


def test_default_methods_refuse_an_exercise_that_none_of_them_uses() -> None:
    with pytest.raises(ValueError, match="quantise_groups"):
        compression.default_methods({"quantise_groups": nearest})


def test_a_reference_is_looked_up_when_no_answer_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def lookup(name: str) -> Callable[..., Any]:
        asked.append(name)
        return nearest

    monkeypatch.setattr(compression, "reference", lookup)
    compression.round_to_nearest(nearest)
    assert asked == []
    compression.default_methods()
    assert set(asked) == {"quantize_groups", "awq_scales", "gptq_quantize", "block_scaled_fp4"}


# --------------------------------------------------------------------------------------------- a quantized model


def test_quantizing_changes_the_copy_and_only_its_linear_weights(model: Decoder, tokens: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibration = compression.calibrate(model, tokens)
    made = compression.quantize_weights(
        model, compression.round_to_nearest(nearest), 4, calibration=calibration
    ).model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for site in compression.sites(model) for name in site.linears}
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_layers_are_split_back_to_where_they_were_stacked(model: Decoder, tokens: Tensor) -> None:
    calibration = compression.calibrate(model, tokens)
    identity = Method("identity", lambda weight, x, bits: Quantized(weight.clone(), 8 * weight.numel()))
    made = compression.quantize_weights(model, identity, 8, calibration=calibration)
    assert torch.equal(logits(made.model, tokens), logits(model, tokens))
    assert made.bits_per_weight == 8


def test_size_counts_the_codes_and_sixteen_bits_for_the_rest(model: Decoder, tokens: Tensor) -> None:
    calibration = compression.calibrate(model, tokens)
    made = compression.quantize_weights(
        model, compression.round_to_nearest(nearest), 4, calibration=calibration
    )
    linears = [model.get_parameter(f"{n}.weight") for site in compression.sites(model) for n in site.linears]
    weights, rows = sum(linear.numel() for linear in linears), sum(len(linear) for linear in linears)
    rest = sum(parameter.numel() for parameter in model.parameters()) - weights
    assert made.bits_per_weight == 4 + 16 * rows / weights
    assert made.size_bytes == (4 * weights + 16 * rows + 16 * rest) / 8


@pytest.mark.parametrize(("key_value_heads", "counted"), [(1, 2), (2, 0)], ids=["shared", "own"])
def test_input_scales_count_only_where_nothing_absorbs_them(
    tokens: Tensor, key_value_heads: int, counted: int
) -> None:
    model = small_model(key_value_heads=key_value_heads)
    calibration = compression.calibrate(model, tokens)
    with_scales = compression.quantize_weights(
        model, compression.awq(scaled_by_input), 4, calibration=calibration
    )
    plain = compression.quantize_weights(
        model, compression.round_to_nearest(nearest, group_size=64), 4, calibration=calibration
    )
    # 32 input channels of each o_proj, 2 bytes each.
    assert with_scales.size_bytes - plain.size_bytes == counted * 32 * 2


def test_nan_weights_and_bits_a_method_lacks_are_refused(model: Decoder, tokens: Tensor) -> None:
    calibration = compression.calibrate(model, tokens)
    with pytest.raises(ValueError, match="has 4 bits, got 8"):
        compression.quantize_weights(model, compression.mxfp4(nearest), 8, calibration=calibration)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_up"):
        compression.quantize_weights(model, compression.round_to_nearest(nearest), 4, calibration=calibration)


@pytest.mark.parametrize("sequential", [False, True], ids=["at once", "in sequence"])
def test_sequential_methods_are_fed_by_what_is_already_quantized(
    model: Decoder, tokens: Tensor, sequential: bool
) -> None:
    fed: list[Tensor] = []

    def halve(weight: Tensor, inputs: Tensor, bits: int) -> Quantized:
        fed.append(inputs)
        return Quantized(weight / 2, bits * weight.numel())

    made = compression.quantize_weights(
        model,
        Method("halve", halve, sequential=sequential),
        8,
        calibration=compression.calibrate(model, tokens),
    )
    # The finished copy is fed at each site what the site was fed when its turn came, since nothing before it
    # changed any more.
    expected = compression.calibration_inputs(made.model if sequential else model, tokens)
    assert len(fed) == 8
    for inputs, (name, wanted) in zip(fed, expected.items(), strict=True):
        assert torch.equal(inputs, wanted), name
    assert not any(module._forward_pre_hooks for module in made.model.modules())


def test_a_table_has_a_row_for_each_method_and_its_bits_and_pairs_the_windows(
    model: Decoder, tokens: Tensor, windows: Windows
) -> None:
    methods = [
        compression.round_to_nearest(nearest),
        compression.gptq(column_wise, group_size=None),
        compression.mxfp4(lambda *_, **__: (torch.zeros(1), torch.zeros(1), None)),
    ]
    rows = compression.compression_table(model, methods, bits=(8, 2), tokens=tokens, windows=windows)
    found = [(row.method, row.bits) for row in rows]
    assert found == [
        ("as trained", 16),
        ("round to nearest, a scale a row", 8),
        ("round to nearest, a scale a row", 2),
        ("GPTQ, a scale a row", 8),
        ("GPTQ, a scale a row", 2),
    ]
    first = rows[0]
    assert (first.nats, first.nats_error) == (0, 0)
    for row in rows[1:]:
        assert row.perplexity == pytest.approx(first.perplexity * math.exp(row.nats))
        assert row.nats_error > 0
    # The targets are the model's own choices, so six bits less cost it something well beyond the error.
    assert rows[2].nats > rows[1].nats + 3 * rows[2].nats_error
    assert len(compression.table_text(rows).splitlines()) == 6


# ------------------------------------------------------------------------------------------ outliers, smoothing


def test_a_rescaled_model_computes_the_same_to_the_last_bit(model: Decoder, tokens: Tensor) -> None:
    made, chosen = compression.rescaled(model, factor=16, share=0.1)
    assert torch.equal(logits(made, tokens), logits(model, tokens))
    assert [len(channels) for channels in chosen.values()] == [3] * 4
    plain = compression.calibration_inputs(model, tokens)
    loud = compression.calibration_inputs(made, tokens)
    for site in compression.sites(model):
        ratio = torch.ones(plain[site.name].shape[1])
        if site.norm is not None:
            ratio[chosen[site.norm]] = 16
        assert torch.equal(loud[site.name], plain[site.name] * ratio)


@pytest.mark.parametrize("options", [{"factor": 0.0}, {"factor": math.inf}, {"share": 0.0}, {"share": 1.1}])
def test_a_rescaling_that_cannot_be_undone_is_refused(model: Decoder, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        compression.rescaled(model, **options)  # type: ignore[arg-type]


def test_a_smoothed_model_computes_the_same_from_smaller_activations(model: Decoder, tokens: Tensor) -> None:
    loud, _ = compression.rescaled(model, share=0.1)
    inputs = compression.calibration_inputs(loud, tokens)
    made = compression.smoothed(loud, inputs, smooth_scales=folded)
    # Some 20 products in a row of up to 80 terms, each rounded anew: 20 * 81 * 2^-24 is below 1e-4.
    expected = logits(loud, tokens)
    assert (logits(made, tokens) - expected).abs().max() < 1e-4 * expected.abs().max()
    after = compression.calibration_inputs(made, tokens)
    for site in compression.sites(model):
        if site.norm is not None:

            def spread(x: Tensor) -> Tensor:
                peaks = x.abs().amax(0)
                return peaks.max() / peaks.median()

            assert spread(after[site.name]) < spread(inputs[site.name])


# -------------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("per", ["tensor", "token"])
def test_layers_are_fed_values_of_few_codes(model: Decoder, tokens: Tensor, per: compression.Per) -> None:
    inputs = compression.calibration_inputs(model, tokens)
    made = compression.quantize_activations(
        model, 3, per=per, inputs=inputs, affine_parameters=one_scale, quantize_groups=nearest
    )
    fed: list[Tensor] = []
    first = made.get_submodule("model.layers.0.self_attn.k_proj")
    first.register_forward_pre_hook(lambda _, arguments: fed.append(arguments[0]))
    logits(made, tokens)
    rows = fed[0].flatten(0, 1)
    if per == "tensor":
        assert len(rows.unique()) <= 7
    else:
        assert len(rows.unique()) > 7
        assert all(len(row.unique()) <= 7 for row in rows)


def test_fixed_ranges_clip_what_exceeds_them(model: Decoder, tokens: Tensor) -> None:
    inputs = {name: x / 4 for name, x in compression.calibration_inputs(model, tokens).items()}
    made = compression.quantize_activations(
        model, 8, per="tensor", inputs=inputs, affine_parameters=one_scale
    )
    fed: list[Tensor] = []
    first = made.get_submodule("model.layers.0.self_attn.q_proj")
    first.register_forward_pre_hook(lambda _, arguments: fed.append(arguments[0]))
    logits(made, tokens)
    largest = inputs["model.layers.0.self_attn.qkv"].abs().max()
    assert fed[0].abs().max().item() == pytest.approx(largest.item(), rel=1e-6)


def test_a_wrong_per_is_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match='"tensor" or "token"'):
        compression.quantize_activations(model, 8, per="channel", inputs={})  # type: ignore[arg-type]


def test_the_activation_table_has_plain_and_smoothed_rows(
    model: Decoder, tokens: Tensor, windows: Windows
) -> None:
    rows = compression.activation_table(model, bits=(8, 4), tokens=tokens, windows=windows, own=OWN)
    assert [(row.method, row.bits) for row in rows[1:]] == [
        (f"per {per}, {form}", bits)
        for form in ("plain", "smoothed")
        for per in ("tensor", "token")
        for bits in (8, 4)
    ]
    by_name = {(row.method, row.bits): row for row in rows}
    for form in ("plain", "smoothed"):
        assert by_name[f"per tensor, {form}", 4].nats > by_name[f"per tensor, {form}", 8].nats


# ---------------------------------------------------------------------------------------------------- static int8

needs_eager = pytest.mark.skipif(
    torch.backends.quantized.engine == "none" or not hasattr(torch.ao, "quantization"),
    reason="this torch has no eager quantization",
)


@needs_eager
def test_observe_calibrate_convert_keeps_the_model_and_fixes_scales(
    model: Decoder, tokens: Tensor, windows: Windows
) -> None:
    made = compression.static_int8(model, tokens)
    assert len(made.input_scales) == 14
    assert all(0 < scale < 1 for scale in made.input_scales)
    assert not any("observer" in words for words in made.warned)
    lost = compression.perplexity(made.model, windows) / compression.perplexity(model, windows)
    assert 0.5 < lost < 2  # 7-bit activations; the other order is off by far more, below


@needs_eager
def test_converting_first_leaves_every_scale_at_one_and_calibration_without_effect(
    model: Decoder, tokens: Tensor
) -> None:
    made = compression.static_int8(model, tokens, calibrate_first=False)
    assert made.input_scales == (1.0,) * 14
    assert any("must run observer before" in words for words in made.warned)


@needs_eager
def test_the_three_orders_end_in_a_model_a_ruin_and_an_error(
    model: Decoder, tokens: Tensor, windows: Windows
) -> None:
    right, published, bare = compression.static_orders(model, tokens=tokens, windows=windows)
    assert right.failure is None and published.failure is None
    assert right.perplexity is not None and published.perplexity is not None
    assert right.perplexity < published.perplexity
    assert bare.perplexity is None
    assert bare.failure == "NotImplementedError: Could not run 'quantized::linear'"


def test_while_a_notebook_is_graded_a_fraction_of_the_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out, training = compression.held_out_slice(), compression.calibration_tokens()
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    fewer = compression.held_out_slice()
    assert (len(held_out[0]), len(fewer[0]), len(fewer[1])) == (16, 2, 2)
    assert (len(training), len(compression.calibration_tokens())) == (8, 1)
    assert len(compression.held_out_slice(count=3)[0]) == 3
