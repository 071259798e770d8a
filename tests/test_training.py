from __future__ import annotations

import io
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmcourse import text, training
from llmcourse.model import Decoder, ModelConfig
from llmcourse.training import (
    BEGIN_DECAY_FILE,
    STATE_FILE,
    Progress,
    Recipe,
    Run,
    Trained,
    TrainingPaused,
    fixed_windows,
    mean_loss,
    rate_factor,
    train,
)

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
STEPS = 20
STEP_TOKENS = 4 * 8
RECIPE = Recipe(
    TINY,
    tokens=STEPS * STEP_TOKENS,
    batch_size=4,
    context_tokens=8,
    warmup_steps=4,
    evaluate_every_steps=5,
    evaluation_windows=3,
    learning_rate=1e-2,
)
Callback = Callable[[Progress], None]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Steps this small only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A stream that is easy to predict in place of the corpus: t, 3t + 1, … modulo 32, with some noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = [1]
    for draw in torch.rand(999, generator=generator).tolist():
        tokens.append(int(draw * 320) if draw < 0.1 else (3 * tokens[-1] + 1) % 32)
    made = torch.tensor(tokens)
    monkeypatch.setattr(text, "corpus_tokens", lambda split, *, vocab_size: made)
    monkeypatch.setattr(text, "fingerprint", lambda: "one corpus")
    return made


def at(step: int, act: Callable[[], object]) -> Callback:
    """A callback that acts once, after the given step."""

    def on_step(now: Progress) -> None:
        if now.step == step:
            act()

    return on_step


def interrupt(number: int = signal.SIGINT) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def assert_equal(one: Trained, other: Trained) -> None:
    """Bit for bit the same weights, and the same curves."""
    state, wanted = one.model.state_dict(), other.model.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert one.run.train_curve == other.run.train_curve
    assert one.run.held_out_curve == other.run.held_out_curve


# ------------------------------------------------------------------------------------------------------ the loop


def test_training_learns(tmp_path: Path) -> None:
    trained = train(replace(RECIPE, tokens=300 * STEP_TOKENS), tmp_path)
    # Nine tokens in ten follow from the one before and the tenth is one of 32: 0.65 nats at best. Without
    # learning it stays at ln 32 = 3.47; half way is far from either.
    assert trained.run.held_out_curve[-1][1] < 2.0
    assert trained.run.train_curve[-1][1] < 2.0
    assert not trained.model.training


def test_the_curves_count_tokens_and_hold_means(tmp_path: Path) -> None:
    losses: list[float] = []
    evaluated: list[int] = []

    def on_step(now: Progress) -> None:
        (evaluated.append(now.step) if now.evaluated else losses.append(now.train_loss))
        assert now.tokens == now.step * STEP_TOKENS and now.total_steps == STEPS
        assert (now.held_out is None) == (now.step < 5)
        assert now.decaying == (now.step >= 16)

    run = train(RECIPE, tmp_path, on_step=on_step).run
    assert evaluated == [5, 10, 15, 20]
    seen = [step * STEP_TOKENS for step in evaluated]
    assert [tokens for tokens, _ in run.held_out_curve] == [tokens for tokens, _ in run.train_curve] == seen
    # The fifth loss is only in the mean: it must be what the mean of five needs it to be, a loss near the others.
    fifth = 5 * run.train_curve[0][1] - sum(losses[:4])
    assert math.log(32) / 2 < fifth < math.log(32) * 1.5


def test_the_final_evaluation_is_of_the_final_weights(tmp_path: Path, stream: Tensor) -> None:
    recipe = replace(RECIPE, tokens=18 * STEP_TOKENS, bfloat16_autocast=False)  # 18 is no multiple of 5
    trained = train(recipe, tmp_path)
    windows = fixed_windows(stream, count=3, context_tokens=8)
    assert trained.run.held_out_curve[-1] == (18 * STEP_TOKENS, mean_loss(trained.model, windows))


def test_the_same_seed_gives_the_same_weights_and_another_does_not(tmp_path: Path) -> None:
    first = train(RECIPE, tmp_path / "a")
    assert_equal(first, train(RECIPE, tmp_path / "b"))
    other = train(replace(RECIPE, seed=1), tmp_path / "c")
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)


def test_the_callers_random_numbers_stay_as_they_were(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    train(RECIPE, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_step_is_adamw_on_clipped_gradients(tmp_path: Path, stream: Tensor) -> None:
    """One step by hand, from the update rule of Loshchilov and Hutter 2019, algorithm 2."""
    recipe = replace(RECIPE, bfloat16_autocast=False, warmup_steps=1, weight_decay=0.5, gradient_clip=0.1)
    with pytest.raises(TrainingPaused):
        train(recipe, tmp_path, on_step=at(1, interrupt()))
    after = torch.load(tmp_path / STATE_FILE)["model"]

    torch.manual_seed(recipe.seed)
    model = Decoder(TINY)
    inputs, targets = next(text.batches(stream, batch_size=4, context_tokens=8, seed=recipe.seed))
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert norm > recipe.gradient_clip  # else this would not see whether it is clipped
    for name, weight in model.named_parameters():
        gradient = gradients[name] * (recipe.gradient_clip / (norm + 1e-6))
        decay = recipe.weight_decay if weight.dim() == 2 else 0.0
        # After one step both moments, corrected for their start at zero, are the gradient and its square.
        step = gradient / (gradient.abs() + 1e-8)
        wanted = weight * (1 - recipe.learning_rate * decay) - recipe.learning_rate * step
        # Where a gradient is far below 1e-8 the quotient keeps fewer digits: 1e-3 of a step is far from any slip.
        torch.testing.assert_close(after[name], wanted.detach(), rtol=1e-5, atol=1e-3 * recipe.learning_rate)


def test_a_loss_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan at step .*learning_rate below 1e"):
        train(replace(RECIPE, learning_rate=1e30, gradient_clip=1e30), tmp_path)


# ------------------------------------------------------------------------------------------------------- the rate


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    factors = [
        rate_factor(Run(total_steps=20, decay_begins_step=16, step=step), warmup_steps=4)
        for step in range(20)
    ]
    assert factors == [0.25, 0.5, 0.75, *[1.0] * 14, 0.75, 0.5, 0.25]


def test_a_rate_that_falls_before_it_has_risen_never_jumps_up() -> None:
    run = Run(total_steps=5, decay_begins_step=4)
    factors = []
    for run.step in range(5):
        factors.append(rate_factor(run, warmup_steps=100))
    assert max(factors) <= 0.05


@pytest.mark.parametrize("step", range(1, 13))
def test_a_fall_that_is_asked_for_gives_what_a_budget_of_that_length_gives(tmp_path: Path, step: int) -> None:
    """A longer run told to finish, and one that was that long from the start: the same weights."""
    work = tmp_path / "asked"
    asked = train(RECIPE, work, on_step=at(step, lambda: (work / BEGIN_DECAY_FILE).touch()))
    # The file is made after the step and seen after the next one.
    assert asked.run.decay_begins_step == step + 1
    assert asked.run.total_steps == asked.run.step == math.ceil((step + 1) * 5 / 4)
    assert asked.run.decay_reason == "asked for"
    assert not (work / BEGIN_DECAY_FILE).exists()
    if asked.run.total_steps >= 5:
        planned = train(RECIPE, tmp_path / "planned", tokens=asked.run.total_steps * STEP_TOKENS)
        assert planned.run.decay_reason == "budget"
        assert_equal(asked, planned)


def test_a_request_left_by_an_earlier_run_is_not_for_a_new_one(tmp_path: Path) -> None:
    (tmp_path / BEGIN_DECAY_FILE).touch()
    assert train(RECIPE, tmp_path).run.total_steps == STEPS


def test_a_held_out_loss_that_stalls_begins_the_fall(tmp_path: Path) -> None:
    still = replace(RECIPE, learning_rate=1e-12, stall_evaluations=2)
    run = train(still, tmp_path).run
    # The first evaluation is the best; the second and third, at steps 10 and 15, do not improve on it.
    assert (run.decay_begins_step, run.total_steps) == (15, 19)
    assert run.decay_reason == "held-out loss stalled"


@pytest.mark.parametrize(
    ("losses", "since_best"),
    [
        ([3.0, 2.0, 1.0], 0),
        ([3.0, 2.95, 2.85], 0),  # two small steps are one large one: the margin is to the best that counted
        ([3.0, 2.95, 2.95], 2),
        ([3.0, 3.5, 2.0, 2.5], 1),
    ],
    ids=["falls", "falls slowly", "stalls", "rises"],
)
def test_an_improvement_counts_from_the_margin_on(
    losses: list[float], since_best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(total_steps=20, decay_begins_step=16, train_loss_steps=1)
    recipe = replace(RECIPE, stall_margin_nats=0.1)
    for loss in losses:
        monkeypatch.setattr(training, "mean_loss", lambda *arguments, loss=loss: loss)
        run.train_loss_steps = 1
        training._evaluate(Decoder(TINY), recipe, run, (torch.empty(0), torch.empty(0)))
    assert run.evaluations_since_best == since_best


# ------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("step", [1, 3, 7, 15, 16, 18, 19])
def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(tmp_path: Path, step: int) -> None:
    with pytest.raises(TrainingPaused, match=f"paused after {step * STEP_TOKENS} tokens"):
        train(RECIPE, tmp_path / "paused", on_step=at(step, interrupt()))
    steps: list[int] = []
    resumed = train(RECIPE, tmp_path / "paused", on_step=lambda now: steps.append(now.step))
    assert steps == list(range(step + 1, STEPS + 1))
    assert_equal(resumed, train(RECIPE, tmp_path / "whole"))


def test_a_run_that_was_killed_goes_on_from_its_last_state(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    with pytest.raises(Killed):
        train(RECIPE, tmp_path / "killed", on_step=at(9, die), checkpoint_every_s=0)
    steps: list[int] = []
    resumed = train(RECIPE, tmp_path / "killed", on_step=lambda now: steps.append(now.step))
    assert steps[0] == 9  # the ninth was made, but not saved
    assert_equal(resumed, train(RECIPE, tmp_path / "whole"))


def test_a_killed_fall_stays_asked_for(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def ask_and_die() -> None:
        (tmp_path / BEGIN_DECAY_FILE).touch()
        raise Killed

    with pytest.raises(Killed):
        train(RECIPE, tmp_path, on_step=at(3, ask_and_die), checkpoint_every_s=0)
    assert (
        train(RECIPE, tmp_path).run.decay_begins_step == 3
    )  # step 3 was lost, made again, then saw the file


def test_a_save_that_fails_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingPaused):
        train(RECIPE, tmp_path / "full", on_step=at(5, interrupt()))
    before = (tmp_path / "full" / STATE_FILE).read_bytes()
    save = torch.save

    def fill_the_disk(state: object, file: io.BufferedWriter) -> None:
        file.write(b"half a state")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(OSError, match="disk full"):
        train(RECIPE, tmp_path / "full", on_step=lambda now: None)
    assert (tmp_path / "full" / STATE_FILE).read_bytes() == before
    monkeypatch.setattr(torch, "save", save)
    assert_equal(train(RECIPE, tmp_path / "full"), train(RECIPE, tmp_path / "whole"))


def test_states_are_saved_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(training, "_save", lambda *arguments: saved.append(arguments[-1].step))
    train(RECIPE, tmp_path / "each", checkpoint_every_s=0)
    assert saved == [*range(1, STEPS + 1), STEPS]
    saved.clear()
    train(RECIPE, tmp_path / "last", checkpoint_every_s=math.inf)
    assert saved == [STEPS]


def test_a_finished_run_returns_at_once(tmp_path: Path) -> None:
    first = train(RECIPE, tmp_path)
    before = (tmp_path / STATE_FILE).read_bytes()
    again = train(RECIPE, tmp_path, on_step=lambda now: pytest.fail("there was nothing left to do"))
    assert_equal(again, first)
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_seconds_add_up_over_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def tick(now: Progress) -> None:
        clock[0] += 1.0

    def tick_to_seven(now: Progress) -> None:
        tick(now)
        at(7, interrupt())(now)

    with pytest.raises(TrainingPaused):
        train(RECIPE, tmp_path, on_step=tick_to_seven)
    clock[0] += 1000.0  # a night
    assert (
        train(RECIPE, tmp_path, on_step=tick).run.seconds == 6 + 12
    )  # 20 steps, the first of each call free


def test_every_number_of_threads_that_took_part_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, threads in ((3, 1), (6, 2), (9, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with pytest.raises(TrainingPaused):
            train(RECIPE, tmp_path, on_step=at(step, interrupt()))
    assert train(RECIPE, tmp_path).run.threads == [1, 2]


# ----------------------------------------------------------------------------------------------------- the budget


def test_a_budget_can_grow_while_the_rate_is_constant(tmp_path: Path) -> None:
    with pytest.raises(TrainingPaused):
        train(RECIPE, tmp_path / "grown", on_step=at(7, interrupt()))
    grown = train(RECIPE, tmp_path / "grown", tokens=30 * STEP_TOKENS)
    assert_equal(grown, train(RECIPE, tmp_path / "whole", tokens=30 * STEP_TOKENS))


def test_a_resumed_run_keeps_the_budget_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(TrainingPaused):
        train(RECIPE, tmp_path, tokens=10 * STEP_TOKENS, on_step=at(7, interrupt()))
    assert train(RECIPE, tmp_path).run.total_steps == 10


@pytest.mark.parametrize(("paused_at", "tokens"), [(7, 8 * STEP_TOKENS), (17, 30 * STEP_TOKENS)])
def test_a_budget_cannot_change_once_the_rate_falls_or_should(
    tmp_path: Path, paused_at: int, tokens: int
) -> None:
    with pytest.raises(TrainingPaused):
        train(RECIPE, tmp_path, on_step=at(paused_at, interrupt()))
    with pytest.raises(ValueError, match=f"budget cannot become {tokens:,} tokens: after {paused_at * 32:,}"):
        train(RECIPE, tmp_path, tokens=tokens)


def test_a_budget_below_five_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a budget of 159 tokens is 4 steps of 32; give at least 5 steps"):
        train(RECIPE, tmp_path, tokens=5 * STEP_TOKENS - 1)
    assert not (tmp_path / STATE_FILE).exists()


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def paused(tmp_path: Path) -> Path:
    with pytest.raises(TrainingPaused):
        train(RECIPE, tmp_path, on_step=at(2, interrupt()))
    return tmp_path


@pytest.mark.parametrize(
    "other",
    [
        replace(RECIPE, seed=1),
        replace(RECIPE, learning_rate=1e-3),
        replace(RECIPE, bfloat16_autocast=False),
        replace(RECIPE, config=replace(TINY, num_hidden_layers=2)),
    ],
    ids=["seed", "learning_rate", "bfloat16_autocast", "num_hidden_layers"],
)
def test_another_recipe_is_not_resumed(paused: Path, other: Recipe, request: pytest.FixtureRequest) -> None:
    before = (paused / STATE_FILE).read_bytes()
    name = request.node.callspec.id
    with pytest.raises(
        ValueError, match=f"holds another training: {name} was .*, is .*; name another work folder"
    ):
        train(other, paused)
    assert (paused / STATE_FILE).read_bytes() == before


def test_another_corpus_is_not_resumed(paused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "fingerprint", lambda: "another")
    with pytest.raises(ValueError, match="corpus fingerprint was one corpus, is another;"):
        train(RECIPE, paused)


def test_the_budget_is_no_part_of_what_a_run_is() -> None:
    changed = replace(RECIPE, tokens=1)
    assert training.identity(changed) == training.identity(RECIPE)
    kept = {**asdict(RECIPE), **asdict(TINY)}
    assert set(training.identity(RECIPE)) == {*kept, "corpus fingerprint"} - {"tokens", "config"}


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        saved({}),
        saved([1]),
        saved({"format": 2, "identity": "{}"}),
        saved({"format": 1, "identity": "{"}),
    ],
    ids=["empty", "text", "no entries", "a list", "another format", "no JSON"],
)
def test_a_damaged_state_is_refused_and_kept(paused: Path, content: bytes) -> None:
    (paused / STATE_FILE).write_bytes(content)
    with pytest.raises(
        ValueError, match="is not the state of a training .*; remove the folder to start again"
    ):
        train(RECIPE, paused)
    assert (paused / STATE_FILE).read_bytes() == content


def test_a_cut_state_is_refused(paused: Path) -> None:
    whole = (paused / STATE_FILE).read_bytes()
    (paused / STATE_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not the state of a training"):
        train(RECIPE, paused)


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path) -> None:
    refused: list[str] = []

    def train_here_too() -> None:
        with pytest.raises(BlockingIOError) as error_info:
            train(RECIPE, tmp_path)
        refused.append(str(error_info.value))

    train(RECIPE, tmp_path, on_step=at(3, train_here_too))
    assert refused == [f"another process is training in {tmp_path}; wait for it, or name another work folder"]


# -------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_pauses_and_its_handler_comes_back(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(TrainingPaused) as error_info:
        train(RECIPE, tmp_path, on_step=at(4, interrupt(number)))
    assert signal.getsignal(number) == before
    assert (error_info.value.tokens, error_info.value.work) == (4 * STEP_TOKENS, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {STATE_FILE, "lock"}


def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()()
        interrupt()()

    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path, on_step=at(4, twice))
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_training_runs_in_a_thread_too(tmp_path: Path) -> None:
    runs: list[Trained] = []
    thread = threading.Thread(target=lambda: runs.append(train(RECIPE, tmp_path)))
    thread.start()
    thread.join()
    assert runs[0].run.step == STEPS


# ----------------------------------------------------------------------------------------------------- evaluating


def test_windows_spread_from_the_first_token_to_the_last() -> None:
    inputs, targets = fixed_windows(torch.arange(100), count=4, context_tokens=9)
    assert inputs[:, 0].tolist() == [0, 30, 60, 90]
    assert torch.equal(targets, inputs + 1)
    assert targets.max() == 99


@pytest.mark.parametrize(("count", "context_tokens"), [(1, 99), (5, 1)])
def test_windows_that_just_fit(count: int, context_tokens: int) -> None:
    inputs, targets = fixed_windows(torch.arange(100), count=count, context_tokens=context_tokens)
    assert inputs.shape == targets.shape == (count, context_tokens)


@pytest.mark.parametrize(("count", "context_tokens"), [(0, 5), (1, 100)])
def test_impossible_windows_are_refused(count: int, context_tokens: int) -> None:
    with pytest.raises(ValueError, match="it has 100 tokens"):
        fixed_windows(torch.arange(100), count=count, context_tokens=context_tokens)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_mean_loss_is_the_mean_over_all_targets(stream: Tensor, batch_size: int) -> None:
    model = Decoder(TINY)
    inputs, targets = fixed_windows(stream, count=5, context_tokens=8)
    with torch.inference_mode():
        logits = model(inputs).double()
    likelihood = logits.log_softmax(-1).gather(-1, targets[..., None])
    # Sums of 40 float32 losses: each addition rounds by at most 2^-24 of the sum.
    assert mean_loss(model, (inputs, targets), batch_size=batch_size) == pytest.approx(
        -likelihood.mean().item(), rel=40 * 2**-24
    )
