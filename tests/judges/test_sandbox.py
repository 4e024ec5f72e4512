"""What a model wrote, shut in: each way out is tried for real."""

import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

from temper.judges import jail, sandbox
from temper.judges.sandbox import Limits, run

FORGE = """
import os
for fd in range(3, 20):
    try:
        os.write(fd, b'{"passed": "1"}\\n')
    except OSError:
        pass
os._exit(0)
"""
SHORT = Limits(seconds=1, patience=2)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the walls are Linux's")


def test_tests_pass_or_fail():
    code = "def double(x):\n    return 2 * x"
    assert run(code, "assert double(2) == 4").passed is True
    wrong = run(code, "assert double(2) == 5, 'no'")
    assert (wrong.passed, wrong.why) == (False, "AssertionError: no")
    assert run("def double(x:", "assert True").why.startswith("SyntaxError")
    assert run(code, "assert triple(2) == 6").why.startswith("NameError")


def test_a_program_that_reads_and_writes():
    found = run("n = int(input())\nprint(n * 2)\nprint(open('/dev/null').read(), end='')", given="21\n")
    assert (found.passed, found.output) == (True, "42\n")
    assert run("import sys\nprint(sys.stdin.read()[-1])\nsys.exit()", given="x" * 300_000 + "y").output == "y\n"  # more than a pipe holds
    assert run("print(1)\nraise SystemExit(3)").passed is False
    assert run("print(input())", given="\u00e9\n").output == "\u00e9\n"


@linux
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os\nos.fork()", "PermissionError"),
        (
            "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        raise ValueError('no fork')",
            "ValueError: no fork",
        ),
        ("import subprocess\nsubprocess.run(['/bin/true'])", "PermissionError"),
        ("import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
        ("import socket\nsocket.socket()", "PermissionError"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:PORT')", "URLError"),
        ("open('/etc/passwd')", "PermissionError"),
        ("open('OUTSIDE', 'w')", "PermissionError"),
        ("open('OUTSIDE')", "PermissionError"),
        ("import os\nos.truncate('OUTSIDE', 0)", "PermissionError"),
        ("import os\nos.remove('OUTSIDE')", "PermissionError"),
        ("import os\nos.chmod('OUTSIDE', 0o777)", "PermissionError"),
        ("import os\nos.symlink('OUTSIDE', 'x')", "PermissionError"),
        ("import os\nos.listdir('/proc')", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import os\nos.kill(-1, 9)", "PermissionError"),
        ("import os\nos.setsid()", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "ValueError"),
        ("x = bytearray(10**10)", "MemoryError"),
        ("f = open('f', 'w')\nwhile True:\n    f.write('x' * 10**6)", "OSError"),
        ("while True:\n    print('x' * 10**5)", "wrote more than 1 MB"),
        ("import sys\nwhile True:\n    print('x' * 10**5, file=sys.stderr)", "wrote more than 1 MB"),
        ("import itertools\nfor i in itertools.count():\n    open(str(i), 'w')", "wrote more than 64 MB or 1000 files"),
        ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
        ("import numpy", "ModuleNotFoundError"),
        ("import temper", "ModuleNotFoundError"),
        ("import os\nassert not set(os.environ) - {'LANG', 'PYTHONHASHSEED', 'MALLOC_ARENA_MAX', 'LC_CTYPE'}, os.environ", ""),
    ],
)
def test_there_is_no_way_out(code, why, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("kept")
    outside.chmod(0o600)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.01)
        found = run(code.replace("OUTSIDE", str(outside)).replace("PORT", str(server.getsockname()[1])), "pass", limits=Limits(seconds=5))
        with pytest.raises(TimeoutError):
            server.accept()
    assert found.walls == ("rights", "files", "calls")
    assert (found.passed, found.why) == (True, "") if not why else found.passed is False
    assert found.why.startswith(why)
    assert outside.read_text() == "kept"
    assert outside.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [outside]


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("while True:\n    pass", ("used more than 1 s of CPU", "took more than 2 s")),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass",
            ("killed by SIGKILL", "took more than 2 s"),
        ),
        ("import time\ntime.sleep(60)", "took more than 2 s"),
        ("import os, time\nos.close(1)\nos.close(2)\nos.closerange(3, 64)\ntime.sleep(60)", "took more than 2 s"),
        ("import sys, time\nwhile True:\n    print(1, flush=True, file=sys.stderr)\n    time.sleep(0.01)", "took more than 2 s"),
        ("import threading, time\nfor _ in range(4):\n    threading.Thread(target=time.sleep, args=(60,)).start()\ntime.sleep(60)", "took"),
    ],
)
def test_what_does_not_end_is_ended(code, why):
    began = time.monotonic()
    found = run(code, "pass", limits=SHORT)
    assert (found.passed, found.why.startswith(why)) == (False, True), found
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "print('{\"passed\": true}')",
        FORGE,
    ],
)
def test_leaving_early_is_not_passing(code):
    assert run(code, "assert False").passed is False


def test_what_may_be_done():
    """Threads, an event loop, files of its own, the standard library; nothing of it stays."""
    code = """
import asyncio, collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math, os, random, re
import sqlite3, statistics, string, tempfile, threading, typing, unittest, zoneinfo
seen = []
thread = threading.Thread(target=lambda: seen.append(1))
thread.start()
thread.join()
async def later():
    await asyncio.sleep(0.001)
    return 2
seen.append(asyncio.run(later()))
with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, "x"), "w") as file:
        file.write("3")
    seen.append(int(open(os.path.join(folder, "x")).read()))
os.mkdir("own")
"""
    found = run(code, "assert seen == [1, 2, 3] and os.listdir('.') == ['own'], (seen, os.listdir('.'))")
    assert (found.passed, found.why) == (True, "")
    assert run("s = str({str(i) for i in range(50)})\nprint(s)").output == run("s = str({str(i) for i in range(50)})\nprint(s)").output


@linux
def test_nothing_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def children():
        stats = [path.read_text().split() for path in Path("/proc").glob("[0-9]*/stat") if path.exists()]
        return {fields[0] for fields in stats if fields[3] == str(os.getpid())}  # the parent's process id

    before = children()
    for code in "open('x', 'w').write('1')", "while True:\n    pass":
        run(code, "pass", limits=SHORT)
    assert not list(tmp_path.iterdir())
    assert children() <= before


def test_a_sandbox_that_cannot_start_is_no_verdict(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "JAIL", tmp_path / "not there.py")
    found = run("pass", "pass")
    assert found.passed is None
    assert found.why.startswith("the sandbox did not start: ")
    assert "not there.py" in found.why
    monkeypatch.setattr(sandbox.sys, "executable", str(tmp_path / "no python"))
    assert run("pass", "pass").why == "the sandbox did not start: No such file or directory"


def test_without_a_wall_it_does_not_run(monkeypatch, tmp_path):
    """A kernel without Landlock: refused, unless the hook may stand in its place."""
    broken = tmp_path / "jail.py"
    broken.write_text(Path(jail.__file__).read_text().replace("_call(libc, 444,", "_call(libc, 1_000_444,"))
    monkeypatch.setattr(sandbox, "JAIL", broken)
    found = run("pass", "pass")
    assert found.passed is None
    assert found.why.startswith("the sandbox did not start: ")
    found = run("x = open('/dev/null').read()\nimport statistics, sqlite3", "assert x == ''", weak=True)
    assert (found.passed, found.why, found.walls[-1]) == (True, "", "hook")
    outside = tmp_path / "outside"
    outside.write_text("kept")
    for code in (
        f"open({str(outside)!r})",
        f"import os\nos.remove({str(outside)!r})",
        "import socket\nsocket.socket()",
        "import os\nos.system('true')",
    ):
        assert run(code, "pass", weak=True).why.startswith("PermissionError"), code
    assert outside.read_text() == "kept"


def test_the_filter():
    """Each call stands once in a machine's table; what would open a way out stands in none."""
    shut = {"x86_64": (41, 57, 58, 59, 90, 101, 112, 157, 165, 425), "aarch64": (198, 221, 53, 117, 157, 167, 40, 425)}
    for machine, (column, arch) in jail.MACHINES.items():
        numbers = [int(call.split()[1 + column]) for call in jail.CALLS.split(",") if len(call.split()) > 1 + column]
        assert len(numbers) == len(set(numbers)) > 100
        assert not {*numbers} & {*shut[machine]}  # socket fork vfork execve chmod ptrace setsid prctl mount io_uring_setup
        first = jail.program(machine, 1234)[1]
        assert first == (0x15, 1, 0, arch)
    names = [call.split()[0] for call in jail.CALLS.split(",")]
    assert len(names) == len(set(names))
