"""Training runs of lesson 07: the same start and batches for all, what is recorded, what is counted and timed."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmcourse import optimizing, sizing, text, zoo
from llmcourse.optimizing import AdamW8bit, Contender, Muon, Record, Run


def plain(named: Any, rate: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([parameter for _, parameter in named], lr=rate)]


PLAIN = Contender("plain", plain, (0.1,))


def some_run(**changes: Any) -> Run:
    return replace(
        Run("one", 0.1, seed=0, losses=(3.0, 2.0), held_out=2.5, state_bytes=8, parameters=2), **changes
    )


def some_record(*runs: Run) -> Record:
    return Record("corpus", "a machine", "2026-01-01", {}, {}, runs)


# ------------------------------------------------------------------------------------------------------- training


def test_every_optimizer_of_a_seed_starts_from_the_same_weights_and_reads_the_same_batches() -> None:
    first, again, other = (optimizing.started(seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    read, once_more = optimizing.batches(3, 2), optimizing.batches(3, 2)
    assert all(
        torch.equal(a, b)
        for one, two in zip(read, once_more, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    assert not torch.equal(read[0][0], optimizing.batches(4, 1)[0][0])


def test_starting_leaves_the_callers_random_state_alone() -> None:
    before = torch.get_rng_state()
    optimizing.started(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_is_the_loop_written_by_hand() -> None:
    run = optimizing.train(PLAIN, seed=5, rate=0.2, steps=8, stop_after=3)
    model = optimizing.started(5)
    losses = []
    for step, (inputs, targets) in enumerate(optimizing.batches(5, 3)):
        logits = model(inputs).float()
        loss = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients if g is not None))
        # Warm-up over half of 8 steps: a quarter of the rate more in each.
        rate = 0.2 * (step + 1) / 4 * min(1.0, 1.0 / norm)
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= rate * p.grad
    assert run.losses[0] == pytest.approx(losses[0], rel=1e-6)
    assert run.losses == pytest.approx(losses, rel=1e-4)
    assert run.parameters == sum(p.numel() for p in model.parameters())
    assert run.state_bytes == 0
    assert math.isfinite(run.held_out)


def test_a_run_that_is_no_longer_a_number_ends_there_and_says_infinity() -> None:
    def exploding(named: Any, rate: float) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([parameter for _, parameter in named], lr=1e30)]

    run = optimizing.train(Contender("exploding", exploding, ()), seed=0, rate=1.0, steps=6)
    assert len(run.losses) < 6
    assert run.held_out == math.inf


def test_every_step_is_told() -> None:
    told: list[tuple[int, float]] = []
    run = optimizing.train(
        PLAIN, seed=0, rate=0.1, steps=4, stop_after=2, on_step=lambda *one: told.append(one)
    )
    assert told == list(enumerate(run.losses))


# ---------------------------------------------------------------------------------------------- the contenders


def test_only_matrices_decay_and_every_parameter_is_in_one_group() -> None:
    named = list(optimizing.started(0).named_parameters())
    groups = optimizing.matrices_and_vectors(named)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decays) == len(named)
    assert all((decays[id(p)] > 0) == (p.dim() >= 2) for _, p in named)


def test_muon_is_for_hidden_matrices() -> None:
    named = list(optimizing.started(0).named_parameters())
    hidden = {name for name, parameter in named if optimizing.is_hidden_matrix(name, parameter)}
    assert len(hidden) == 7 * zoo.RECIPES["student"].config.num_hidden_layers
    assert not any("norm" in name or "embed" in name for name in hidden)


@pytest.mark.parametrize("entry", optimizing.contenders(), ids=lambda entry: entry.name)
def test_every_contender_learns_with_the_courses_answers(
    entry: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizing, "HELD_OUT_WINDOWS", 2)  # looked at by nobody here
    run = optimizing.train(entry, seed=0, steps=12)
    assert all(map(math.isfinite, run.losses))
    # From about log(1024) = 6.93; twelve steps of warm-up move the slowest of them, SGD, by a tenth of a nat.
    assert run.losses[-1] < run.losses[0] - 0.05


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("SGD, momentum", 4.0, 4.001),
        ("AdamW", 8.0, 8.001),
        ("AdamW, 8-bit state", 2 * (1 + 4 / 256), 0.27 * 8),
        ("Lion", 4.0, 4.001),
        ("Adafactor", 0.01, 0.05),
        ("Muon and AdamW", 4.0, 5.6),
    ],
)
def test_state_bytes_a_parameter(
    name: str, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizing, "HELD_OUT_WINDOWS", 2)
    (entry,) = [entry for entry in optimizing.contenders() if entry.name == name]
    run = optimizing.train(entry, seed=0, steps=2, stop_after=1)
    assert least <= run.state_bytes_per_parameter <= most


def test_a_learners_answer_takes_the_place_of_the_courses() -> None:
    class AdamW(torch.optim.AdamW):
        made = 0

        def __init__(self, *arguments: Any, **options: Any) -> None:
            type(self).made += 1
            super().__init__(*arguments, **options)

    entries = {entry.name: entry for entry in optimizing.contenders({"AdamW": AdamW})}
    named = list(optimizing.started(0).named_parameters())
    entries["AdamW"].build(named, 1e-3)
    entries["Muon and AdamW"].build(named, 1e-3)
    entries["SGD, momentum"].build(named, 1e-3)
    assert AdamW.made == 2


def test_eight_bit_adamw_is_adamw_where_its_storage_keeps_everything() -> None:
    class Everything:
        def __init__(self, values: torch.Tensor, *, signed: bool, block_size: int) -> None:
            self.values = values.clone()

        def read(self) -> torch.Tensor:
            return self.values.clone()

        def write(self, values: torch.Tensor) -> None:
            self.values = values.clone()

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 5, generator=generator)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    own = AdamW8bit([ours], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, state=Everything)
    library = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(20):
        ours.grad = torch.randn(6, 5, generator=generator)
        theirs.grad = ours.grad.clone()
        own.step()
        library.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_muon_steps_along_the_update_and_decays_apart_from_it() -> None:
    seen = []

    def update(gradient: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
        seen.append(momentum)
        return torch.full_like(gradient, 2.0)

    weight = nn.Parameter(torch.full((3, 2), 10.0))
    optimizer = Muon([weight], lr=0.5, weight_decay=0.1, update=update)
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((3, 2), (10 * 0.95 - 1) * 0.95 - 1))
    assert seen[0] is seen[1]


def test_state_bytes_count_a_shared_storage_once_and_look_into_objects() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    shared = torch.zeros(10)

    class Holder:
        def __init__(self) -> None:
            self.parts = [shared[:5], torch.zeros(3, dtype=torch.int8)]

    optimizer.state[weight].update(view=shared[2:], holder=Holder(), step=3)
    assert optimizing.state_bytes([optimizer]) == 40 + 3


# ----------------------------------------------------------------------------------------------------------- times


def test_each_entry_steps_its_own_copies_in_every_round() -> None:
    stepped: dict[str, list[int]] = {}

    def counting(name: str) -> Any:
        def build(named: Any) -> list[torch.optim.Optimizer]:
            optimizer = torch.optim.SGD([parameter for _, parameter in named], lr=0.0)
            stepped[name] = []
            optimizer.register_step_post_hook(lambda *_: stepped[name].append(named[0][1].data_ptr()))
            return [optimizer]

        return build

    threads = torch.get_num_threads()
    times = optimizing.step_times({"a": counting("a"), "b": counting("b")}, rounds=5, seconds=0)
    assert torch.get_num_threads() == threads
    assert set(times) == {"a", "b", "forward and backward"}
    assert all(len(own) == 5 and min(own) >= 0 for own in times.values())
    assert {len(places) for places in stepped.values()} == {6}  # one round more, which is thrown away
    assert set(stepped["a"]).isdisjoint(stepped["b"])


# --------------------------------------------------------------------------------------------------------- records


def test_the_record_that_ships_is_whole_and_of_these_settings() -> None:
    kept = optimizing.recorded()
    assert kept.settings == optimizing.settings()
    for entry in optimizing.contenders():
        runs = kept.of(entry.name)
        assert [run.seed for run in runs] == list(optimizing.SEEDS)
        assert {len(run.losses) for run in runs} == {optimizing.STEPS}
        assert {run.rate for run in runs} == {optimizing.recorded_rate(entry.name)}
        tried = {float(rate): loss for rate, loss in kept.tuning[entry.name].items()}
        assert set(tried) == (set(entry.rates) if len(entry.rates) > 1 else set())
        assert runs[0].rate == min(entry.rates, key=lambda rate: tried.get(rate, 0.0))
    assert optimizing.TUNING_SEED not in optimizing.SEEDS


def test_the_first_steps_of_the_record_can_be_made_again() -> None:
    kept = optimizing.recorded()
    if kept.corpus_fingerprint != text.fingerprint():
        pytest.skip("the corpus of this Python is another than that of the record")
    (entry,) = [entry for entry in optimizing.contenders() if entry.name == "AdamW"]
    run = optimizing.train(entry, seed=0, stop_after=6)
    # Another machine adds in another order; six steps do not let that grow beyond a thousandth.
    assert run.losses == pytest.approx(kept.of("AdamW")[0].losses[:6], rel=1e-3)


def test_eight_bit_moments_stay_within_the_spread_of_the_seeds() -> None:
    kept = optimizing.recorded()
    wide, narrow = ([run.held_out for run in kept.of(name)] for name in ("AdamW", "AdamW, 8-bit state"))
    middle = sum(narrow) / len(narrow)
    assert min(wide) <= middle <= max(wide)
    assert all(math.isfinite(loss) for run in kept.of("AdamW, 8-bit state") for loss in run.losses)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    made = some_record(some_run(), some_run(name="two"))
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(asdict(made)))
    assert optimizing.recorded(path) == made
    assert optimizing.recorded_rate("two", path) == 0.1
    with pytest.raises(ValueError, match="no run of 'three' is recorded; pass a rate"):
        optimizing.recorded_rate("three", path)


def test_a_missing_or_damaged_record_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m llmcourse.optimizing"):
        optimizing.recorded(tmp_path / "none.json")
    path = tmp_path / "runs.json"
    for damaged in ("{", "[]", "{}", json.dumps({"runs": [{"name": "one"}]})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="not a record of optimizer runs"):
            optimizing.recorded(path)


def test_recording_tunes_on_one_seed_keeps_the_others_and_goes_on_after_a_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int, float]] = []

    def train(entry: Contender, *, seed: int, rate: float) -> Run:
        if len(trained) == 5:
            trained.append(("a break", 0, 0.0))
            raise KeyboardInterrupt
        trained.append((entry.name, seed, rate))
        return some_run(name=entry.name, rate=rate, seed=seed, held_out=abs(rate - 0.2) + 1.23456789)

    entries = [Contender("one", plain, (0.1, 0.2, 0.4)), Contender("two", plain, (0.2,))]
    monkeypatch.setattr(optimizing, "train", train)
    monkeypatch.setattr(optimizing, "contenders", lambda: entries)
    path = tmp_path / "runs.json"
    with pytest.raises(KeyboardInterrupt):
        optimizing.record(path, say=lambda line: None)
    assert not path.exists()
    assert optimizing.record(path, names=["one"], say=lambda line: None) is None
    made = optimizing.record(path, say=lambda line: None)
    assert made is not None
    one = [("one", optimizing.TUNING_SEED, rate) for rate in (0.1, 0.2, 0.4)]
    one += [("one", seed, 0.2) for seed in optimizing.SEEDS]
    two = [("two", seed, 0.2) for seed in optimizing.SEEDS]
    assert [done for done in trained if done[0] != "a break"] == one + two
    assert made.tuning == {"one": {"0.1": 1.3346, "0.2": 1.2346, "0.4": 1.4346}, "two": {}}
    assert {run.held_out for run in made.runs} == {1.2346}
    assert optimizing.recorded(path) == made
    assert [file.name for file in tmp_path.iterdir()] == ["runs.json"]


def test_the_table_joins_what_was_recorded_with_what_is_measured() -> None:
    kept = some_record(some_run(held_out=2.0), some_run(seed=1, held_out=4.0), some_run(name="unmeasured"))
    (row,) = optimizing.table(kept, {"one": [0.3, 0.1, 0.2], "forward and backward": [1.0, 3.0, 2.0]})
    assert (row.held_out, row.state_bytes, row.step_s, row.training_step_s) == (3.0, 4.0, 0.2, 2.2)
    assert row.spread == pytest.approx(math.sqrt(2))
    assert "3.000 ± 1.414" in optimizing.table_text([row])


def test_plans_of_memory_are_those_of_the_data() -> None:
    plans = optimizing.memory_plans(sizing.PUBLIC_CONFIGS["Llama-3.1-8B"])
    count, adapters = 8_030_261_248, 41_943_040
    totals = {name: sum(parts.values()) for name, parts in plans.items()}
    assert totals["AdamW"] == 16 * count
    assert totals["AdamW, 8-bit moments"] == pytest.approx((8 + 2 * (1 + 4 / 256)) * count)
    assert totals["LoRA, rank 16, AdamW"] == 2 * count + 16 * adapters


# -------------------------------------------------------------------------------------------------------- exhibits


def test_noise_cannot_be_learned_and_two_linear_layers_are_one() -> None:
    options: dict[str, Any] = {"seeds": range(2), "steps": 800, "rate": 0.05}
    noise = optimizing.toy_losses(activation=False, **options)
    straight = optimizing.toy_losses(activation=False, target=optimizing.curved, **options)
    bent = optimizing.toy_losses(activation=True, target=optimizing.curved, **options)
    assert noise.losses.shape == (2, 800)
    # The mean of 2 x 400 x 160 squares of variance 2 (products: 8): below 1 by no more than five deviations.
    assert noise.losses[:, 400:].mean() > 1 - 5 * math.sqrt(2 / 128_000)
    assert straight.losses[:, 400:].mean() > 1 - 5 * math.sqrt(8 / 128_000)
    assert bent.losses[:, -100:].mean() < 0.9


def test_the_target_has_the_variance_that_is_stated_and_no_affine_part() -> None:
    x = torch.randn(200_000, optimizing.TOY_INPUTS, generator=torch.Generator().manual_seed(0))
    y = optimizing.curved(x)
    assert y.shape == (200_000, optimizing.TOY_OUTPUTS)
    # Five deviations: of a mean 1 / sqrt(n), of a variance sqrt(8 / n), of a correlation 1 / sqrt(n).
    deviation = 1 / math.sqrt(200_000)
    assert y.mean(dim=0).abs().max() < 5 * deviation
    assert (y.var(dim=0) - 1).abs().max() < 5 * math.sqrt(8) * deviation
    assert (x.T @ y / len(x)).abs().max() < 5 * deviation


def test_three_ways_keep_a_thousand_small_steps_and_the_fourth_keeps_none() -> None:
    kept = optimizing.kept_weights()
    ends = {name: values[-1] for name, values in kept.items()}
    assert set(kept["bfloat16, in place"]) == {1.0}
    assert all(len(values) == 1000 for values in kept.values())
    # 0.001 in bfloat16 is 0.00099945; the sum, rounded to 2^-7 below 2.
    assert abs(ends["float32 master"] - 1.9995) <= 2**-8
    assert abs(ends["Kahan's sum"] - 1.9995) <= 2**-6
    # A sum of 1000 steps of 2^-7 or 0, each up with probability 0.128: its deviation is 0.083.
    assert abs(ends["stochastic rounding"] - 2.0) <= 5 * 0.083


def test_the_share_of_weights_that_move_is_counted_by_hand() -> None:
    model = zoo.load("draft")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    share = optimizing.moved_share(model, 1e-3)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    inputs, targets = optimizing.batches(0, 1)[0]
    logits = model(inputs).float()
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    moved = total = 0
    for p in model.parameters():
        assert p.grad is not None
        narrow = p.detach().bfloat16()
        stepped = (narrow.float() - 1e-3 * p.grad.sign()).bfloat16()
        moved += int(((stepped != narrow) & (p.grad != 0)).sum())
        total += int((p.grad != 0).sum())
    assert share == pytest.approx(moved / total)
    assert optimizing.moved_share(model, 1e-6) < share < 1.0
