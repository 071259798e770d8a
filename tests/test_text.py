from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llmcourse import text
from llmcourse.text import batches, corpus, corpus_tokens, decode, encode, fingerprint, tokenizer

CACHED = (text._documents, fingerprint, tokenizer, corpus_tokens)
SMALL_CORPUS = (
    ("json/__init__.py", "def load(file):\n    return loads(file.read())\n" * 20),
    ("json/decoder.py", "class Decoder:\n    pass\n" * 20),
    ("queue/queue.py", "class Queue:\n    def put(self, item):\n        pass\n" * 20),
)


@pytest.fixture(scope="module", autouse=True)
def own_cache_folder(tmp_path_factory) -> Iterator[None]:
    """Keep these tests, and the one full training they share, out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMCOURSE_CACHE", str(tmp_path_factory.mktemp("cache")))
        forget()
        yield
    forget()


def forget() -> None:
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def small(monkeypatch, tmp_path) -> Iterator[Path]:
    """Three short documents in place of the corpus, and an empty cache folder, which this is."""
    forget()
    monkeypatch.setattr(text, "_documents", lambda: SMALL_CORPUS)
    monkeypatch.setenv("LLMCOURSE_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for function in CACHED[1:]:
        function.cache_clear()


@pytest.fixture
def trainings(monkeypatch) -> list[int]:
    """The vocabulary sizes trained so far."""
    made: list[int] = []
    train = text._train
    monkeypatch.setattr(text, "_train", lambda vocab_size: made.append(vocab_size) or train(vocab_size))
    return made


# ----------------------------------------------------------------------------------------------------- corpus


def test_every_module_is_of_the_standard_library_and_named_once():
    assert set(text.MODULES) <= sys.stdlib_module_names
    assert len(set(text.MODULES)) == len(text.MODULES)


def test_every_module_gives_text():
    named = {name.partition("/")[0] for name, document in text._documents() if document.strip()}
    assert named == {*text.MODULES, text.TOPICS_MODULE}


def test_no_module_is_on_both_sides():
    held_out = {name.partition("/")[0] for name, _ in text._documents() if text._is_held_out(name)}
    train = {name.partition("/")[0] for name, _ in text._documents() if not text._is_held_out(name)}
    assert held_out and train and not held_out & train
    assert text.TOPICS_MODULE in train  # nearly all the prose there is


def test_the_splits_are_the_whole_corpus():
    assert sorted(corpus("train") + corpus("held_out")) == sorted(
        document for _, document in text._documents()
    )
    held_out = sum(map(len, corpus("held_out"))) / sum(len(document) for _, document in text._documents())
    assert 0.03 < held_out < 0.15  # 1 in 12 modules; they differ in size, and between versions


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match='split must be "train" or "held_out", got \'test\''):
        corpus("test")  # type: ignore[arg-type]


def test_test_folders_are_left_out(tmp_path, monkeypatch):
    library = tmp_path / "test" / "library"  # what lies above the library must not matter
    for file in ("json/__init__.py", "json/tests/test_all.py", "json/deep/test/more.py", "queue.py"):
        (library / file).parent.mkdir(parents=True, exist_ok=True)
        (library / file).write_text(file)
    monkeypatch.setattr(text, "MODULES", ("json", "queue"))
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(library))
    documents = [pair for pair in text._documents.__wrapped__() if not pair[0].startswith(text.TOPICS_MODULE)]
    assert documents == [("json/__init__.py", "json/__init__.py"), ("queue/queue.py", "queue.py")]


def test_a_library_without_source_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"needs the standard library as source files, and .*\.py is not"
    ):
        text._documents.__wrapped__()


def test_the_fingerprint_is_the_same_in_another_process():
    program = "from llmcourse.text import fingerprint; print(fingerprint())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == fingerprint()


@pytest.mark.parametrize(
    "documents",
    [
        (*SMALL_CORPUS[:2], ("queue/queue.py", SMALL_CORPUS[2][1] + "\n")),
        (*SMALL_CORPUS[:2], ("queue/other.py", SMALL_CORPUS[2][1])),
        SMALL_CORPUS[:2],
        (SMALL_CORPUS[1], SMALL_CORPUS[0], SMALL_CORPUS[2]),
    ],
    ids=["a character", "a name", "one fewer", "order"],
)
def test_the_fingerprint_notices_a_changed(small, monkeypatch, documents):
    before = fingerprint()
    monkeypatch.setattr(text, "_documents", lambda: documents)
    assert fingerprint.__wrapped__() != before


def test_the_fingerprint_notices_a_changed_split(small, monkeypatch):
    before = fingerprint()
    monkeypatch.setattr(text, "_HELD_OUT_EVERY", 1)
    assert fingerprint.__wrapped__() != before


# -------------------------------------------------------------------------------------------------- tokenizer


@pytest.mark.parametrize(
    "hard",
    [
        "",
        " ",
        "\n\n\t  x",
        "\r\n\0",
        "naïve 参数 \U0001f600",
        "<|endoftext|>",
        "Ġ Ċ",
        "\ufeff\u200d\ufffd",
        "  a   b",
    ],
    ids=ascii,
)
def test_hard_texts_come_back(hard):
    assert decode(encode(hard)) == hard


def test_any_text_comes_back(seed):
    rng = random.Random(seed)
    scalars = [*range(0xD800), *range(0xE000, 0x110000)]
    drawn = "".join(map(chr, rng.choices(scalars, k=2000)))
    assert decode(encode(drawn)) == drawn


def test_real_text_takes_fewer_tokens_than_bytes():
    held_out = corpus("held_out")[0]
    # A third at most: measured at about 2.7 bytes a token over the held-out split, so half leaves a wide margin.
    assert len(encode(held_out)) < len(held_out.encode()) / 2


def test_the_vocabulary_is_full_and_starts_with_the_end_of_a_document():
    made = tokenizer()
    assert made.get_vocab_size() == 1024
    assert made.id_to_token(0) == text.END_OF_DOCUMENT


def test_a_text_that_spells_the_end_token_does_not_end():
    assert 0 not in encode(f"a {text.END_OF_DOCUMENT} b")
    assert decode([0]) == text.END_OF_DOCUMENT


def test_a_lone_surrogate_is_refused():
    with pytest.raises(UnicodeEncodeError):
        encode("\ud800")


def test_a_vocabulary_without_room_for_the_bytes_is_refused(small):
    assert tokenizer(257).get_vocab_size() == 257
    with pytest.raises(ValueError, match="vocab_size must be at least 257"):
        tokenizer(256)


def test_training_sees_the_training_split_only(small, monkeypatch):
    asked = []
    monkeypatch.setattr(text, "corpus", lambda split: asked.append(split) or ["some text"])
    tokenizer(260)
    assert asked == ["train"]


def test_training_twice_gives_the_same_tokenizer(small):
    assert text._train(300).to_str() == text._train(300).to_str()


def test_the_tokenizer_that_comes_with_the_zoo_is_neither_trained_nor_cached(small, trainings):
    assert tokenizer(1024).get_vocab_size() == 1024
    assert trainings == [] and not small.exists()


def test_the_tokenizer_that_comes_with_the_zoo_is_what_training_gives():
    recorded = json.loads((text._SHIPPED / "teacher" / "training.json").read_bytes())["corpus_fingerprint"]
    if fingerprint() != recorded:
        pytest.skip(f"the corpus of this Python is {fingerprint()}, the tokenizer was trained on {recorded}")
    assert json.loads(text._train(1024).to_str()) == json.loads(tokenizer(1024).to_str())


def test_a_trained_tokenizer_is_read_from_the_cache(small, trainings):
    first = tokenizer(280)
    tokenizer.cache_clear()
    assert tokenizer(280).to_str() == first.to_str()
    assert trainings == [280]
    assert [file.name for file in small.iterdir()] == [f"tokenizer-{fingerprint()}-280.json"]


def test_another_size_or_another_corpus_is_trained_anew(small, trainings, monkeypatch):
    tokenizer(280)
    tokenizer(281)
    monkeypatch.setattr(text, "_documents", lambda: SMALL_CORPUS[:1])
    fingerprint.cache_clear()
    tokenizer.cache_clear()
    tokenizer(280)
    assert trainings == [280, 281, 280]
    assert len(list(small.iterdir())) == 3


@pytest.mark.parametrize(
    "damaged", [b"", b'{"version": "1.0", "trunc', b"\xff\xfe"], ids=["empty", "cut", "binary"]
)
def test_a_damaged_cache_is_replaced(small, trainings, damaged):
    first = tokenizer(280).to_str()
    (file,) = small.iterdir()
    file.write_bytes(damaged)
    tokenizer.cache_clear()
    assert tokenizer(280).to_str() == first
    assert trainings == [280, 280]
    assert file.read_text(encoding="utf-8") == first


def test_a_cache_that_cannot_be_written_does_no_harm(small, trainings):
    small.write_text("a file where the folder should be")
    assert tokenizer(280).get_vocab_size() == 280
    assert small.read_text() == "a file where the folder should be"


def test_a_failed_write_leaves_the_old_file_and_no_litter(small, monkeypatch):
    tokenizer(280)
    (file,) = small.iterdir()
    before = file.read_bytes()

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    text._write_cached(file, b"new")
    assert list(small.iterdir()) == [file] and file.read_bytes() == before


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMCOURSE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert text.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("LLMCOURSE_CACHE")
    assert text.cache_folder() == tmp_path / "xdg" / "llmcourse"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text.cache_folder() == tmp_path / ".cache" / "llmcourse"


# ---------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_token_stream_holds_every_document_and_its_end(small, split):
    stream = corpus_tokens(split, vocab_size=300)
    assert stream.dtype == torch.int64
    spelled_out = decode(stream.tolist(), vocab_size=300)
    assert spelled_out == "".join(document + text.END_OF_DOCUMENT for document in corpus(split))
    assert (stream == 0).sum() == len(corpus(split)) > 0


@pytest.fixture
def encodings(monkeypatch) -> list[tuple[str, int]]:
    """The splits and vocabulary sizes encoded so far."""
    made: list[tuple[str, int]] = []
    encode_corpus = text._encode_corpus
    monkeypatch.setattr(
        text, "_encode_corpus", lambda *arguments: made.append(arguments) or encode_corpus(*arguments)
    )
    return made


def cached_streams(folder: Path) -> list[Path]:
    return sorted(folder.glob("tokens-*"))


def test_an_encoded_split_is_read_from_the_cache(small, encodings):
    first = corpus_tokens("train", vocab_size=300)
    corpus_tokens.cache_clear()
    again = corpus_tokens("train", vocab_size=300)
    assert torch.equal(first, again) and again.dtype == torch.int64
    assert encodings == [("train", 300)]
    (file,) = cached_streams(small)
    assert re.fullmatch(f"tokens-{fingerprint()}-300-[0-9a-f]{{8}}-train.npz", file.name)


def test_another_tokenizer_of_the_same_size_encodes_anew(small, encodings, monkeypatch):
    corpus_tokens("train", vocab_size=300)
    other = text._train(260)
    corpus_tokens.cache_clear()
    monkeypatch.setattr(text, "tokenizer", lambda vocab_size: other)
    corpus_tokens("train", vocab_size=300)
    assert encodings == [("train", 300)] * 2


def test_each_split_size_and_corpus_is_encoded_by_itself(small, encodings, monkeypatch):
    corpus_tokens("train", vocab_size=300)
    corpus_tokens("held_out", vocab_size=300)
    corpus_tokens("train", vocab_size=301)
    monkeypatch.setattr(text, "_documents", lambda: SMALL_CORPUS[:2])
    for function in CACHED[1:]:
        function.cache_clear()
    corpus_tokens("train", vocab_size=300)
    assert encodings == [("train", 300), ("held_out", 300), ("train", 301), ("train", 300)]
    assert len(cached_streams(small)) == 4


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    # The array is the middle of the file; a changed token is still a token, so only the CRC can tell.
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def rewritten(stream: np.ndarray, name: str = "tokens") -> bytes:
    content = io.BytesIO()
    np.savez(content, **{name: stream})
    return content.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        cut,
        flipped,
        lambda content: b"not an archive",
        lambda content: rewritten(np.array([5, 300], dtype=np.uint16)),
        lambda content: rewritten(np.array([5, 6], dtype=np.int64)),
        lambda content: rewritten(np.zeros((2, 2), dtype=np.uint16)),
        lambda content: rewritten(np.array([5], dtype=np.uint16), "others"),
    ],
    ids=["empty", "cut", "flipped", "text", "token beyond", "wide", "matrix", "other name"],
)
def test_damaged_tokens_are_encoded_again(small, encodings, damage):
    first = corpus_tokens("train", vocab_size=300)
    (file,) = cached_streams(small)
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    corpus_tokens.cache_clear()
    assert torch.equal(corpus_tokens("train", vocab_size=300), first)
    assert encodings == [("train", 300)] * 2
    corpus_tokens.cache_clear()
    assert torch.equal(corpus_tokens("train", vocab_size=300), first)  # the file is sound again
    assert len(encodings) == 2


def test_a_vocabulary_beyond_two_bytes_keeps_its_tokens(small):
    stream = np.array([0, 70_000], dtype=np.min_scalar_type(70_000))
    text._write_cached_tokens(small / "wide.npz", stream)
    read = text._read_cached_tokens(small / "wide.npz", 70_001)
    assert read is not None and read.tolist() == [0, 70_000]


def test_targets_are_the_inputs_moved_on_by_one(seed):
    stream = torch.arange(100) * 3
    inputs, targets = next(batches(stream, batch_size=4, context_tokens=7, seed=seed))
    assert inputs.shape == targets.shape == (4, 7)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 3)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_every_window_is_drawn_and_none_beyond_the_end(seed):
    # 5 tokens, contexts of 2: windows start at 0, 1, 2. One is missed by 200 draws with chance 3 (2/3)^200 < 1e-34.
    inputs, targets = next(batches(torch.arange(5), batch_size=200, context_tokens=2, seed=seed))
    assert set(inputs[:, 0].tolist()) == {0, 1, 2}
    assert targets.max() == 4


def test_a_seed_fixes_the_batches(seed):
    def first_three(given: int) -> list[torch.Tensor]:
        drawn = batches(torch.arange(10_000), batch_size=8, context_tokens=4, seed=given)
        return [next(drawn)[0] for _ in range(3)]

    again, other = first_three(seed), first_three(seed + 1)
    assert all(map(torch.equal, first_three(seed), again))
    assert not any(map(torch.equal, again, other))
    assert not torch.equal(again[0], again[1])


@pytest.mark.parametrize(("batch_size", "context_tokens"), [(0, 4), (4, 0), (1, 10), (1, 11)])
def test_impossible_batches_are_refused(batch_size, context_tokens):
    with pytest.raises(ValueError, match="it has 10 tokens"):
        next(batches(torch.arange(10), batch_size=batch_size, context_tokens=context_tokens, seed=0))


def test_text_imports_nothing_heavy():
    program = (
        "import sys, llmcourse.text; sys.exit(bool({'torch', 'tokenizers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
