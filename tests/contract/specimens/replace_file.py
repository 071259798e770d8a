"""Specimen: an answer that writes files, observed as {name: bytes} and by what a reader sees meanwhile."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmcourse.exercise import alternative, case, cost, exercise, mistake


@exercise(points=2, minutes=10, hints=("A reader must see the old file or the new one, at any moment.",))
def replace_file(path: Path, chunks: Iterable[bytes]) -> int:
    """Write the chunks to `path` so that a reader finds, at any moment, the whole old file or the whole new one.

    Returns the number of bytes written. The new bytes go to another file in the same folder, are flushed to the disk
    (`os.fsync`) and then take the place of `path` in one step. Chunks are written as they come and not collected.
    When `chunks` raises, the exception goes through, `path` is as it was, and nothing else is left
    behind. About 12 lines.
    """
    ### BEGIN SOLUTION
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        try:
            size_bytes = sum(file.write(chunk) for chunk in chunks)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            new.unlink()
            raise
    os.replace(new, path)
    return size_bytes
    ### END SOLUTION


@contextlib.contextmanager
def in_a_folder(files: dict[str, bytes]) -> Iterator[Path]:
    """A folder with these files."""
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name)


def content(folder: Path) -> dict[str, bytes]:
    """What the folder holds, hidden files included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Breaks(OSError):
    """What a source of chunks raises in the middle."""


def watched(path: Path, chunks: list[bytes], seen: list, broken: bool = False) -> Iterator[bytes]:
    """The chunks; before each, notes what a reader of `path` finds, and how many files lie in the folder."""
    for chunk in chunks:
        seen.append((path.read_bytes() if path.exists() else None, len(list(path.parent.iterdir()))))
        yield chunk
    if broken:
        raise Breaks("the source ended too early")


@contextlib.contextmanager
def noted_calls(events: list[tuple[str, int | bool]]) -> Iterator[None]:
    """Note every fsync with the size of its file, and every rename with whether it stays in one folder."""
    originals = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

    def noting(name, original):
        def call(first, *others, **options):
            if name == "fsync":
                events.append(("fsync", os.fstat(first).st_size))
            else:
                events.append(("replaced", Path(first).parent == Path(others[0]).parent))
            return original(first, *others, **options)

        return call

    for name, original in originals.items():
        setattr(os, name, noting(name, original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


@case(replace_file)
def over_an_old_file(answer, rng):
    """An old file is replaced while someone reads it, and someone else holds a hard link to it."""
    old, chunks, seen = rng.bytes(300), [rng.bytes(rng.integer(50, 90)) for _ in range(4)], []
    with in_a_folder({"weights.bin": old, "other.bin": b"kept"}) as folder:
        path = folder / "weights.bin"
        os.link(path, folder / "linked.bin")
        size_bytes = answer(path, watched(path, chunks, seen))
        return {"size": size_bytes, "files": content(folder), "seen": seen[1:]}


@case(replace_file)
def a_new_file(answer, rng):
    """There is no old file; nothing is there until all of it is."""
    seen = []
    with in_a_folder({}) as folder:
        path = folder / "config.json"
        size_bytes = answer(path, watched(path, [b"", rng.bytes(7), rng.bytes(5)], seen))
        return {"size": size_bytes, "files": content(folder), "seen": [found for found, _ in seen]}


@case(replace_file)
def a_source_that_breaks(answer, rng):
    """The chunks end in an exception after two of them."""
    with in_a_folder({"weights.bin": rng.bytes(100)}) as folder:
        path = folder / "weights.bin"
        whole = answer(folder / "other.bin", iter([rng.bytes(11)]))
        try:
            broken = answer(path, watched(path, [rng.bytes(40), rng.bytes(40)], [], broken=True))
        except Breaks as error:
            broken = str(error)
        return {"whole": whole, "broken": broken, "files": content(folder)}


@case(replace_file)
def on_the_disk_first(answer, rng):
    """Whether the bytes were flushed to the disk before the name changed."""
    events = []
    with in_a_folder({"weights.bin": b"old"}) as folder:
        with noted_calls(events):
            size_bytes = answer(folder / "weights.bin", iter([rng.bytes(rng.integer(20, 40))]))
        replaced = [(place, same) for place, (name, same) in enumerate(events) if name == "replaced"]
        until, same_folder = replaced[0] if replaced else (len(events), False)
        flushed_bytes = max([size for name, size in events[:until] if name == "fsync"], default=0)
        return {
            "size": size_bytes,
            "flushed": flushed_bytes,
            "same folder": same_folder,
            "files": content(folder),
        }


@cost(replace_file, share=1 / 6)
def not_collected(answer, rng):
    """How many chunks are taken before the first is written: bytes that wait in memory."""
    taken, most = [0], [0]
    with in_a_folder({}) as folder:

        def source():
            for _ in range(64):
                written = sum(path.stat().st_size for path in folder.iterdir())
                most[0] = max(most[0], taken[0] - written)
                taken[0] += 1 << 16
                yield bytes(1 << 16)

        answer(folder / "weights.bin", source())
    return {"bytes taken and not yet in a file": (most[0], 1 << 17)}


def temporary(path):
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_whole(file, chunks):
    size_bytes = 0
    for chunk in chunks:
        size_bytes += file.write(chunk)
    file.flush()
    os.fsync(file.fileno())
    return size_bytes


@mistake(replace_file, "The file is written in place, so a reader finds half of it.")
def in_place(path, chunks):
    with open(path, "wb") as file:
        return write_whole(file, chunks)


@mistake(
    replace_file, "The new file is written aside and then copied over the old one, which is not one step."
)
def copied_over(path, chunks):
    new = temporary(path)
    try:
        with open(new, "wb") as file:
            size_bytes = write_whole(file, chunks)
        path.write_bytes(new.read_bytes())
        return size_bytes
    finally:
        new.unlink()


@mistake(replace_file, "The old file is deleted first, so for a while there is none.")
def deletes_first(path, chunks):
    old = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    new = temporary(path)
    try:
        with open(new, "wb") as file:
            size_bytes = write_whole(file, chunks)
    except BaseException:
        new.unlink()
        if old is not None:
            path.write_bytes(old)
        raise
    os.replace(new, path)
    return size_bytes


@mistake(replace_file, "What was written so far stays behind when the source breaks.")
def leaves_the_rest(path, chunks):
    with open(temporary(path), "wb") as file:
        size_bytes = write_whole(file, chunks)
    os.replace(temporary(path), path)
    return size_bytes


@mistake(
    replace_file, "The name changes before the bytes are on the disk, so a power cut leaves an empty file."
)
def renamed_too_early(path, chunks):
    new, size_bytes = temporary(path), 0
    try:
        with open(new, "wb") as file:
            for chunk in chunks:
                size_bytes += file.write(chunk)
    except BaseException:
        new.unlink()
        raise
    os.replace(new, path)
    return size_bytes


@mistake(replace_file, "A broken source is taken for the end of the data, and half a file becomes the file.")
def takes_half(path, chunks):
    def until_it_breaks():
        with contextlib.suppress(OSError):
            yield from chunks

    new = temporary(path)
    with open(new, "wb") as file:
        size_bytes = write_whole(file, until_it_breaks())
    os.replace(new, path)
    return size_bytes


@mistake(
    replace_file,
    "The new file is made in the folder for temporary files, from where it may not be moved in one step.",
)
def elsewhere(path, chunks):
    descriptor, new = tempfile.mkstemp()
    try:
        with open(descriptor, "wb") as file:
            size_bytes = write_whole(file, chunks)
    except BaseException:
        os.unlink(new)
        raise
    os.rename(new, path)
    return size_bytes


@mistake(replace_file, "All chunks are collected before the first is written.")
def collected(path, chunks):
    whole = b"".join(chunks)
    new = temporary(path)
    with open(new, "wb") as file:
        write_whole(file, [whole[: len(whole) // 2], whole[len(whole) // 2 :]])
    os.replace(new, path)
    return len(whole)


@alternative(replace_file, "A named temporary file with a random name, moved by Path.replace")
def with_tempfile(path, chunks):
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            size_bytes = write_whole(file, chunks)
        except BaseException:
            os.unlink(file.name)
            raise
    Path(file.name).replace(path)
    return size_bytes


@alternative(replace_file, "Bare descriptors, and the folder flushed too")
def with_descriptors(path, chunks):
    new, size_bytes = str(temporary(path)), 0
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for chunk in chunks:
            size_bytes += os.write(descriptor, chunk)
        os.fsync(descriptor)
    except BaseException:
        os.unlink(new)
        raise
    finally:
        os.close(descriptor)
    os.rename(new, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return size_bytes
