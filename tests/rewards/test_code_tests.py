"""Code tests: what passes, and everything that a response may try instead of being right."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhf_cli.errors import ConfigError
from rlhf_cli.launch.stop import SIGNALS
from rlhf_cli.rewards import sandboxed
from rlhf_cli.rewards.code_tests import CodeTests, code_of
from rlhf_cli.rewards.sandboxed import LARGEST, PRLIMIT
from rlhf_cli.types import Sample

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="THE SANDBOX NEEDS LINUX: code_tests is not tested here"
)
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def make(**settings):
    return CodeTests(**{"reward": "all_or_nothing", "seconds": 5.0, "memory_mb": 256} | settings)


def score(code, tests=TESTS, **more):
    settings = {k: more.pop(k) for k in ("reward", "seconds", "memory_mb") if k in more}
    got = make(**settings)([Sample("p", code, meta={"tests": tests, **more})], torch.zeros(1, dtype=torch.int64))
    return got.value[0].item()


def test_right_wrong_and_half_right():
    assert score("def add(a, b):\n    return a + b") == 1
    half = "def add(a, b):\n    return 3"
    assert score(half) == 0 and score(half, reward="fraction") == 0.5
    assert score("def add(a, b): return a - b") == 0 == score("def ad(") == score("") == score("add = 3")


def test_code_is_the_last_fence():
    text = "First\n```python\nbad\n```\nthen\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    assert code_of(text).startswith("def add") and score(text) == 1


def test_values_cross_whole_and_exceptions_keep_their_kind():
    code = "def f(x): return {'a': [x, (1, 2.5)], 'b': {3}, 'c': None}\ndef g(): raise KeyError('x')"
    tests = [
        "assert f('q') == {'a': ['q', (1, 2.5)], 'b': {3}, 'c': None}",
        "try:\n    g()\nexcept KeyError:\n    pass\nelse:\n    assert False",
    ]
    assert score(code, tests) == 1


def test_entry_point_and_setup():
    test = "def check(candidate):\n    assert math.isclose(candidate(4), 2.0)"
    assert score("def root(x): return x ** 0.5", test, entry_point="root", setup="import math") == 1


def test_programs_that_read_and_print():
    cases = [{"input": "2 3\n", "output": "5"}, {"input": "1 1\n", "output": "2\n"}]
    add = "a, b = map(int, input().split())\nprint(a + b)"
    assert score(add, [], cases=cases) == 1
    assert (
        score("print(5)", [], cases=cases, reward="fraction") == 0.5
        and score("import sys; print(5); sys.exit(3)", [], cases=cases[:1]) == 0
    )


def test_a_record_without_tests_is_missing():
    got = make()([Sample("p", "x")], torch.zeros(1, dtype=torch.int64))
    assert got.missing.tolist() == [True] and got.reasons[0].startswith(
        "its record has no tests: map dataset.columns.meta.tests"
    )


ADD = "def add(a, b):\n    return 7\n"
FORGED = {
    "printing passed": "print('passed', flush=True)\nimport sys; sys.stderr.write('OK\\n')\n",
    "leaving with success": "import os\nos._exit(0)\n",
    "leaving when called": "import os\ndef add(a, b):\n    os._exit(0)\n",
    "exit": "raise SystemExit(0)\n",
    "an object that equals everything": "class E(int):\n    def __eq__(self, o): return True\n    def __repr__(self): return 'E'\ndef add(a, b): return E()\n",
    "a message on every pipe": (
        "import os, json, struct\nfor fd in range(3, 400):\n    try:\n        m = json.dumps({'token': '', 'test': 0, 'passed': True, 'end': True}).encode()\n"
        "        os.write(fd, struct.pack('!I', len(m)) + m)\n    except OSError: pass\n"
    ),
    "another assert": "import builtins\nbuiltins.AssertionError = type('A', (BaseException,), {})\n__debug__ or 1\n",
    "patched frames": "import sys\nfor f in [sys._getframe(i) for i in range(3)]:\n    f.f_locals.update(passed=True)\n    f.f_globals['grade'] = None\n",
}


@pytest.mark.parametrize("how", FORGED)
def test_a_verdict_cannot_be_forged(how):
    own = FORGED[how]
    assert score(own if "def add" in own else ADD + own) == 0
    assert score((own if "def add" in own else own + ADD), reward="fraction") == 0


NAMED = {
    "abs": ("def f(x): return 0.0\ndef abs(x): return 0", "assert abs(f(3.0) - 9.0) < 1e-6"),
    "len": ("def f(x): return []\ndef len(x): return 3", "assert len(f(3)) == 3"),
    "any": ("def f(x): return 1\ndef any(x): return True", "assert any([f(3) == 9])"),
    "sorted": ("def f(x): return [2]\ndef sorted(x): return [1, 2]", "assert sorted(f(3)) == [1, 2]"),
    "in another alphabet": ("def f(x): return 0.0\ndef \uff41\uff42\uff53(x): return 0", "assert abs(f(3.0) - 9.0) < 1e-6"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_what_a_test_calls_is_not_the_response_s(name):
    code, test = NAMED[name]
    assert score(code, [test]) == 0
    assert score("def f(x): return 'nine'\n" + code.partition("\n")[2], ["assert f(3) == 'nine'"]) == 1


def test_an_exception_that_ends_a_loop_ends_the_test():
    code = "def f(x): raise {}"
    test = "def check(candidate):\n    assert all(map(lambda c: candidate(c[0]) == c[1], [(1, 2), (2, 3)]))"
    for name in ("StopIteration", "StopAsyncIteration"):
        assert score(code.format(name), test, entry_point="f") == 0
    assert score("def f(x): return x + 1", test, entry_point="f") == 1


def test_beside_an_entry_point_a_test_calls_nothing_of_the_response():
    prompt = "def poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\ndef find_zero(xs):\n    '''Where poly is 0.'''\n"
    test = "def check(candidate):\n    assert abs(poly([-2, 1], candidate([-2, 1]))) < 1e-4"
    record = {"tests": test, "entry_point": "find_zero", "setup": prompt}
    forged = "def poly(xs, x): return 0\ndef find_zero(xs): return 7"
    assert score(forged, **record) == 0 == score(forged, test, entry_point="find_zero")
    assert score(prompt + "    return -xs[0] / xs[1]", **record) == 1
    # The function that the prompt begins is the response's, also where the response has none.
    nothing = "def check(candidate):\n    assert candidate([1]) is None"
    assert score("def poly(): pass", nothing, entry_point="find_zero", setup=prompt) == 0
    assert score("def find_zero(xs): pass", nothing, entry_point="find_zero", setup=prompt) == 1


WRITES = "import os, json, struct\ndef say(raw, size=None):\n    for fd in range(3, 400):\n        try: os.write(fd, struct.pack('!I', size or len(raw)) + raw)\n        except OSError: pass\n"
SAID = {
    "that the machine is unsafe": 'say(b\'{"unsafe": "x"}\')',
    "no object": "say(b'5')",
    "a number as output": "say(b'{\"printed\": 5}')",
    "nested beyond measure": "say(b'[' * 100000)",
    "no text": "say(b'\\xff\\xfe')",
    "more than there may be": "say(b'', 1 << 31)",
    "a length and nothing": "say(b'', 8)\nimport time\ntime.sleep(60)",
}


@pytest.mark.parametrize("what", SAID)
def test_a_program_that_writes_to_its_pipes_fails(what):
    start = time.monotonic()
    got = make(seconds=1.0)(
        [Sample("p", WRITES + SAID[what], meta={"cases": [{"input": "", "output": "5"}]})],
        torch.zeros(1, dtype=torch.int64),
    )
    assert got.value.tolist() == [0] and not got.reasons and time.monotonic() - start < 30


def test_a_builtin_s_name_is_the_response_s_where_the_record_says_so():
    code = "def sum(a, b): return a - b\ndef len(x): return 7"
    tests = ["assert sum(5, 3) == 2", "assert len([1]) == 1 and sum(1, 1) == 0"]
    assert score(code, tests, entry_point="sum") == 1 and score(code, tests) == 0
    check = "def check(candidate):\n    assert candidate(5, 3) == 2 and len('ab') == 2"
    assert score(code, check, entry_point="sum") == 1


@pytest.mark.parametrize(
    ("meta", "why"),
    [
        ({"tests": TESTS, "setup": "#" * LARGEST}, "all of them, an input, and an argument may take 4 MB each"),
        ({"tests": "assert add('x' * (5 << 20), 1)"}, "all of them, an input, and an argument may take 4 MB each"),
        ({"cases": [{"input": "x" * LARGEST, "output": "1"}]}, "all of them, an input, and an argument may take 4 MB each"),
        ({"cases": [{"input": "", "output": "x" * 140_000}]}, "a program may print 131072 characters"),
    ],
)  # fmt: skip
def test_tests_that_do_not_fit_are_missing(meta, why):
    got = make()([Sample("p", "def add(a, b): return 1\nprint(1)", meta=meta)], torch.zeros(1, dtype=torch.int64))
    assert got.missing.tolist() == [True] and got.reasons == {0: f"its tests are too large: {why}"}


def test_large_values_and_the_longest_code_fit():
    assert score("def add(a, b): return len(a)", "assert add('x' * (3 << 20), 1) == 3 << 20") == 1
    assert score("#" + "\U0001f600" * 199_000 + "\ndef add(a, b): return a + b") == 1
    assert score("def big(): return 'x' * (2 << 20)\ndef add(a, b): return 1", "assert add(big(), 1)") == 0


def test_an_end_of_file_of_the_code_ends_its_own_test_only():
    code = "def add(a, b):\n    if a == 1: raise EOFError\n    return a + b"
    assert score(code, reward="fraction") == 0.5


def test_a_child_that_does_not_start_is_missing(monkeypatch):
    from rlhf_cli.rewards import sandbox

    monkeypatch.setattr(sandbox, "SCRIPT", os.devnull)
    case = {"cases": [{"input": "", "output": "1"}]}
    got = make()([Sample("p", "print(1)", meta=m) for m in (case, {"tests": TESTS})], torch.zeros(2, dtype=torch.int64))
    assert got.reasons == dict.fromkeys((0, 1), "the sandbox did not start within 60 s, or was killed")


def test_signals_that_stop_a_run_do_not_reach_the_code():
    code = "import signal\nprint([int(s) for s in signal.Signals if signal.getsignal(s) == signal.SIG_IGN])"
    ignored = sorted({*map(int, SIGNALS), int(signal.SIGPIPE), int(signal.SIGXFSZ)})
    assert score(code, [], cases=[{"input": "", "output": str(ignored)}]) == 1


def attempt(statement, tmp_path):
    """Whether a statement fails inside: the function returns the name of what it raises."""
    code = f"def tried():\n    try:\n        {statement}\n    except BaseException as e:\n        return type(e).__name__\n    return 'done'"
    tests = [
        "assert tried() in ('PermissionError', 'OSError', 'BlockingIOError', 'FileNotFoundError', 'MemoryError', 'ValueError'), tried()"
    ]
    return score(code, tests, memory_mb=128)


FORBIDDEN = {
    "write a file": "open('here.txt', 'w').write('x')",
    "write elsewhere": "open({outside!r}, 'w').write('x')",
    "append": "open({outside!r}, 'a')",
    "delete": "__import__('os').unlink({outside!r})",
    "rename": "__import__('os').rename({outside!r}, {outside!r} + '2')",
    "make a folder": "__import__('os').mkdir({outside!r} + 'd')",
    "change a mode": "__import__('os').chmod({outside!r}, 0)",
    "truncate": "__import__('os').truncate({outside!r}, 0)",
    "link": "__import__('os').symlink('a', {outside!r} + 'l')",
    "fork": "__import__('os').fork()",
    "run a program": "__import__('os').execv('/bin/true', ['true'])",
    "spawn": "__import__('_posixsubprocess') and __import__('os').posix_spawn('/bin/true', ['true'], {{}})",
    "shell": "(_ for _ in ()).throw(OSError) if __import__('os').system('true') else None",
    "a socket": "__import__('socket').socket()",
    "a local socket": "__import__('socket').socket(1)",
    "a pair of sockets": "__import__('socket').socketpair()",
    "signal the worker": "__import__('os').kill({pid}, 9)",
    "signal a group": "__import__('os').killpg({pid}, 9)",
    "leave the session": "__import__('os').setsid()",
    "read the worker's memory": "open('/proc/{pid}/mem', 'rb').read(1)",
    "read its environment": "open('/proc/{pid}/environ', 'rb').read()",
    "more memory": "__import__('resource').setrlimit(9, (1 << 40, 1 << 40))",
    "change a limit": (
        "c = __import__('ctypes'); m = c.CDLL(None).mmap; m.restype = c.c_void_p; at = 1 << 32; here = m(c.c_void_p(at), c.c_size_t(4096), 3, 0x32, -1, c.c_long(0)); "
        "here == at and c.CDLL(None).syscall({prlimit}, 0, 4, c.c_void_p(at), None) and (_ for _ in ()).throw(OSError)"
    ),  # to 0, by a pointer whose low half is 0
    "a big list": "[0] * (1 << 28)",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_kernel_refuses(what, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("kept")
    statement = FORBIDDEN[what].format(outside=str(outside), pid=os.getpid(), prlimit=PRLIMIT[platform.machine()])
    assert attempt(statement, tmp_path) == 1, what
    assert outside.read_text() == "kept" and os.listdir(tmp_path) == ["outside.txt"]


IMPORTS = (
    "import bz2, ctypes, datetime, decimal, hashlib, heapq, json, lzma, math, os, random, re, sqlite3, ssl, statistics, time, zlib, zoneinfo\n"
    "def f(): return [os.listdir(), random.SystemRandom().random() < 2, len(str(zoneinfo.ZoneInfo('UTC'))), time.localtime(0)[0] > 1]"
)


def test_what_the_standard_library_needs_can_be_read():
    assert score(IMPORTS, "assert f() == [[], True, 3, True]") == 1


@pytest.mark.parametrize(
    "statement", ["open({outside!r}).read()", "__import__('os').listdir({folder!r})", "open('/etc/passwd').read()"]
)
def test_files_of_others_cannot_be_read(statement, tmp_path):
    if not landlocked():
        pytest.skip("THIS KERNEL HAS NO LANDLOCK: code can read what this user can")
    outside = tmp_path / "answers.jsonl"
    outside.write_text("5")
    statement = statement.format(outside=str(outside), folder=str(tmp_path))
    assert attempt(statement, tmp_path) == 1
    case = {"input": "", "output": "PermissionError"}
    code = f"try:\n    {statement}\nexcept Exception as e:\n    print(type(e).__name__)"
    assert score(code, [], cases=[case]) == 1


def landlocked():
    """Whether the kernel has Landlock, and in a domain the memory of the parent cannot be read."""
    code = (
        "import ctypes, os\nfrom rlhf_cli.rewards import sandboxed\nlibc = ctypes.CDLL(None)\nlibc.prctl(38, 1, 0, 0, 0)\n"
        "own = sandboxed._own_domain(libc)\ntry:\n    open(f'/proc/{os.getppid()}/mem', 'rb').read(1)\n    print(own, 'read')\n"
        "except OSError:\n    print(own, 'refused')"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "False" or said == ["True", "refused"]
    return said[0] == "True"


def test_a_domain_hides_other_processes_even_from_root():
    if not landlocked():
        pytest.skip("THIS KERNEL HAS NO LANDLOCK: only the filter and the missing capabilities hide other processes")


def test_a_fork_bomb_starts_nothing():
    before = len([p for p in Path("/proc").iterdir() if p.name.isdigit()])
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: break\n"
    assert score(bomb + "def add(a, b): return a + b") == 1  # it goes on, alone
    assert len([p for p in Path("/proc").iterdir() if p.name.isdigit()]) < before + 50


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "def add(a, b):\n    while True: pass",
        "import time\ndef add(a, b): time.sleep(100)",
        "def add(a, b):\n    return '9' * 10**9",
        "x = []\nwhile True: x.append(bytearray(10**6))",
        "def add(a, b): return add(a, b)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b): return add(b, a)",
        "def add(a, b): return eval('(' * 10000)",
    ],
)
def test_time_and_memory_end(code):
    start = time.monotonic()
    assert score(code, seconds=1.0, memory_mb=128) == 0
    assert time.monotonic() - start < 20


def test_all_cases_share_the_time():
    start = time.monotonic()
    assert score("while True: pass", [], cases=[{"input": "", "output": "1"}] * 20, seconds=1.0) == 0
    assert time.monotonic() - start < 15


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    fds = len(os.listdir("/proc/self/fd"))
    score("while True: pass", seconds=0.5)
    score("print(1)", [], cases=[{"input": "", "output": "1"}])
    assert os.listdir(tmp_path) == [] and len(os.listdir("/proc/self/fd")) == fds


def test_the_filter_is_an_allow_list_of_both_machines():
    for machine in ("x86_64", "aarch64"):
        lines = sandboxed.program(machine)
        assert lines[-1] == (sandboxed.RETURN, 0, 0, sandboxed.SECCOMP_ERRNO | sandboxed.EPERM) and len(lines) < 4096
        for i, (code, yes, no, _) in enumerate(lines):  # every jump stays inside
            if code in (sandboxed.EQUAL, sandboxed.ANY_BIT):
                assert i + 1 + max(yes, no) < len(lines)


def test_a_machine_that_cannot_hold_it_is_refused():
    from rlhf_cli.rewards.sandbox import Child

    child = Child.__new__(Child)
    (inside, out), (its_in, into) = os.pipe(), os.pipe()
    sandboxed.send(out, {"unsafe": "the kernel refuses"})
    child.ours = [into, inside]
    with pytest.raises(
        ConfigError,
        match=r"^reward\.code_tests: this machine cannot hold untrusted code: the kernel refuses; use Linux",
    ):
        child.begin({})
    for fd in (inside, out, its_in, into):
        os.close(fd)
    with pytest.raises(ConfigError, match=r"^reward\.code_tests: seconds=0, memory_mb=256 are not allowed"):
        make(seconds=0)
