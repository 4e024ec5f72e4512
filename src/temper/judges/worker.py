"""A function that runs in a process of its own, under a time limit: it may hang, crash or leak without taking the caller along. Floor 4.

For code that is trusted and text that is not: a user's reward function, the comparison of a model's formula with the reference's. (What a
model wrote is run in `sandbox.py`.) The process is started when it is first needed, killed when it takes too long, and started anew.
"""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START = 120.0  # seconds that importing may take
BOOT = "import sys; sys.path[:] = {path!r}; from temper.judges.worker import serve; serve({fd}, {target!r}, {memory!r}, {imports!r})"


class Failed(Exception):
    """A call gave nothing, and why."""


class Worker:
    """`Worker("package.module:function", seconds=5)(*arguments)`, or "file.py:function".

    memory: megabytes it may take (Linux); imports: what the function will import, so that it costs no call its time.
    """

    def __init__(self, target: str, seconds: float, memory: int | None = None, imports: Sequence[str] = ()) -> None:
        self.target, self.seconds, self.memory, self.imports = target, seconds, memory, tuple(imports)
        self.process: subprocess.Popen[bytes] | None = None
        self.link: Any = None
        self._kill: Callable[[], Any] = lambda: None

    def start(self) -> None:
        """Start the process where it does not run, and import the function. Raises Failed with what importing it said."""
        if self.process and self.process.poll() is None:
            return
        self.stop()
        self.link, theirs = Pipe()
        boot = BOOT.format(path=sys.path, fd=theirs.fileno(), target=self.target, memory=self.memory, imports=self.imports)
        command = [sys.executable, "-c", boot]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        self._kill = weakref.finalize(self, _end, self.process, self.link)
        theirs.close()
        self._answer(START, "importing it took")

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns. Raises Failed where it raises, takes too long or its process dies."""
        self.start()
        try:
            self.link.send(arguments)
        except OSError:
            raise self._died() from None
        return self._answer(self.seconds, "it took")

    def stop(self) -> None:
        self._kill()
        self.process = None

    def _answer(self, seconds: float, what: str) -> Any:
        try:
            if not self.link.poll(seconds):
                self.stop()
                raise Failed(f"{what} more than {seconds:g} s and was stopped")
            fine, value = self.link.recv()
        except (EOFError, OSError):
            raise self._died() from None
        except KeyboardInterrupt:
            self.stop()  # its answer would be taken for that of the next call
            raise
        if not fine:
            raise Failed(value)
        return value

    def _died(self) -> Failed:
        assert self.process is not None
        code = self.process.wait()
        self.stop()
        return Failed(f"its process ended ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})")


def _end(process: subprocess.Popen[bytes], link: Connection) -> None:
    link.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own session, so its own group: what it started goes with it
    process.wait()


# ---------------------------------------------------------------- the other side


def find(target: str) -> Callable[..., Any]:
    """The function that "package.module:function" or "file.py:function" names. Raises what importing raises, AttributeError."""
    module, _, name = target.rpartition(":")
    if not module.endswith(".py"):
        return getattr(import_module(module), name)
    path = Path(module).resolve()
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = loaded
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def plain(value: Any) -> Any:
    """Arrays, tensors and their numbers as Python's own."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [x.item() if hasattr(x, "item") else x for x in value] if isinstance(value, list | tuple) else value


def said(error: BaseException) -> str:
    """One line: what was raised, and where in whose file."""
    frames = traceback.extract_tb(error.__traceback__)
    at = next((f" ({Path(f.filename).name}:{f.lineno})" for f in reversed(frames) if f.filename != __file__), "")
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{at}"


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)  # nobody waits for it any more


def serve(fd: int, target: str, memory: int | None, imports: Sequence[str] = ()) -> None:
    """Answer calls until the caller is gone."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    link = Connection(fd)
    try:
        function = find(target)
        for name in imports:
            import_module(name)
        if memory and sys.platform == "linux":
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (memory << 20, memory << 20))
    except BaseException as error:
        link.send((False, said(error)))
        return
    link.send((True, None))
    while True:
        try:
            arguments = link.recv()
        except EOFError:
            return
        try:
            answer = (True, plain(function(*arguments)))
        except BaseException as error:
            answer = (False, said(error))
        try:
            link.send(answer)
        except OSError:
            return
        except Exception as error:
            link.send((False, f"what it returned cannot be sent: {error}"))
