"""The jail that judged answers run in: what the kernel lets a worker see and use. Imports no torch.

Two steps, both by the kernel's own means. bubblewrap makes the outer jail once, around the zygote: no network, no
other process, and of the file system only Python's installation, this package and the folders of exercises, all of
it read-only. The zygote forks each worker into an inner jail: a process namespace that dies with its first process,
a network, IPC and mount namespace of its own, nothing writable but a memory file system of bounded size, the closed
places covered, a user of its own without any capability, and a filter for system calls that would take memory where
no limit sees it or reach deep into the kernel. The worker is the first process of its namespace, so the kernel ends
with it everything it started; signals that it sends itself do not end it. The zygote watches what all processes of a
namespace hold together, and ends the worker where that is too much.

What it does not protect from: faults of the kernel itself; kernel memory behind sockets and pipes, which only a
control group would count; and readings of time and cache that betray what else the machine does.
"""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

FOLDER = "/llmcourse-answer"  # where a worker in the jail may write
DISK_BYTES, MAX_FILES = 1 << 30, 1 << 16
MAX_PROCESSES = 256  # threads count: an answer may read with 35 of them at once
MAX_CPU_S = 600
WATCH_S = 0.05
FIRST_UID, UIDS = 1_700_000_000, 1 << 16  # where the judge is root: a user a worker, which no account has
NOBODY = 65534
_uids_used = 0

NEWNS, NEWUTS, NEWIPC = 0x00020000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, NOEXEC, BIND, PRIVATE, RECURSIVE = 1, 2, 4, 8, 4096, 1 << 18, 16384
SET_DUMPABLE, SET_DEATH_SIGNAL, SET_SECCOMP, DROP_BOUND, NO_NEW_PRIVILEGES = 4, 1, 22, 24, 38
SECCOMP_FILTER, CAPABILITY_VERSION_3, LAST_CAPABILITY = 2, 0x20080522, 63

# System calls a worker is refused, by architecture (AUDIT_ARCH of linux/audit.h): memory that belongs to no process
# and no bounded file system, other kinds of namespaces and mounts, and what reaches into the kernel or other processes.
REFUSED = {
    "x86_64": (
        0xC000003E,
        {
            "memfd_create": 319,
            "memfd_secret": 447,
            "shmget": 29,
            "msgget": 68,
            "unshare": 272,
            "setns": 308,
            "mount": 165,
            "fsopen": 430,
            "open_tree": 428,
            "pivot_root": 155,
            "chroot": 161,
            "ptrace": 101,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "bpf": 321,
            "perf_event_open": 298,
            "userfaultfd": 323,
            "io_uring_setup": 425,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            # What is read or moved by these is in no count.
            "io_setup": 206,
            "splice": 275,
            "tee": 276,
            "vmsplice": 278,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "memfd_create": 279,
            "memfd_secret": 447,
            "shmget": 194,
            "msgget": 186,
            "unshare": 97,
            "setns": 268,
            "mount": 40,
            "fsopen": 430,
            "open_tree": 428,
            "pivot_root": 41,
            "chroot": 51,
            "ptrace": 117,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "bpf": 280,
            "perf_event_open": 241,
            "userfaultfd": 282,
            "io_uring_setup": 425,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "io_setup": 0,
            "splice": 76,
            "tee": 77,
            "vmsplice": 75,
        },
    ),
}


# How a process is made, by architecture: clone, clone3, and the older calls, which x86 alone has.
PRCTL = {"x86_64": 157, "aarch64": 167}
NEW_PROCESS = {"x86_64": (56, 435, (57, 58)), "aarch64": (220, 435, ())}
CLONE_THREAD, FIRST_ARGUMENT = 0x00010000, 16  # the latter: where a filter finds the low half of it


class NoJail(OSError):
    """The system does not let us build the jail: one line says what is missing."""


def missing() -> str | None:
    """What this system lacks for a jail, as far as it can be told without building one; None for nothing."""
    if sys.platform != "linux":
        return f"bubblewrap needs Linux, and this is {sys.platform}"
    if platform.machine() not in REFUSED:
        return f"no filter of system calls is known for {platform.machine()}"
    if shutil.which("bwrap") is None:
        return "there is no bubblewrap here; on Debian: apt-get install bubblewrap"
    return None


def refusal() -> str | None:
    """Why answers cannot be jailed here, found out by building a jail; None where they can."""
    lacking = missing()
    if lacking is not None:
        return lacking
    ours, theirs = socket.socketpair()
    root = str(Path(__file__).parents[1])
    program = [sys.executable, "-P", "-c", "from llmcourse.jail import prove; prove()", str(theirs.fileno())]
    with ours, theirs:
        ran = subprocess.run(
            command(program, []),
            env=environment({"PYTHONPATH": root}),
            pass_fds=(theirs.fileno(),),
            stderr=subprocess.PIPE,
            check=False,
        )
        theirs.close()
        said = ours.recv(4096).decode(errors="replace")
    heard = ran.stderr.decode(errors="replace").splitlines()
    if not said and ran.returncode != 0:
        return heard[-1] if heard else f"bubblewrap ended with {ran.returncode}"
    return said or None


def command(program: Sequence[str], readable: Sequence[str]) -> list[str]:
    """The program inside the outer jail, where it sees Python, this package and `readable`, and may change nothing."""
    is_root = os.geteuid() == 0
    made = ["bwrap", "--die-with-parent", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    made += ["--unshare-cgroup-try"]
    # Rights over the jail's own namespaces, which a worker loses before an answer runs.
    rights = ["CAP_SYS_ADMIN", "CAP_SETPCAP", "CAP_SYS_RESOURCE"]
    if is_root:
        rights += ["CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_SYS_PTRACE"]
    else:
        made += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    made += ["--cap-drop", "ALL"]
    for right in rights:
        made += ["--cap-add", right]
    # Folders are made before what lies in them, or they would be closed to everybody but root.
    made += ["--tmpfs", "/tmp", "--dir", "/dev", "--dir", "/etc", "--dir", "/sys/devices"]
    for place in ("/usr", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        made += ["--ro-bind-try", place, place]
    for place in ("/bin", "/lib", "/lib64"):
        if os.path.islink(place):
            made += ["--symlink", os.readlink(place), place]
        else:
            made += ["--ro-bind-try", place, place]
    for place in _readable(readable):
        made += ["--dir", os.path.dirname(place), "--ro-bind", place, place]
    made += ["--ro-bind-try", "/sys/devices/system", "/sys/devices/system"]  # how many cores, which caches
    # The zygote's own; each worker mounts another over it.
    made += ["--size", str(1 << 24), "--tmpfs", FOLDER]
    made += ["--proc", "/proc", "--symlink", "/proc/self/fd", "/dev/fd"]
    # Not bubblewrap's own /dev: its terminals need a user namespace more, in which workers get no rights.
    plain = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    for device in plain + sorted(glob.glob("/dev/nvidia*")):
        made += ["--dev-bind", device, device]
    made += ["--remount-ro", "/tmp", "--remount-ro", "/", "--chdir", "/", "--"]
    return [*made, *program]


def _readable(more: Sequence[str]) -> list[str]:
    """Python's own folders, this package and `more`, without what lies in another of them."""
    paths = sysconfig.get_paths()
    roots = {sys.prefix, sys.base_prefix, paths["stdlib"], paths["purelib"], paths["platlib"]}
    roots |= {str(Path(sys.executable).resolve().parents[1]), str(Path(__file__).parent), *more}
    real = sorted(root for root in map(os.path.abspath, roots) if os.path.exists(root))
    return [
        root
        for root in real
        if not root.startswith("/usr/") and not any(root.startswith(other + os.sep) for other in real)
    ]


def environment(more: dict[str, str]) -> dict[str, str]:
    """The variables a jailed process gets: none of the judge's secrets, a home that it may write to."""
    kept = ("PATH", "LANG", "LC_ALL", "TZ", "PYTHONHASHSEED", "LLMCOURSE_LESSONS", "CUDA_VISIBLE_DEVICES")
    passed = {name: os.environ[name] for name in kept if name in os.environ}
    return {
        **passed,
        "USER": "nobody",
        "HOME": FOLDER,
        "TMPDIR": FOLDER,
        "PYTHONDONTWRITEBYTECODE": "1",
        **more,
    }


# ------------------------------------------------------------------------------------------------- inside, a worker


def call(result: int, what: str) -> int:
    """The result of a C call; NoJail when it failed."""
    if result < 0:
        error = ctypes.get_errno()
        raise NoJail(error, f"{what}: {os.strerror(error)}")
    return result


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    raw = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    call(_library().mount(raw[0], raw[1], raw[2], ctypes.c_ulong(flags), raw[3]), f"mounting {target}")


def enclose(closed: Sequence[str], uid: int, disk_bytes: int = DISK_BYTES) -> None:
    """Network, IPC and mounts of this process's own: its processes, a folder that it may fill, nothing of `closed`."""
    call(_library().unshare(NEWNS | NEWIPC | NEWNET | NEWUTS), "namespaces")
    mount("none", "/", None, RECURSIVE | PRIVATE)
    mount("proc", "/proc", "proc", NOSUID | NODEV | NOEXEC)
    options = f"size={disk_bytes},nr_inodes={MAX_FILES},mode=0700,uid={uid},gid={uid}"
    mount("answer", FOLDER, "tmpfs", NOSUID | NODEV, options)
    for place in closed:
        if os.path.isdir(place):
            mount("closed", place, "tmpfs", NOSUID | NODEV | NOEXEC | RDONLY, "size=4k,nr_inodes=1,mode=0555")
        elif os.path.exists(place):
            mount("/dev/null", place, None, BIND)


def step_down(uid: int, *, alone: bool = False) -> None:
    """Become a user without any right, in a user namespace that counts its processes alone; there is no way back.

    alone: start no other process either, threads only.
    """
    library = _library()
    library.prctl(SET_DEATH_SIGNAL, 0, 0, 0, 0)
    if uid != os.getuid():
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        library.prctl(SET_DUMPABLE, 1, 0, 0, 0)  # or /proc/self is root's
    call(library.unshare(NEWUSER), "a user namespace")
    for name, text in (
        ("self/setgroups", "deny"),
        ("self/uid_map", f"{NOBODY} {uid} 1"),
        ("self/gid_map", f"{NOBODY} {uid} 1"),
        ("sys/user/max_user_namespaces", "0"),
    ):
        try:
            Path("/proc", name).write_text(text)
        except OSError as error:
            raise NoJail(error.errno, f"writing /proc/{name}: {error.strerror}") from error
    for capability in range(LAST_CAPABILITY + 1):
        library.prctl(DROP_BOUND, capability, 0, 0, 0)
    header, nothing = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    call(library.capset(header, nothing), "dropping capabilities")
    call(library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    library.prctl(SET_DUMPABLE, 1, 0, 0, 0)  # the judge reads how much memory it takes
    call(library.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "dying with the zygote")
    resource.setrlimit(resource.RLIMIT_NPROC, (MAX_PROCESSES, MAX_PROCESSES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))
    refuse_system_calls(alone=alone)


def refuse_system_calls(*, alone: bool = False) -> None:
    """Install the filter: EPERM for what is refused, another architecture's calls end the process.

    alone: no other process either. A thread is made by the same call with a flag; the newer call hides its flags from
    a filter, so it is said not to exist, and the C library takes the older one.
    """
    architecture, numbers = REFUSED[platform.machine()]
    load, give = 0x20, 0x06  # BPF_LD|W|ABS, BPF_RET|K
    equal, at_least = 0x15, 0x35  # BPF_JMP|JEQ|K, BPF_JMP|JGE|K
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO|EPERM, _KILL_PROCESS
    test_bits, no_such_call = 0x45, 0x00050026  # BPF_JMP|JSET|K, SECCOMP_RET_ERRNO|ENOSYS
    clone, clone3, older = NEW_PROCESS[platform.machine()]
    refused = sorted([*numbers.values(), *(older if alone else ())])
    threads_only = [
        *((equal, 0, 1, clone3), (give, 0, 0, no_such_call)),
        *((equal, 0, 2, clone), (load, 0, 0, FIRST_ARGUMENT), (test_bits, 0, 1, CLONE_THREAD)),
    ]
    # Not to hide what it holds from the judge, who may read /proc of a process only while it is dumpable.
    stays_readable = [
        *((equal, 0, 4, PRCTL[platform.machine()]), (load, 0, 0, FIRST_ARGUMENT)),
        *((equal, 0, 1, SET_DUMPABLE), (give, 0, 0, refuse), (give, 0, 0, allow)),
    ]
    rest = [*stays_readable, *(threads_only if alone else [])]
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    # Calls of x86's 32-bit-pointer variant carry this bit and would pass by their number.
    to_refusal = len(refused) + len(rest)
    program.append((at_least, to_refusal + 1, 0, 0x40000000))
    program += [(equal, to_refusal - index, 0, number) for index, number in enumerate(refused)]
    program += [*rest, (give, 0, 0, allow), (give, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    described = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    call(_library().prctl(SET_SECCOMP, SECCOMP_FILTER, described, 0, 0), "filtering system calls")


class Watch:
    """In the zygote: workers and the memory that each may hold together with everything it started."""

    def __init__(self) -> None:
        self._at_most: dict[int, int] = {}
        self.ended: set[int] = set()

    def begin(self, worker: int, memory_bytes: int) -> None:
        self._at_most[worker] = memory_bytes

    def end(self, worker: int) -> bool:
        """Watch it no longer; whether it was ended for what it held."""
        self._at_most.pop(worker, None)
        was_ended = worker in self.ended
        self.ended.discard(worker)
        return was_ended

    def look(self) -> None:
        """End the workers that hold too much, by now."""
        if not self._at_most:
            return
        processes = [name for name in os.listdir("/proc") if name.isdigit()]
        # Pages that forks share are counted for each of them here, which is quick.
        quick = sum(_number(f"/proc/{name}/statm", 1, b"") for name in processes) * resource.getpagesize()
        if quick <= min(self._at_most.values()):
            return
        held: dict[str, int] = {}
        for name in processes:
            kilobytes = _number(f"/proc/{name}/smaps_rollup", 1, b"Pss:")
            held[_namespace(name)] = held.get(_namespace(name), 0) + kilobytes * 1024
        for worker, at_most in self._at_most.items():
            if held.get(_namespace(worker), 0) > at_most:
                self.ended.add(worker)
                os.kill(worker, signal.SIGKILL)


def _namespace(process: int | str) -> str:
    """Which process namespace a process is in; "" for one that has ended."""
    try:
        return os.readlink(f"/proc/{process}/ns/pid")
    except OSError:
        return ""


def _number(path: str, at: int, begins: bytes) -> int:
    """Word `at` of the first line that begins so; 0 for a process that has ended meanwhile."""
    try:
        with open(path, "rb") as file:
            return next(int(line.split()[at]) for line in file if line.startswith(begins))
    except (OSError, StopIteration):
        return 0


def fork_into(work: Callable[[], object], *, closed: Sequence[str], alone: bool = False) -> tuple[int, int]:
    """Fork `work` into an inner jail, from within the outer one; its process id and a pipe that says why it failed.

    alone: it starts no other process.
    """
    library, uid = _library(), _fresh_uid()
    reading, writing = os.pipe()
    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    call(library.unshare(NEWPID), "a process namespace")
    worker = os.fork()
    if worker == 0:
        os.close(own)
        os.close(reading)
        _worker(work, closed, uid, writing, alone)
    call(library.setns(own, NEWPID), "this process's own namespace")
    os.close(own)
    os.close(writing)
    return worker, reading


def _worker(
    work: Callable[[], object], closed: Sequence[str], uid: int, writing: int, alone: bool
) -> NoReturn:
    try:
        enclose(closed, uid)
        step_down(uid, alone=alone)
        os.close(writing)
    except BaseException as error:  # noqa: BLE001 - this is a fork of another program, and must not run on in it
        os.write(writing, str(error).encode())
        os._exit(3)
    try:
        work()
        os._exit(0)
    finally:
        os._exit(3)


def ending(worker: int, reading: int) -> tuple[int, str]:
    """How a worker ended, once it has: (its wait status, why the jail could not be built or "")."""
    status = os.waitpid(worker, 0)[1]
    with os.fdopen(reading, "rb") as pipe:
        return status, pipe.read().decode(errors="replace")


def _fresh_uid() -> int:
    """A user for a worker: one of its own where this process may choose, else the only one there is."""
    global _uids_used
    ids = Path("/proc/self/uid_map").read_text().split()
    if int(ids[2]) <= FIRST_UID + UIDS:
        return os.getuid()
    _uids_used += 1
    return FIRST_UID + _uids_used % UIDS


def prove() -> None:
    """In the outer jail, before anything is imported: end this process with one line where the inner one fails."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    try:
        status, why = ending(*fork_into(lambda: None, closed=[]))
        if status != 0:
            raise NoJail(0, why or f"the inner jail ended with status {status}")
    except OSError as error:
        connection.sendall(f"no jail inside bubblewrap: {error}".encode())
        os._exit(0)
    connection.detach()


# ------------------------------------------------------------------------------------------ which process is which


def expect_hello(connection: socket.socket) -> None:
    """Before a worker is forked: let the kernel say who speaks at the other end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


def hear_hello(connection: socket.socket, limit_s: float) -> int:
    """Process id of the worker at the other end as this process sees it, by the kernel's word and not the worker's."""
    connection.settimeout(limit_s)
    try:
        said, attached, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(struct.calcsize("3i")))
    except TimeoutError:
        said, attached = b"", []
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
    connection.settimeout(None)
    for level, kind, data in attached:
        if said and level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            return int(struct.unpack("3i", data[: struct.calcsize("3i")])[0])
    raise NoJail(0, "the worker did not say hello")


def say_hello(connection: socket.socket) -> None:
    connection.sendall(b"w")
