"""What keeps an answer away from the course's own answers, as far as a process can do that to itself.

Two walls, against whoever has read the repository: `refusing` gives a Python audit hook (PEP 578), which says
clearly what is closed; `close_files` asks the kernel (Landlock, Linux 5.13) not to open those files for this
process and its children, whatever they call, nor to let them look into the judge's memory. Where there is no
Landlock the first stands alone, and native code passes it. In the jail (`llmcourse.jail`) there is nothing to open.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence

# Audit events with a path among their arguments, and those that start another program.
PATH_EVENTS = frozenset(
    {
        *("open", "import", "shutil.copyfile", "os.chdir", "os.link", "os.listdir"),
        *("os.rename", "os.scandir", "os.symlink"),
    }
)
PROGRAM_EVENTS = frozenset(
    {"os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "subprocess.Popen"}
)
COURSE_FILES = (".py", ".pyc", ".ipynb", ".md")
CASES = "<cases>"  # what the source of the cases is called in a worker
ENGINE_FOLDER = "llmcourse-engine-"  # how the folders begin in which workers of one engine have theirs

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on every architecture
READ_FILE, PATH_BENEATH, NO_NEW_PRIVILEGES = 1 << 2, 1, 38


def refusing(closed: Sequence[str]) -> Callable[[str, tuple[object, ...]], None]:
    """An audit hook that raises PermissionError for what lies in the closed places, and for every other program."""
    # All of it local: what an answer does to this module, or to os, changes nothing here.
    real_path, decoded, is_absolute, base_name = (
        os.path.realpath,
        os.fsdecode,
        os.path.isabs,
        os.path.basename,
    )
    path_events, program_events, suffixes = PATH_EVENTS, PROGRAM_EVENTS, COURSE_FILES
    places = frozenset(real_path(path) for path in closed)
    below = tuple(place + os.sep for place in places)
    names = frozenset(
        name.split(".")[0]
        for place in places
        # Of git's thousands of files none has a name of its own; what references write is named like what answers do.
        if not place.endswith(".git") and ENGINE_FOLDER not in place
        for _, _, files in os.walk(place)
        for name in files
    )

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event in program_events:
            raise PermissionError("an answer that is judged starts no other program")
        if event not in path_events:
            return
        for argument in arguments:
            if not isinstance(argument, str | bytes | os.PathLike):
                continue
            given = str.__str__(decoded(argument))
            path = real_path(given)
            # By its name too: a folder's descriptor may be what the path is relative to.
            named = not is_absolute(given) and base_name(path).split(".")[0] in names
            if path in places or path.startswith(below) or (named and path.endswith(suffixes)):
                raise PermissionError("the course's own answers are closed to an answer that is judged")

    return refuse


def close_files(closed: Sequence[str]) -> bool:
    """Never again read a file in the closed places, here or in any child; False where the kernel cannot do that.

    To be called before other threads are started: it binds the thread that calls it and what comes of it.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    handled = (ctypes.c_uint64 * 1)(READ_FILE)
    rules = libc.syscall(CREATE_RULESET, handled, ctypes.c_size_t(8), 0)
    if rules < 0:
        return False
    try:
        for path in _open_places([os.path.realpath(path) for path in closed]):
            with contextlib.suppress(OSError):  # what cannot be opened needs no permission
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    # struct landlock_path_beneath_attr is packed: 8 bytes of rights, 4 of a descriptor.
                    rule = READ_FILE.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
                    libc.syscall(ADD_RULE, rules, PATH_BENEATH, rule, 0)
                finally:
                    os.close(descriptor)
        if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0:
            return False
        return bool(libc.syscall(RESTRICT_SELF, rules, 0) == 0)
    finally:
        os.close(rules)


def _open_places(closed: Sequence[str], folder: str = "/") -> Iterator[str]:
    """The largest files and folders that hold nothing closed; links are left out, their targets are among the rest."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() or entry.path in closed:
                continue
            if any(place.startswith(entry.path + os.sep) for place in closed):
                yield from _open_places(closed, entry.path)
            else:
                yield entry.path
