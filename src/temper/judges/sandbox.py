"""Runs code that a model wrote, shut in: limits of time, memory and files, no network, no other processes, no other files. Floor 4.

The walls are built from inside by `jail.py` (Landlock and seccomp, both of the Linux kernel, both without privileges); here the process is
started, fed, watched and killed. docs/methods/rewards.md says what is guaranteed and what is not.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

JAIL = Path(__file__).with_name("jail.py")
START = 60.0  # seconds in which the walls must stand
OUTPUT = 1 << 20  # bytes of output that are read; more ends the program
FILE, FOLDER, ENTRIES = 16 << 20, 64 << 20, 1000  # bytes of one file, of all files, and how many there may be
LOOK = 0.05  # seconds between two looks at the clock and the folder
ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2"}  # sets in the same order every time


class Limits(NamedTuple):
    """Of one program. Where the machine is busy the wall clock may take `patience` times the CPU seconds."""

    seconds: float = 5.0
    memory: int = 512  # megabytes of address space
    patience: float = 3.0


class Outcome(NamedTuple):
    """passed: it ran to its end (all tests held); None: the sandbox itself could not run it. why: what stopped it."""

    passed: bool | None
    why: str = ""
    output: str = ""
    walls: tuple[str, ...] = ()


def run(code: str, tests: str | None = None, given: str = "", limits: Limits = Limits(), weak: bool = False) -> Outcome:
    """Run a program, then `tests` in its namespace; without tests it reads `given` and what it writes is the `output`.

    weak: where the kernel lacks a wall, run it behind an audit hook instead of not at all.
    """
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryDirectory(prefix="temper-code-", ignore_cleanup_errors=True) as home:
        command = [sys.executable, "-S", "-s", "-P", "-B", "-X", "utf8", str(JAIL)]
        pipe = subprocess.PIPE
        try:
            child = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=pipe, stderr=pipe, cwd=home, env=ENVIRONMENT, start_new_session=True, close_fds=True
            )
        except OSError as error:
            return Outcome(None, f"the sandbox did not start: {error.strerror}")
        finally:
            theirs.close()
        job = {"code": code, "tests": tests, "given": given, "weak": weak, "files": FILE}
        job |= {"seconds": max(1, round(limits.seconds)), "memory": limits.memory << 20}
        try:
            return _Watch(child, ours, home, limits).outcome(json.dumps(job).encode(), tests is not None)
        finally:
            for stream in (child.stdout, child.stderr):
                assert stream is not None
                stream.close()


class _Watch:
    """One program at work."""

    def __init__(self, child: subprocess.Popen[bytes], link: socket.socket, home: str, limits: Limits) -> None:
        self.child, self.link, self.home, self.limits = child, link, home, limits
        self.read = {"link": b"", "stdout": b"", "stderr": b""}
        self.secret = secrets.token_hex(16)
        self.stopped = ""

    def outcome(self, job: bytes, tested: bool) -> Outcome:
        try:
            self.link.settimeout(START)
            with contextlib.suppress(BrokenPipeError):  # it was gone before it had read its job; why, it has said
                self.link.sendall(len(job).to_bytes(4, "little") + job)
            self._follow()
        except OSError as error:
            self.stopped = self.stopped or f"the sandbox lost its process: {error}"
        finally:
            self._kill()
        said = self._said()
        walls, output = tuple(said.get("walls", ())), self.read["stdout"].decode("utf-8", "replace")
        if "walls" not in said:
            tail = self.read["stderr"].decode("utf-8", "replace").strip().splitlines()[-1:]
            return Outcome(None, "the sandbox did not start: " + (said.get("unwalled") or self.stopped or " ".join(tail) or "it ended"))
        code = self.child.returncode
        if not self.stopped and (said.get("passed") == self.secret if tested else code == 0):
            return Outcome(True, "", output, walls)
        if code == -signal.SIGXCPU:
            self.stopped = f"used more than {self.limits.seconds:g} s of CPU"
        why = self.stopped or said.get("failed") or (f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")
        return Outcome(False, str(why), output, walls)

    def _said(self) -> dict:
        """The lines on the link. What comes after "walls" was written by, or beside, the model's code: not to be believed unchecked."""
        said: dict = {}
        for line in self.read["link"].split(b"\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                said = {**row, **said}  # what was said first counts
        return said

    def _follow(self) -> None:
        began, ready = time.monotonic(), False
        with selectors.DefaultSelector() as streams:
            for name, stream in (("link", self.link), ("stdout", self.child.stdout), ("stderr", self.child.stderr)):
                assert stream is not None
                streams.register(stream, selectors.EVENT_READ, name)
            while streams.get_map():
                found = streams.select(LOOK)
                for key, _ in found:
                    try:
                        more = os.read(key.fd, 1 << 16)
                    except ConnectionResetError:  # it ended without reading the secret; what it said before can still be read
                        continue
                    if not more:
                        streams.unregister(key.fileobj)
                    elif len(self.read[key.data]) < OUTPUT:
                        self.read[key.data] += more
                    else:
                        self.stopped = f"wrote more than {OUTPUT >> 20} MB"
                        return
                if not ready and b"\n" in self.read["link"]:
                    ready, began = True, time.monotonic()
                    with contextlib.suppress(BrokenPipeError):  # it is through already
                        self.link.sendall(self.secret.encode())
                gone = self.child.poll() is not None  # asked first: this process may have been the one that was held up
                if not found if gone else self._over(time.monotonic() - began, ready):
                    return
        try:
            self.child.wait(max(0.0, self.limits.seconds * self.limits.patience - (time.monotonic() - began)))
        except subprocess.TimeoutExpired:
            self._over(float("inf"), True)

    def _over(self, seconds: float, ready: bool) -> bool:
        most = self.limits.seconds * self.limits.patience if ready else START
        if seconds > most:
            self.stopped = f"took more than {most:g} s"
        elif _size(self.home) > FOLDER:
            self.stopped = f"wrote more than {FOLDER >> 20} MB or {ENTRIES} files"
        return bool(self.stopped)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()


def _size(folder: str) -> int:
    """Bytes of all files in a folder; more than FOLDER where there are too many to look at."""
    total, seen = 0, 0
    for place, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > ENTRIES:
            return FOLDER + 1
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
