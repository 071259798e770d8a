"""The corpus and its tokenizer: text that every Python installation carries, read where it lies.

The corpus is `pydoc_data.topics` (the language reference as pydoc shows it) and the source, docstrings included,
of standard-library modules that Python 3.11 to 3.13 all have. Python versions word it differently, so a number
that depends on it belongs to one `fingerprint()`.

The split goes by a hash of the top-level module's name: a package is on one side whole, since its files repeat
each other.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import sysconfig
import tokenize
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer
    from torch import Tensor

Split = Literal["train", "held_out"]

END_OF_DOCUMENT = "<|endoftext|>"

TOPICS_MODULE = "pydoc_data"
# Top-level names only. Left out: what 3.12 or 3.13 removed, what Linux distributions package apart (tkinter,
# idlelib, ensurepip, distutils, lib2to3, test, turtle, venv), tables (encodings), and jokes (this).
_NAMES = """
_collections_abc _compat_pickle _markupbase _pydecimal _pyio _strptime _threading_local _weakrefset abc
argparse ast asyncio base64 bdb bisect bz2 calendar cmd code codecs codeop collections colorsys compileall
concurrent configparser contextlib contextvars copy copyreg csv dataclasses datetime decimal difflib dis
doctest email enum filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext
glob graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress json keyword linecache
locale logging lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath numbers opcode operator
optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint profile pstats
pty py_compile pyclbr pydoc queue quopri random re reprlib rlcompleter runpy sched secrets selectors shelve
shlex shutil signal site smtplib socket socketserver ssl stat statistics string stringprep struct subprocess
symtable sysconfig tabnanny tarfile tempfile textwrap threading timeit token tokenize tomllib trace traceback
tracemalloc tty types typing unittest urllib uuid warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp
zipfile zipimport zoneinfo
"""
MODULES = tuple(_NAMES.split())
_SHIPPED = Path(__file__).parent / "checkpoints"
# One module in twelve is held out: 13 of them, about 7 % of the characters on Python 3.11, prose and code.
_HELD_OUT_EVERY = 12


def corpus(split: Split) -> list[str]:
    """The documents of a split, "train" or "held_out": one a source file, one a pydoc topic; order is fixed.

    Raises FileNotFoundError for a Python whose standard library is not there as source files.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f'split must be "train" or "held_out", got {split!r}')
    return [text for name, text in _documents() if _is_held_out(name) == (split == "held_out")]


@functools.cache
def fingerprint() -> str:
    """16 hexadecimal digits that differ as soon as any document, its name or its side of the split does."""
    digest = hashlib.sha256()
    for name, text in _documents():
        content = text.encode("utf-8", "surrogatepass")
        digest.update(f"{name}\0{_is_held_out(name)}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def _is_held_out(name: str) -> bool:
    """Whether a document, named "module/…", belongs to a held-out module."""
    module = name.partition("/")[0]
    return hashlib.sha256(module.encode()).digest()[0] % _HELD_OUT_EVERY == 0


@functools.cache
def _documents() -> tuple[tuple[str, str], ...]:
    from pydoc_data.topics import topics

    documents = [(f"{TOPICS_MODULE}/{topic}", text) for topic, text in sorted(topics.items())]
    library = Path(sysconfig.get_path("stdlib"))
    for module in MODULES:
        package = library / module
        files = sorted(package.rglob("*.py")) if package.is_dir() else [package.with_suffix(".py")]
        for file in files:
            within = file.relative_to(package) if package.is_dir() else Path(file.name)
            if not {"test", "tests"}.intersection(within.parts):  # some builds carry them, some do not
                documents.append((f"{module}/{within.as_posix()}", _read_source(file)))
    return tuple(documents)


def _read_source(file: Path) -> str:
    try:
        with tokenize.open(file) as source:  # honours a coding line, and line ends are \n everywhere
            return source.read()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the corpus needs the standard library as source files, and {file} is not there; "
            "use a Python from python.org, conda, a Linux distribution or uv"
        ) from None


# -------------------------------------------------------------------------------------------------- tokenizer


@functools.cache
def tokenizer(vocab_size: int = 1024) -> Tokenizer:
    """A byte-level BPE tokenizer trained on the training split: every text encodes, and decodes to itself.

    Token 0 ends a document; 256 more stand for the bytes. That of 1024 tokens comes with the zoo, whose models
    know no other: a corpus of another Python would give other tokens. Every other size is trained once (seconds),
    then read from the cache folder: LLMCOURSE_CACHE, or `llmcourse` in XDG_CACHE_HOME or ~/.cache.
    Sennrich et al. 2016; bytes: GPT-2.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size must be at least 257 (256 bytes and the end of a document), got {vocab_size}"
        )
    from tokenizers import Tokenizer

    shipped = _SHIPPED / f"tokenizer-{vocab_size}.json"
    made = Tokenizer.from_str(
        shipped.read_text(encoding="utf-8") if shipped.exists() else _trained_once(vocab_size)
    )
    made.encode_special_tokens = True  # a document that spells the end token out does not end there
    return made


def _trained_once(vocab_size: int) -> str:
    file = cache_folder() / f"tokenizer-{fingerprint()}-{vocab_size}.json"
    trained = _read_cached(file)
    if trained is None:
        trained = _train(vocab_size).to_str()
        _write_cached(file, trained.encode())
    return trained


def _train(vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(corpus("train"), trainer)
    return made


def cache_folder() -> Path:
    """Where what takes seconds to make is kept for this user; it may be deleted at any time."""
    if own := os.environ.get("LLMCOURSE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmcourse"


def _read_cached(file: Path) -> str | None:
    """The file's text; None when it is absent or damaged, and the tokenizer is to be trained again."""
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
    except (OSError, ValueError):
        return None
    return text


def _write_cached(file: Path, content: bytes) -> None:
    """Write by rename, so that no reader ever sees half a file."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    # A home that cannot be written (a jail, a full disk) costs the seconds of making it again, nothing else.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


def encode(text: str, *, vocab_size: int = 1024) -> list[int]:
    """Token numbers of a text; no end-of-document token is added.

    Raises UnicodeEncodeError for a lone surrogate, which has no bytes to encode.
    """
    text.encode()
    return tokenizer(vocab_size).encode(text).ids


def decode(tokens: list[int], *, vocab_size: int = 1024) -> str:
    """The text of token numbers; bytes that are no UTF-8 become U+FFFD, an end of document is spelled out."""
    return tokenizer(vocab_size).decode(tokens, skip_special_tokens=False)


# ---------------------------------------------------------------------------------------------------- batches


@functools.cache
def corpus_tokens(split: Split, *, vocab_size: int = 1024) -> Tensor:
    """A split as one int64 tensor of tokens, each document followed by token 0. Shared: do not write to it.

    Encoded once (seconds), then read from the cache folder.
    """
    import torch

    spelled = hashlib.sha256(tokenizer(vocab_size).to_str().encode()).hexdigest()[:8]
    file = cache_folder() / f"tokens-{fingerprint()}-{vocab_size}-{spelled}-{split}.npz"
    stream = _read_cached_tokens(file, vocab_size)
    if stream is None:
        stream = _encode_corpus(split, vocab_size)
        _write_cached_tokens(file, stream)
    return torch.from_numpy(stream.astype("int64"))


def _encode_corpus(split: Split, vocab_size: int) -> np.ndarray:
    import numpy as np

    made = tokenizer(vocab_size)
    end = made.token_to_id(END_OF_DOCUMENT)
    assert end is not None
    stream: list[int] = []
    for encoded in made.encode_batch(corpus(split)):
        stream += encoded.ids
        stream.append(end)
    return np.array(stream, dtype=np.min_scalar_type(vocab_size - 1))  # uint16 for every usual vocabulary


def _read_cached_tokens(file: Path, vocab_size: int) -> np.ndarray | None:
    """The stream; None when the file is absent or damaged (its container keeps a CRC-32 of the content)."""
    import numpy as np

    try:
        with np.load(file) as archive:
            stream = archive["tokens"]
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile):
        return None
    sound = stream.ndim == 1 and stream.dtype == np.min_scalar_type(vocab_size - 1)
    return stream if sound and stream.max(initial=0) < vocab_size else None


def _write_cached_tokens(file: Path, stream: np.ndarray) -> None:
    import numpy as np

    content = io.BytesIO()
    np.savez(content, tokens=stream)
    _write_cached(file, content.getvalue())


def batches(
    tokens: Tensor, *, batch_size: int, context_tokens: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of a token stream, without end: inputs and targets, each [batch_size, context_tokens].

    A target is the token that follows its input. Windows start anywhere, drawn with replacement, and may cross
    documents. The same seed gives the same batches.
    """
    import torch

    starts = len(tokens) - context_tokens
    if min(batch_size, context_tokens) < 1 or starts < 1:
        raise ValueError(
            f"batch_size {batch_size} and context_tokens {context_tokens} must be at least 1, and the stream longer "
            f"than a context; it has {len(tokens)} tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(context_tokens + 1)
    while True:
        start = torch.randint(starts, (batch_size, 1), generator=generator)
        windows = tokens[start + offsets]  # [batch_size, context_tokens + 1]
        yield windows[:, :-1], windows[:, 1:]
