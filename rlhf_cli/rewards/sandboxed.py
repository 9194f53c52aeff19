"""The inside of a sandbox: limits itself beyond return, then runs code that nobody trusts. A script of the standard library alone.

Roles: `call` executes code and answers calls of its functions; `script` runs code as a program; `grade` runs tests whose names
stand for functions in a `call` process, so that a test's expected values and verdict are out of reach of the code that it tests.
Values cross as literals: only plain Python data can be an argument or a result. The first thing that a process says is whether it
is locked; code comes after that, so that no code can have said it.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import io
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

LARGEST = 1 << 22  # bytes of one message
VALUE = LARGEST // 4  # bytes of a result, so that it fits into a message as the argument of another call
PRINTED = LARGEST // 32  # characters of output
CALM = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)  # ask a run to stop, not its sandboxes
ENDINGS = (StopIteration, StopAsyncIteration)  # which end a loop of the test instead of the test
OWN = frozenset(dir(builtins))  # names that mean in a test what they mean in Python
SECCOMP_ERRNO, SECCOMP_ALLOW, SECCOMP_KILL = 0x00050000, 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 1, 38
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06  # BPF: load a word, jump if equal, jump if a bit is set, return
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# What pure Python needs to compute, to read its own modules and to talk over pipes that are open already.
PLAIN = {
    "x86_64": (
        *(0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 19, 20, 21, 22, 23, 24, 25, 28, 32, 33, 35, 36, 39, 60, 63),
        *(79, 89, 96, 97, 98, 99, 100, 102, 104, 107, 108, 110, 131, 158, 186, 202, 204, 217, 218, 219, 228, 229, 230, 231),
        *(262, 267, 269, 270, 271, 273, 292, 293, 318, 324, 332, 334, 439),
    ),
    "aarch64": (
        *(17, 23, 24, 48, 57, 59, 61, 62, 63, 64, 65, 66, 67, 72, 73, 78, 79, 80, 93, 94, 96, 98, 99, 101, 113, 114, 115, 123),
        *(124, 128, 132, 134, 135, 139, 153, 160, 163, 165, 169, 172, 173, 174, 175, 176, 177, 178, 179, 214, 215, 216, 222),
        *(226, 233, 278, 283, 291, 293, 439),
    ),
}  # fmt: skip
OPEN = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}  # (call, which argument holds the flags)
CLONE, CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
IOCTL, FCNTL, PRLIMIT = ({"x86_64": a, "aarch64": b} for a, b in ((16, 29), (72, 25), (302, 261)))
WRITING = 0o3 | 0o100 | 0o1000 | 0o20000000  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC, O_TMPFILE
CLONE_THREAD, TCGETS = 0x10000, 0x5401
EXECUTE, READ_FILE, READ_DIR = 1, 1 << 2, 1 << 3  # Landlock's rights
FOLDERS = (".", "/usr/share/zoneinfo", "/nix/store")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
FILES = ("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom")
FCNTL_FINE = (0, 1, 2, 3, 1030)  # duplicate, close-on-exec, read the flags


def program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter: the calls above, files for reading, threads; everything else fails with EPERM."""
    allow, deny = (RETURN, 0, 0, SECCOMP_ALLOW), (RETURN, 0, 0, SECCOMP_ERRNO | EPERM)
    made = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT[machine]), (RETURN, 0, 0, SECCOMP_KILL), (LOAD, 0, 0, 0)]

    def case(call: int, *block: tuple[int, int, int, int]) -> None:
        made.extend([(EQUAL, 0, len(block), call), *block])

    def argument(n: int) -> tuple[int, int, int, int]:
        return (LOAD, 0, 0, 16 + 8 * n)

    for call in PLAIN[machine]:
        case(call, allow)
    for call, flags in OPEN[machine]:
        case(call, argument(flags), (ANY_BIT, 1, 0, WRITING), allow, deny)
    case(CLONE[machine], argument(0), (ANY_BIT, 0, 1, CLONE_THREAD), allow, deny)
    case(CLONE3, (RETURN, 0, 0, SECCOMP_ERRNO | ENOSYS))  # the C library falls back to clone
    case(IOCTL[machine], argument(1), (EQUAL, 0, 1, TCGETS), allow, deny)
    fine = [x for i, command in enumerate(FCNTL_FINE) for x in [(EQUAL, len(FCNTL_FINE) - i, 0, command)]]
    case(FCNTL[machine], argument(1), *fine, deny, allow)
    pointer = (argument(2), (EQUAL, 0, 3, 0), (LOAD, 0, 0, 16 + 8 * 2 + 4), (EQUAL, 0, 1, 0))  # both halves of it are 0
    case(PRLIMIT[machine], *pointer, allow, deny)  # reading a limit
    return [*made, deny]


def lock(memory: int, seconds: int) -> None:
    """Give up everything but computing. Raises OSError where the kernel cannot promise that."""
    for what, value in (
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):  # fmt: skip
        hard = resource.getrlimit(what)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (least, least))
    machine = platform.machine()
    if sys.platform != "linux" or machine not in PLAIN:
        raise OSError(f"no system call filter for {sys.platform} on {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: dies with the worker
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: other processes of this user cannot read its memory
    _drop_capabilities(libc)
    lines = b"".join(struct.pack("HBBI", *line) for line in program(machine))
    code = ctypes.create_string_buffer(lines)
    filters = struct.pack("HxxxxxxP", len(lines) // 8, ctypes.addressof(code))
    unsafe = libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    _own_domain(libc)
    if unsafe or libc.prctl(22, 2, ctypes.c_char_p(filters), 0, 0):  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "the kernel refuses a system call filter (seccomp)")


def _drop_capabilities(libc: Any) -> None:
    """Of root: it then reads no other process's memory and no file of others."""
    header = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    libc.capset(ctypes.c_char_p(header), ctypes.c_char_p(bytes(24)))


def _own_domain(libc: Any) -> bool:
    """Where the kernel has Landlock: a domain, out of which no other process's memory and no file but Python's own can be read."""
    handled = EXECUTE | READ_FILE | READ_DIR
    ruleset = libc.syscall(444, ctypes.c_char_p(struct.pack("Q", handled)), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False
    for path, rights in _readable():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # it is not there
            continue
        libc.syscall(445, ruleset, 1, ctypes.c_char_p(struct.pack("=Qi", rights, fd)), 0)
        os.close(fd)
    done = libc.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _readable() -> Iterator[tuple[str, int]]:
    """What imports of the standard library need, and the empty folder; installed packages, which may hold data, are not among it."""
    library, prefix = os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib")
    yield library, READ_DIR
    yield from _inside(library, ("site-packages", "dist-packages"))
    for folder in filter(os.path.isdir, LIBRARIES):
        yield from _inside(folder, ("python",))  # python3/dist-packages, python3.12/site-packages
    if os.path.isdir(prefix):
        yield from ((os.path.join(prefix, name), READ_FILE) for name in sorted(os.listdir(prefix)) if ".so" in name)
    yield from ((folder, READ_FILE | READ_DIR) for folder in FOLDERS)
    yield from ((file, READ_FILE) for file in FILES)


def _inside(folder: str, without: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """What a folder holds, but for names that begin so."""
    for name in sorted(n for n in os.listdir(folder) if not n.startswith(without)):
        path = os.path.join(folder, name)
        yield path, READ_FILE | READ_DIR if os.path.isdir(path) else READ_FILE


class Gone(EOFError):
    """The other end is gone, sends too much, or is too slow."""


class TooLong(ValueError):
    """A message is larger than any may be."""


def receive(fd: int, most: int = LARGEST, until: float = float("inf")) -> Any:
    """One message, before the monotonic clock says `until`. Raises Gone; ValueError or RecursionError where it is no JSON."""
    (size,) = struct.unpack("!I", _exactly(fd, 4, until))
    if size > most:
        raise Gone("a message is too long")
    return json.loads(_exactly(fd, size, until))


def send(fd: int, message: Any, most: int = LARGEST) -> None:
    """One message. Raises TooLong."""
    raw = json.dumps(message).encode()
    if len(raw) > most:
        raise TooLong(f"over {most} bytes")
    rest = memoryview(struct.pack("!I", len(raw)) + raw)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _exactly(fd: int, size: int, until: float) -> bytes:
    found = b""
    while len(found) < size:
        if until < float("inf"):
            ready = select.poll()
            ready.register(fd, select.POLLIN)
            if not ready.poll(max(0.0, until - time.monotonic()) * 1000):
                raise Gone("its time is up")
        part = os.read(fd, min(size - len(found), 1 << 16))
        if not part:
            raise Gone
        found += part
    return found


def call(inp: int, out: int) -> None:
    """Execute code, tell the names of what can be called, and answer calls."""
    code, names = receive(inp)["code"], {"__name__": "candidate"}
    try:
        exec(compile(code, "response", "exec"), names)
    except BaseException as e:
        send(out, {"error": type(e).__name__})
        return
    send(out, {"names": [n for n, v in names.items() if callable(v) and n.isidentifier()]})
    while True:
        asked = receive(inp)
        try:
            args, kwargs = ast.literal_eval(asked["args"])
            answer = {"value": repr(names[asked["name"]](*args, **kwargs))}
            send(out, answer, VALUE)
        except BaseException as e:
            send(out, {"raised": type(e).__name__})


def script(inp: int, out: int) -> None:
    """Run code as a program with a text as its input; answer with what it prints."""
    code = receive(inp)["code"]
    sys.stdin, sys.stdout = io.StringIO(receive(inp)["input"]), io.StringIO()
    sys.argv = ["program"]
    try:
        exec(compile(code, "response", "exec"), {"__name__": "__main__"})
    except SystemExit as e:
        if e.code not in (None, 0):
            send(out, {"error": "SystemExit"})
            return
    except BaseException as e:
        send(out, {"error": type(e).__name__})
        return
    send(out, {"printed": sys.stdout.getvalue()[:PRINTED]})


class Remote:
    """A function that lives in the other process."""

    def __init__(self, name: str, inp: int, out: int) -> None:
        self.__name__, self._inp, self._out = name, inp, out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        send(self._out, {"name": self.__name__, "args": repr((args, kwargs))})
        answer = receive(self._inp, VALUE)
        if "raised" in answer:
            kind = getattr(builtins, str(answer["raised"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ENDINGS)
            raise kind("raised by the response") if known else RuntimeError(str(answer["raised"]))
        return ast.literal_eval(answer["value"])


def _prepared(setup: str, entry: str, remote: dict[str, Remote]) -> dict[str, Any]:
    """The names of a test after its setup. A setup may be a whole prompt: the entry point that it begins is the response's all the same."""
    names: dict[str, Any] = {"__name__": "test", **remote}
    exec(compile(setup, "setup", "exec"), names)
    if entry:
        names.pop(entry, None)
        names.update(remote)
    return names


def grade(asked: Any, inp: int, out: int, peer_in: int, peer_out: int) -> None:
    """Run each test in names of its own, and report under the token whether it ended without an exception.

    The response's functions stand in for names that nobody else has: the record's entry point alone where it has one, else
    every name but a builtin's. A test whose own arguments are too long is reported as None.
    """
    send(peer_out, receive(inp))  # the code
    known = receive(peer_in)
    entry, names = asked["entry"], known.get("names", [])
    offered = {entry} if entry else {n for n in names if not (n in OWN or n.startswith("__"))}
    remote = {name: Remote(name, peer_in, peer_out) for name in offered.intersection(names)}
    passed: bool | None
    for i, test in enumerate(asked["tests"] if "names" in known else []):
        try:
            exec(compile(test, "test", "exec"), _prepared(asked["setup"], entry, remote))
            passed = True
        except Gone:
            break
        except TooLong:
            passed = None
        except BaseException:
            passed = False
        send(out, {"token": asked["token"], "test": i, "passed": passed})
    send(out, {"token": asked["token"], "end": True})


def main() -> None:
    """Roles and numbers of inherited pipes are the arguments; the first message is the limits, then the code follows."""
    role, *fds = sys.argv[1], *map(int, sys.argv[2:])
    for s in CALM:
        signal.signal(s, signal.SIG_IGN)
    inp, out = fds[:2]
    asked = receive(inp)
    try:
        lock(asked["memory"], asked["seconds"])
    except (OSError, ValueError) as e:
        send(out, {"unsafe": str(e)})
        return
    if role == "grade":
        send(out, receive(fds[2]))  # whether the other one is locked too
        grade(asked, *fds)
        return
    send(out, {"ready": True})
    (call if role == "call" else script)(inp, out)


if __name__ == "__main__":
    main()
