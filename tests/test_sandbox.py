"""What a program may not do: each limit acts, and one that keeps to them passes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latro import sandbox
from latro.sandbox import Limits, run, unguarded

guarded = pytest.mark.skipif(
    sys.platform != "linux" or bool(unguarded()),
    reason=f"this system has no Landlock or seccomp for: {', '.join(unguarded()) or sys.platform}",
)


@pytest.mark.parametrize(
    "program",
    [
        "",
        "assert sorted([3, 1]) == [1, 3]",
        "import math, re, collections, itertools, heapq, functools\nassert math.pi > 3",
        "open('notes', 'w').write('x')\nassert open('notes').read() == 'x'\nimport os\nos.remove('notes')",
        "import tempfile\nwith tempfile.NamedTemporaryFile() as file:\n    file.write(b'x')",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\nassert A() == A(1)",
        "assert __name__ != '__main__'",
        "print('é', '\\x00\\udcff'.encode('utf-8', 'ignore'))",
    ],
)
def test_what_passes(program):
    outcome = run(program)
    assert (outcome.passed, outcome.reason) == (True, "")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("def f(:", "SyntaxError"),
        ("undefined", "NameError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("x = '\\ud800'.encode()", "UnicodeEncodeError"),
        # a program that ends before its tests has not passed them
        ("import sys\nsys.exit(0)", "ended by itself, with status 0"),
        ("raise SystemExit", "ended by itself, with status 0"),
        ("import os\nos._exit(0)", "ended by itself, with status 0"),
        ("import ctypes\nctypes.string_at(0)", "ended by itself, with status -11"),
        ("print('passed')\nassert 0", "AssertionError"),
        ("input()", "EOFError"),
    ],
)
def test_what_fails(program, reason):
    outcome = run(program)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import os\nos.close(1)\nos.close(2)\nwhile True: pass",
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_time(program):
    start = time.monotonic()
    outcome = run(program, Limits(seconds=1))
    assert (outcome.passed, outcome.reason) == (False, "took longer than 1 s")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("program", ["x = [0] * 10**9", "x = []\nwhile True: x.append('a' * 10**6)"])
def test_memory(program):
    outcome = run(program, Limits(seconds=20, memory=200 << 20))
    assert (outcome.passed, outcome.reason) == (False, "MemoryError")
    assert run("x = [0] * 10**7", Limits(memory=200 << 20)).passed


def test_output():
    outcome = run("while True: print('a' * 100)", Limits(output=1000))
    assert (outcome.passed, outcome.reason) == (False, "wrote more than 1000 bytes")
    assert len(outcome.output) == 1000
    assert run("print('a' * 999)", Limits(output=1000)).passed


def test_size_of_a_file():
    assert run("open('x', 'wb').write(b'0' * 1000)", Limits(file=1000)).passed
    assert "File too large" in run("with open('x', 'wb') as x: x.write(b'0' * 1001)", Limits(file=1000)).reason


@guarded
@pytest.mark.parametrize(
    "program",
    [
        "open(PATH, 'w')",
        "open(PATH, 'a')",
        "import os; os.remove(PATH)",
        "import os; os.truncate(PATH, 0)",
        "import os; os.rename(PATH, 'here')",
        "import os; os.link(PATH, 'here')",
        "import os; os.symlink(PATH, 'here'); open('here', 'w')",
        "import os; os.chmod(PATH, 0)",
        "import os; os.utime(PATH)",
        "import os; os.setxattr(PATH, 'user.x', b'x')",
        "import os; os.mkdir(PATH + '-folder')",
        "import os; os.mkfifo(PATH + '-fifo')",
    ],
)
def test_files_outside(program, tmp_path):
    path = tmp_path / "precious"
    path.write_text("precious")
    before = path.stat()
    outcome = run(program.replace("PATH", repr(str(path))))
    assert not outcome.passed
    assert "not permitted" in outcome.reason or "ermission denied" in outcome.reason or "cross-device" in outcome.reason
    assert [one.name for one in tmp_path.iterdir()] == ["precious"]
    assert path.read_text() == "precious"
    assert (path.stat().st_mode, path.stat().st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


@guarded
@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor _ in range(3): os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.system('true') and 1 / 0",
        "import threading; threading.Thread(target=print).start()",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
    ],
)
def test_processes(program):
    outcome = run(program)
    assert not outcome.passed
    assert outcome.reason.startswith(("PermissionError", "RuntimeError: can't start new thread", "ZeroDivisionError"))


@guarded
def test_signals():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        try:
            assert run(f"import os\nos.kill({other.pid}, 9)").reason.startswith("PermissionError")
            assert other.poll() is None
        finally:
            other.kill()


@guarded
@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_network(family):
    assert run(f"import socket\nsocket.socket(socket.{family})").reason.startswith("PermissionError")


@guarded
def test_limits_cannot_be_raised():
    program = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
    assert "not allowed" in run(program).reason or "not permitted" in run(program).reason


@guarded
@pytest.mark.parametrize(
    "call",
    [
        "os.chroot('.')",  # a capability of root
        "os.memfd_create('x')",
        "ctypes.CDLL(None).unshare(0x10000000) == 0 or exec('raise PermissionError')",
        "libc = ctypes.CDLL(None, use_errno=True)\nlibc.syscall(0x40000027)\nraise OSError(ctypes.get_errno(), '')",
        "ctypes.CDLL(None).mount(b'x', b'/mnt', b'tmpfs', 0, None) == 0 or exec('raise PermissionError')",
    ],
)
def test_the_system(call):
    assert run(f"import ctypes, os\n{call}").reason.startswith("PermissionError")


def test_nothing_of_ours_is_seen(monkeypatch):
    monkeypatch.setenv("LATRO_SECRET", "hidden")
    outcome = run("import os, sys\nprint(sorted(os.environ), sys.argv[1:], os.listdir())")
    assert outcome.output.splitlines()[0].startswith("['HOME', ")
    assert "LATRO_SECRET" not in outcome.output
    assert outcome.output.splitlines()[0].endswith(" [] []")


def test_nothing_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    descriptors = Path("/proc/self/fd")
    open_before = len(os.listdir(descriptors)) if descriptors.exists() else 0
    for program in ("open('x', 'w').write('x')", "while True: pass", "while True: print('a' * 10**4)"):
        run(program, Limits(seconds=0.5))
    assert not list(tmp_path.iterdir())
    assert not descriptors.exists() or len(os.listdir(descriptors)) == open_before


def test_a_system_without_guards_says_so(monkeypatch, tmp_path):
    """The child's report is what the outcome has."""
    child = tmp_path / "sandboxed.py"
    child.write_text(sandbox.CHILD.read_text().replace('sys.platform != "linux"', "True"))
    monkeypatch.setattr(sandbox, "CHILD", child)
    outcome = run("")
    assert outcome.passed
    assert outcome.unguarded == ("files", "network", "processes")
