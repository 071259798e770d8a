from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llmcourse import cli, text, training, zoo
from llmcourse.model import Decoder, ModelConfig, save_checkpoint
from llmcourse.training import Recipe, mean_loss
from llmcourse.zoo import Name

REPOSITORY = Path(__file__).parents[1]
NAMES = zoo.names()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def loss_of(name: Name) -> float:
    """Nats per token on the fixed held-out windows of this Python's corpus, in float32."""
    return mean_loss(zoo.load(name), zoo.held_out_windows())


# ------------------------------------------------------------------------------------------------------ what ships


def test_the_zoo_holds_three_models_in_less_than_20_mb() -> None:
    assert NAMES == ("teacher", "student", "draft")
    for name in NAMES:
        files = {path.name for path in zoo.folder(name).iterdir()}
        assert files == {"config.json", "model.safetensors", "training.json"}
    assert sum(path.stat().st_size for path in zoo.CHECKPOINTS.rglob("*") if path.is_file()) < 20e6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_loads_in_any_dtype_ready_to_predict(name: Name, dtype: torch.dtype) -> None:
    model = zoo.load(name, dtype=dtype)
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with safe_open(zoo.folder(name) / "model.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(model.state_dict()[key], tensor.to(dtype)) for key, tensor in stored.items())
    with torch.inference_mode():
        logits = model(torch.tensor([text.encode("def forward(self, ")]))
    assert logits.isfinite().all()


def test_the_default_is_float32_on_the_cpu() -> None:
    weight = zoo.load("draft").lm_head.weight
    assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("call", [zoo.load, zoo.record, zoo.folder])
def test_a_name_that_is_not_in_the_zoo_is_refused(call: Callable[[Any], object]) -> None:
    with pytest.raises(ValueError, match="'pupil' is not in the zoo; it holds teacher, student, draft"):
        call("pupil")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_was_made_by_the_recipe_that_stands_in_the_code(name: Name) -> None:
    model, record = zoo.load(name), zoo.record(name)
    assert model.config == zoo.RECIPES[name].config
    budget = {"tokens": record.tokens}
    assert record.recipe == json.loads(json.dumps(asdict(zoo.RECIPES[name]))) | budget


@pytest.mark.parametrize("name", NAMES)
def test_a_record_agrees_with_itself_and_its_model(name: Name) -> None:
    record, recipe = zoo.record(name), zoo.RECIPES[name]
    assert record.parameters == sum(parameter.numel() for parameter in zoo.load(name).parameters())
    assert record.tokens == record.steps * recipe.step_tokens
    assert record.tokens_per_parameter == pytest.approx(record.tokens / record.parameters)
    assert record.epochs == pytest.approx(record.tokens / record.corpus_tokens)
    assert record.steps == -(-record.decay_begins_step * 5 // 4) or record.decay_reason == "budget"
    for curve in (record.train_curve, record.held_out_curve):
        seen = [tokens for tokens, _ in curve]
        assert seen == sorted(seen) and seen[-1] == record.tokens
        assert curve[-1][1] < curve[0][1]
    # The curve's last point is of the same weights before they were rounded. Nothing bounds what rounding does to
    # a loss; a hundredth of a nat is less than 200 steps change at a constant rate, so another state is noticed.
    assert record.final_held_out == pytest.approx(record.held_out_curve[-1][1], abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_predicts_held_out_text_as_recorded(name: Name) -> None:
    record = zoo.record(name)
    if text.fingerprint() != record.corpus_fingerprint:
        pytest.skip(f"the record is of corpus {record.corpus_fingerprint}, here is {text.fingerprint()}")
    # The same bfloat16 weights in float32: other machines only add up in another order. A logit is a sum of 256
    # terms, each addition off by 2^-24 of sums below 100: at most 256 * 2^-24 * 100 = 1.5e-3 in all.
    assert loss_of(name) == pytest.approx(record.final_held_out, abs=1.5e-3)
    targets = zoo.held_out_windows()[1]
    assert zoo.bits_per_byte(loss_of(name), targets) == pytest.approx(record.bits_per_byte, abs=1.5e-3)
    assert zoo.bigram_loss(zoo.held_out_windows()) == pytest.approx(record.bigram_held_out, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_beats_the_bigram_table_by_half_a_nat(name: Name) -> None:
    # On every Python: the table is counted on this one's corpus, the model was trained on another's. Half a nat
    # is a perplexity 1.6 times lower; a model whose tokens were not its own would be above ln 1024 = 6.9.
    assert loss_of(name) < zoo.bigram_loss(zoo.held_out_windows()) - 0.5


def test_the_teacher_is_the_best_of_them() -> None:
    assert loss_of("teacher") < min(loss_of("student"), loss_of("draft"))


def test_loading_a_model_reads_no_corpus() -> None:
    """The promise of less than a second: reading and encoding the corpus alone would take longer."""
    program = (
        "from llmcourse import text, zoo\n"
        "text._documents = text.tokenizer = None  # whoever calls them fails\n"
        "zoo.load('teacher')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------- the learner's own model

OWN = ModelConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    qkv_bias=True,
)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the learner's in bfloat16, and a teacher that can be told from it; none is named yet."""
    monkeypatch.delenv("LLMCOURSE_MODEL", raising=False)
    monkeypatch.setattr(zoo, "CHECKPOINTS", tmp_path / "zoo")
    save_checkpoint(Decoder(SMALL).to(torch.bfloat16), tmp_path / "zoo" / "teacher")
    save_checkpoint(Decoder(OWN).to(torch.bfloat16), tmp_path / "own")
    return tmp_path / "own"


@pytest.mark.parametrize("value", [None, ""], ids=["unset", "empty"])
def test_lessons_work_on_the_teacher(own: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is not None:
        monkeypatch.setenv("LLMCOURSE_MODEL", value)
    model = zoo.model()
    assert (model.config, model.lm_head.weight.dtype, model.training) == (SMALL, torch.float32, False)
    assert zoo.model(dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("home", [False, True], ids=["whole path", "from home"])
def test_lessons_work_on_the_model_of_a_named_folder(
    own: Path, monkeypatch: pytest.MonkeyPatch, home: bool
) -> None:
    monkeypatch.setenv("HOME", str(own.parent))
    monkeypatch.setenv("LLMCOURSE_MODEL", "~/own" if home else str(own))
    model = zoo.model()
    assert (model.config, model.lm_head.weight.dtype, model.training) == (OWN, torch.float32, False)
    assert zoo.model(dtype=torch.float64).lm_head.weight.dtype == torch.float64


def test_a_named_folder_that_is_no_checkpoint_is_refused(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(named: Path) -> str:
        monkeypatch.setenv("LLMCOURSE_MODEL", str(named))
        with pytest.raises(ValueError, match="name another, or unset the variable") as error_info:
            zoo.model()
        return str(error_info.value)

    gone = own.parent / "gone"
    assert refusal(gone).startswith(
        f"LLMCOURSE_MODEL is {str(gone)!r}, expected a checkpoint folder: expected "
    )
    assert "config.json" in refusal(own / "config.json")  # a file, not a folder
    (own / "model.safetensors").unlink()
    assert "expected model.safetensors or model.safetensors.index.json" in refusal(own)
    (own / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    assert "'GPT2LMHeadModel' is not known; known are LlamaForCausalLM, " in refusal(own)


# --------------------------------------------------------------------------------------------------- the measures

SMALL = ModelConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
RECIPE = Recipe(SMALL, tokens=10 * 4 * 16, batch_size=4, context_tokens=16, evaluate_every_steps=5)
SMALL_CORPUS = (
    ("json/__init__.py", "def load(file):\n    return loads(file.read())\n" * 60),
    ("queue/queue.py", "class Queue:\n    def put(self, item):\n        pass\n" * 60),
)
CACHED = (text.fingerprint, text.tokenizer, text.corpus_tokens)
CACHED_HERE = (zoo.held_out_windows, zoo.token_bytes, zoo.bigram)


def forget() -> None:
    for function in (*CACHED, *CACHED_HERE):
        function.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Two short documents as the corpus, "draft" a model that is trained in a moment, and a folder of its own."""
    monkeypatch.setattr(text, "_documents", lambda: SMALL_CORPUS)
    monkeypatch.setattr(text, "_is_held_out", lambda name: name.startswith("queue"))
    monkeypatch.setenv("LLMCOURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(zoo.RECIPES, "draft", RECIPE)
    forget()
    yield tmp_path
    forget()


def test_the_bytes_of_tokens_add_up_to_the_text() -> None:
    hard = "naïve 参数 \U0001f600\n\t <|endoftext|> \0"
    assert zoo.token_bytes()[text.encode(hard)].sum() == len(hard.encode())
    assert zoo.token_bytes()[0] == 0
    assert (zoo.token_bytes()[1:] > 0).all()


def test_bits_per_byte_by_hand() -> None:
    targets = torch.tensor([text.encode("importlib and ïï")])
    size_bytes = len("importlib and ïï".encode())
    # A model that spreads itself evenly over 1024 tokens pays 10 bits for each.
    assert zoo.bits_per_byte(math.log(1024), targets) == pytest.approx(10 * targets.numel() / size_bytes)


def test_a_bigram_row_is_a_smoothed_distribution(small: Path) -> None:
    stream = text.corpus_tokens("train", vocab_size=300)
    table = zoo.bigram(300).double().exp()
    # float32 holds each entry to 2^-24 of its logarithm, at most 20: a row of 300 adds up to within 300 such errors.
    assert table.shape == (300, 300)
    torch.testing.assert_close(table.sum(dim=1), torch.ones(300).double(), rtol=0, atol=300 * 20 * 2**-24)
    this, following = int(stream[0]), int(stream[1])
    pairs = sum(
        pair == (this, following) for pair in zip(stream.tolist()[:-1], stream.tolist()[1:], strict=True)
    )
    rows = sum(token == this for token in stream.tolist()[:-1])
    prior = (stream.tolist().count(following) + 1) / (len(stream) + 300)
    assert table[this, following] == pytest.approx((pairs + 100 * prior) / (rows + 100), rel=1e-5)
    assert pairs > 1 and table.min() > 0


def test_the_bigram_loss_is_the_mean_over_targets(small: Path) -> None:
    inputs, targets = torch.tensor([[3, 5]]), torch.tensor([[5, 7]])
    wanted = -(zoo.bigram(300)[3, 5] + zoo.bigram(300)[5, 7]) / 2
    assert zoo.bigram_loss((inputs, targets), vocab_size=300) == pytest.approx(wanted.item())


def test_the_windows_are_held_out_and_always_the_same(small: Path) -> None:
    inputs, targets = zoo.held_out_windows(count=3, vocab_size=300)
    stream = text.corpus_tokens("held_out", vocab_size=300)
    assert inputs.shape == targets.shape == (3, 256)
    assert torch.equal(inputs[0], stream[:256]) and torch.equal(targets[-1], stream[-256:])


# ---------------------------------------------------------------------------------------------- training and files


def test_training_writes_a_checkpoint_and_its_record(small: Path) -> None:
    into = small / "deep" / "mine"
    made = zoo.train("draft", small / "work", into)
    assert zoo.read_record(into) == made
    assert {path.name for path in into.iterdir()} == {"config.json", "model.safetensors", "training.json"}
    assert [path.name for path in into.parent.iterdir()] == ["mine"]
    assert (made.tokens, made.steps, made.decay_begins_step, made.decay_reason) == (640, 10, 8, "budget")
    assert made.recipe == json.loads(json.dumps(asdict(RECIPE)))
    assert made.corpus_fingerprint == text.fingerprint()
    assert made.python == ".".join(map(str, sys.version_info[:3])) and made.torch == torch.__version__


def test_the_losses_in_the_record_are_those_of_the_file(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = zoo.train("draft", small / "work", small / "draft")
    monkeypatch.setattr(zoo, "CHECKPOINTS", small)
    held_out = zoo.held_out_windows(vocab_size=300)
    assert mean_loss(zoo.load("draft"), held_out) == made.final_held_out
    assert made.final_train != made.final_held_out
    finished = training.train(RECIPE, small / "work").model
    assert mean_loss(finished, held_out) != made.final_held_out  # float32 weights predict a little otherwise
    assert finished.lm_head.weight.dtype == torch.float32


def test_another_budget_stands_in_the_record(small: Path) -> None:
    made = zoo.train("draft", small / "work", small / "mine", tokens=15 * 64)
    assert made.tokens == made.recipe["tokens"] == 15 * 64


def test_a_taken_folder_is_refused_before_any_training(small: Path) -> None:
    (small / "mine").mkdir()
    (small / "mine" / "note").touch()
    with pytest.raises(
        FileExistsError, match="mine exists already; name another folder, or move the old one"
    ):
        zoo.train("draft", small / "work", small / "mine")
    assert not (small / "work").exists()


def test_a_file_in_the_folders_place_is_refused(small: Path) -> None:
    (small / "mine").touch()
    with pytest.raises(FileExistsError, match="exists already"):
        zoo.train("draft", small / "work", small / "mine")


def test_a_write_that_fails_leaves_nothing_and_can_be_repeated(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = zoo._record

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(zoo, "_record", fail)
    with pytest.raises(OSError, match="disk full"):
        zoo.train("draft", small / "work", small / "files" / "mine")
    assert list((small / "files").iterdir()) == []
    monkeypatch.setattr(zoo, "_record", record)
    made = zoo.train(
        "draft", small / "work", small / "files" / "mine"
    )  # of the finished state: no step is made
    assert made.steps == 10


def test_an_unknown_name_is_not_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'pupil' is not in the zoo"):
        zoo.train("pupil", tmp_path / "work")  # type: ignore[arg-type]
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "only a checkpoint that `llmcourse train` wrote has one"),
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "it holds list"),
        (b'{"tokens": 3}', "it holds ['tokens']"),
    ],
    ids=["absent", "cut", "binary", "a list", "few entries"],
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / zoo.RECORD_FILE).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        zoo.read_record(tmp_path)


# ----------------------------------------------------------------------------------------------------- the command


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", *arguments])
    return int(exit_info.value.code or 0)


def test_the_command_trains_and_says_what_came_out(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into = small / "mine"
    assert run("draft", "--into", str(into)) == 0
    made = zoo.read_record(into)
    shown = capsys.readouterr()
    assert f"{into}: 640 tokens, " in shown.out
    assert f"{made.final_held_out:.3f} nats per token, {made.bits_per_byte:.3f} bits per byte" in shown.out
    assert f"State: {small / 'cache' / 'training' / 'draft'}" in shown.err.replace("\n", "")
    assert f"640 tokens: train {made.train_curve[-1][1]:.4f}, held-out" in shown.err


def test_the_command_prints_its_record_as_json(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["draft", "--into", str(small / "mine"), "--work", str(small / "work"), "--tokens", "960"]
    assert run(*arguments, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.pop("folder") == str(small / "mine")
    assert printed == json.loads((small / "mine" / zoo.RECORD_FILE).read_bytes())
    assert printed["tokens"] == 960
    assert (small / "work" / training.STATE_FILE).is_file()


def test_ctrl_c_saves_says_how_to_go_on_and_the_same_command_goes_on(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["draft", "--into", str(small / "mine")]
    step = training._step

    def interrupted(*given: object) -> float:
        signal.raise_signal(signal.SIGINT)
        return step(*given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(training, "_step", interrupted)
        assert run(*arguments) == cli.INTERRUPTED
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("llmcourse: paused after 64 tokens, saved in ")
    assert message.endswith("; to go on, run the same command again")
    assert not (small / "mine").exists()
    assert run(*arguments) == 0
    whole = zoo.train("draft", small / "other", small / "whole")
    assert zoo.read_record(small / "mine").held_out_curve == whole.held_out_curve


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pupil",), "llmcourse: 'pupil' is not in the zoo; it holds teacher, student, draft"),
        (("draft", "--into", "."), "llmcourse: . exists already; name another folder"),
        (("draft", "--into", "mine", "--tokens", "64"), "llmcourse: a budget of 64 tokens is 1 steps of 64"),
    ],
    ids=["name", "folder", "budget"],
)
def test_what_cannot_be_trained_is_one_line(
    small: Path,
    arguments: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(small)
    (small / "something").touch()
    assert run(*arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_a_learners_own_model_reads_the_corpus_in_its_own_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOURSE_MODEL", str(tmp_path))
    zoo.tokens.cache_clear()
    with pytest.raises(ValueError, match="without tokenizer.json"):
        zoo.tokens("held_out")
    text.tokenizer(512).save(str(tmp_path / "tokenizer.json"))
    found = zoo.tokens("held_out")
    assert found.dtype == torch.int64 and int(found.max()) < 512
    begins = "\n\n".join(text.corpus("held_out"))[:100]
    assert text.decode(found[:400].tolist(), vocab_size=512).startswith(begins)
    monkeypatch.delenv("LLMCOURSE_MODEL")
    zoo.tokens.cache_clear()
    assert torch.equal(zoo.tokens("held_out"), text.corpus_tokens("held_out"))
