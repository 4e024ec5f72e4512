"""The run directory: identity, lineage, metrics, samples, events, status, checkpoints. One writer, any reader. Floor 1.

    STAGE/
      stage.json       what the run is (identity: method, settings, fingerprints of inputs), its state, versions, summary
      status.json      where it stands now, for whoever watches
      metrics.jsonl samples.jsonl events.jsonl
      checkpoints/step-00000120/{tensors.safetensors, state.json, manifest.json}
      model/           what the stage is for

Whatever must be whole is written aside, flushed to the disk and renamed. A process that dies at any moment leaves the last
whole state behind, and the same command goes on from there. PyTorch is imported only where checkpoints are read or written.
"""

from __future__ import annotations

import ast
import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from temper.config import UserError

State = dict[str, Any]  # nested dicts, lists and tuples of tensors, arrays, numbers, strings, None
LOGS = ("metrics", "samples", "events")
ASIDE = ".tmp-"  # whatever starts so was left by a process that died; it holds nothing
OWN = (
    "status.json",
    *(f"{log}.jsonl" for log in LOGS),
    "checkpoints",
    "model",
    "evaluation.json",
)  # what every run may hold besides stage.json


# ---------------------------------------------------------------- writing safely


@contextlib.contextmanager
def disk(path: Path, safe: str) -> Iterator[None]:
    """Turns a disk that is full or refuses into one clear line. `safe`: what is not lost."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "os error 28" in str(error):  # how safetensors (Rust) words ENOSPC
            raise UserError(f"{path}: no space left on the disk; {safe}; free some space, then give the same command again") from error
        if isinstance(error, OSError):
            why = (error.strerror or str(error)).lower()
            raise UserError(f"{path}: cannot be written ({why}); {safe}; mend that, or choose another --out") from error
        raise


def fsync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    """Plain bytes to a new file: the one place where this module writes contents."""
    with open(path, "wb") as file:
        file.write(data)


def atomic_write(path: Path, data: bytes | str, *, durable: bool = True, safe: str = "what stood there before is unchanged") -> None:
    """Replaces a file as a whole: aside, fsync, rename. durable=False leaves out the flush (a live status may be lost)."""
    aside = path.with_name(f"{ASIDE}{path.name}-{os.getpid()}")
    with disk(path, safe):
        try:
            _write(aside, data.encode() if isinstance(data, str) else data)
            if durable:
                fsync(aside)
            os.replace(aside, path)
            if durable:
                fsync(path.parent)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch, paths and settings as JSON knows them; NaN and infinity as null (they are not JSON)."""
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "model_dump"):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # a tensor, an array, a numpy number
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        return value
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values, equal text."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


# ---------------------------------------------------------------- fingerprints


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) by content: a Path is a file's bytes, or a folder's names and bytes (hidden files left out); else its JSON.

    Times, owners and the folder's own place do not count. Raises UserError when a path is not there.
    """
    if not isinstance(value, Path):
        return hashlib.sha256(canonical(value).encode()).hexdigest()
    if value.is_file():
        return _sha256(value)
    if not value.is_dir():
        raise UserError(f"{value}: no such file or folder")
    digest = hashlib.sha256()
    inside = {path.relative_to(value).as_posix(): path for path in value.rglob("*") if path.is_file()}
    for name in sorted(name for name in inside if not any(part.startswith(".") for part in name.split("/"))):
        digest.update(f"{name}\0{_sha256(inside[name])}\n".encode())
    return digest.hexdigest()


def model_fingerprint(name: str) -> str:
    """Of a model by the files of its folder, or of a stage's, an adapter's base included; what is no folder of a model (a hub name) counts
    as its name."""
    path = Path(name).expanduser()
    path = path / "model" if (path / "model").is_dir() else path
    adapter = _read_json(path / "adapter_config.json") or {}
    files = sorted(p for p in path.glob("[!.]*") if p.is_file()) if adapter or (path / "config.json").exists() else []
    content = {p.name: fingerprint(p) for p in files}
    if base := adapter.get("base_model_name_or_path"):
        beside = path / (_read_json(path / "export.json") or {}).get("base", base)
        content["base of the adapter"] = model_fingerprint(str(beside if beside.is_dir() and not Path(base).is_dir() else base))
    return fingerprint(content or name)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in ("temper-lm", "torch", "transformers", "tokenizers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _imports(path: Path) -> Iterator[str]:
    """Names of Temper's modules that a source file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _source(module: str) -> Path | None:
    """The file of one of Temper's modules."""
    parts = module.split(".")
    if parts[0] != "temper":
        return None
    path = Path(__file__).parent.joinpath(*parts[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@lru_cache
def code_version(*entries: str) -> str:
    """SHA-256 of the sources that these modules import, directly or not, of the YAML files beside those, and of the versions of torch
    and transformers.

    An artefact of other code is stale; a change in one method's file leaves the artefacts of the others as they are.
    """
    found: dict[str, Path] = {}
    todo = list(entries)
    while todo:
        module = todo.pop()
        path = _source(module)
        if path is None or module in found:
            continue
        found[module] = path
        todo += [*_imports(path), module.rpartition(".")[0]]
        if "pkgutil" in path.read_text():  # finds its own modules by name
            todo += [f"{module}.{p.stem}" for p in path.parent.glob("*.py")]
    root = Path(__file__).parent
    beside = {data for path in found.values() for data in path.parent.glob("*.yaml")}
    sources = {path.relative_to(root).as_posix(): _sha256(path) for path in sorted({*found.values(), *beside})}
    libraries = {name: version for name, version in versions().items() if name in ("torch", "transformers")}
    return fingerprint({"sources": sources, "libraries": libraries})


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """{"settings.lr": 0.001, ...}"""
    if not isinstance(value, Mapping):
        return {path: value}
    return {name: leaf for key, item in value.items() for name, leaf in _leaves(item, f"{path}.{key}" if path else str(key)).items()}


def differences(there: Any, here: Any, limit: int = 3) -> str:
    """What differs between two nested dicts, in words: "lr 0.001 there, 0.0003 here"."""
    a, b = _leaves(_plain(there)), _leaves(_plain(here))
    names = [name for name in dict.fromkeys([*b, *a]) if a.get(name) != b.get(name) or (name in a) != (name in b)]

    def show(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return text[:12] if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text[:60]

    def words(name: str) -> str:
        short = name.removeprefix("settings.")
        if name not in a:
            return f"{short} not there, {show(b[name])} here"
        if name not in b:
            return f"{short} {show(a[name])} there, not here"
        return f"{short} {show(a[name])} there, {show(b[name])} here"

    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(words(name) for name in names[:limit]) + more


def _spelled(identity: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """An identity for people: the method first, and beside an input's fingerprint the name it was given by."""
    named = record.get("named") or {}
    inputs = {name: f"{key[:12]} ({named[name][-44:]})" if name in named else key for name, key in identity.get("inputs", {}).items()}
    return {"method": identity.get("method"), **identity, "inputs": inputs}


def _exact(identity: Mapping[str, Any], rounding: Sequence[str]) -> dict[str, Any]:
    """An identity without the names on which a result depends by rounding alone."""
    rest = {name: value for name, value in identity.items() if name not in rounding}
    if isinstance(settings := rest.get("settings"), dict):
        rest["settings"] = {name: value for name, value in settings.items() if name not in rounding}
    return rest


# ---------------------------------------------------------------- the run


def read_lines(path: Path) -> list[dict]:
    """Rows of a JSONL log that may be growing; a torn last line is left out. A missing file has no rows."""
    rows = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            with contextlib.suppress(ValueError):  # torn by a full disk, then written on
                rows.append(json.loads(line))
    return rows


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, NotADirectoryError):
        return {}


class Run:
    """A run directory. `Run(folder)` only reads; `Run.claim(...)` is the writer, alone until `close()` or its process ends."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock: int | None = None
        self._made: list[Path] = []  # the folders that go when it is given up, the innermost first
        self._logs: dict[str, int] = {}
        self._status_at = 0.0

    # ---- reading

    @property
    def stage(self) -> dict:
        """What stage.json says; {} when there is none or it cannot be read."""
        return _read_json(self.folder / "stage.json") or {}

    @property
    def status(self) -> dict:
        """phase, step, steps, eta (seconds), seconds, updated (unix time), pid; {} before the first."""
        return _read_json(self.folder / "status.json") or {}

    @property
    def done(self) -> bool:
        return self.stage.get("status") == "done"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def rows(self, log: str) -> list[dict]:
        """Rows of "metrics", "samples" or "events"."""
        return read_lines(self.folder / f"{log}.jsonl")

    # ---- claiming

    @classmethod
    def claim(
        cls,
        folder: str | Path,
        identity: Mapping[str, Any],
        *,
        fresh: bool = False,
        record: Mapping[str, Any] | None = None,
        code: Sequence[str] = (),
        rounding: Sequence[str] = (),
    ) -> Run:
        """Creates the run, or opens the same one again to go on with it.

        identity: what decides the result (method, settings, fingerprints of the inputs): a run with another identity is
        refused. record: what else stage.json should say (parent, seed, threads, ...); it is not compared. fresh: removes
        what Temper wrote in the folder, and nothing else, and starts over. code: the modules whose sources made it (`code_version`).
        rounding: names in identity and settings that change a result by rounding alone: an unfinished run goes on with other ones.
        Raises UserError when the folder holds something else, another run, or a run that is being written.
        """
        run = cls(folder)
        with disk(run.folder, "nothing was written"):
            if run.folder.exists() and not run.folder.is_dir():
                raise UserError(f"{run.folder} is a file, not a folder; choose another --out")
            ours = (run.folder / "stage.json").exists()
            if run.folder.is_dir() and not ours:
                foreign = sorted(path.name for path in run.folder.iterdir() if path.name != ".lock" and not path.name.startswith(ASIDE))
                if foreign:
                    raise UserError(f"{run.folder} holds {foreign[0]} but no stage.json: not written by temper; choose another --out")
            run._made = [run.folder] if ours else [path for path in (run.folder, *run.folder.parents) if not path.exists()]
            run.folder.mkdir(parents=True, exist_ok=True)
            run._acquire()
        try:
            run._settle(json.loads(canonical(identity)), fresh, dict(record or {}), code, rounding)
        except BaseException:
            run.close()
            raise
        return run

    def _settle(self, identity: dict, fresh: bool, record: dict, code: Sequence[str], rounding: Sequence[str]) -> None:
        there = _read_json(self.folder / "stage.json")
        if there is not None and (fresh or there.get("status") == "clearing"):
            self._clear(there)
            there = None
        if there is not None and "identity" not in there:
            raise UserError(f"{self.folder / 'stage.json'} cannot be read; choose another --out or --fresh")
        if there is not None and there["identity"] != identity:
            what = differences(_spelled(there["identity"], there.get("record", {})), _spelled(identity, record))
            done = there["status"] == "done"
            if done or _exact(there["identity"], rounding) != _exact(identity, rounding):
                raise UserError(f"{self.folder} belongs to another run: {what}; choose another --out or --fresh")
        for left in self.folder.glob(f"{ASIDE}*"):
            _remove(left)
        now: dict[str, Any] = {"identity": identity, "versions": versions(), "code": code_version(*code)}
        whose = {**now, "record": json.loads(canonical(record)), "fingerprint": fingerprint(identity)}
        if there is None:
            self._stage({"status": "running", **whose, "created": time.time(), "files": []})
        elif there["status"] != "done":
            changed = differences({key: there.get(key) for key in now}, now)
            if changed:
                self.event("changed", what=changed, note="the figures may differ in their last digits")
            self._stage({**there, **whose})

    def _acquire(self) -> None:
        path = self.folder / ".lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            writer = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(f"{self.folder} is being written by process {writer or '?'}; wait for it, or stop it") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        self._lock = descriptor

    def _clear(self, there: dict) -> None:
        """Removes what this tool wrote. Marked first, so that a death in the middle is not taken for a run."""
        self._stage({**there, "status": "clearing"})
        for name in (*OWN, *there.get("files", [])):
            _remove(self.folder / name)
        (self.folder / "stage.json").unlink()

    def abandon(self) -> None:
        """Gives the folder up, as if it had never been claimed. Once there is something to go on from, only closes it."""
        self._own()
        if not self.rows("metrics") and not _steps(self.checkpoints):
            with contextlib.suppress(UserError):  # a full disk: it cannot even be marked
                self._clear(self.stage)
            (self.folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else
                for made in self._made:
                    made.rmdir()
        self.close()

    def close(self) -> None:
        """Lets go of the folder; also happens when the process ends, however it ends."""
        for descriptor in (*self._logs.values(), *([self._lock] if self._lock is not None else [])):
            os.close(descriptor)
        self._logs, self._lock = {}, None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- writing

    def _own(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.folder} is open for reading only; Run.claim() opens it for writing")

    def _stage(self, stage: dict) -> None:
        self._own()
        atomic_write(self.folder / "stage.json", json.dumps(_plain(stage), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def update(self, **fields: Any) -> None:
        """Adds to stage.json."""
        self._stage({**self.stage, **fields})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the run as done. What the run is for must be whole by now."""
        self.update(status="done", summary=summary, finished=time.time())
        self.set_status(phase="done", now=True, step=summary.get("steps"), steps=summary.get("steps"))

    def file(self, name: str) -> Path:
        """A place in the folder for a further artefact of this run (a file or a folder), so that `fresh` knows it as its own."""
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} is not a place inside the run")
        stage = self.stage
        if name not in OWN and name not in stage["files"]:
            self._stage({**stage, "files": [*stage["files"], name]})
        return self.folder / name

    def log(self, log: str, row: Mapping[str, Any]) -> None:
        """Adds a row to "metrics", "samples" or "events". NaN and infinity become null."""
        self._own()
        path = self.folder / f"{log}.jsonl"
        line = (json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n").encode()
        with disk(path, "the last checkpoint is whole"):
            if log not in self._logs:
                if log not in LOGS:
                    raise ValueError(f"no log {log!r}; there are {', '.join(LOGS)}")
                self._logs[log] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            while line:
                line = line[os.write(self._logs[log], line) :]

    def event(self, event: str, **fields: Any) -> None:
        """Adds a row to events.jsonl. Give `step=` only to what a repeated step would say again: those go when it is repeated."""
        self.log("events", {"event": event, "time": round(time.time(), 3), **fields})

    def set_status(self, *, phase: str, now: bool = False, **fields: Any) -> None:
        """Says in status.json where the run stands: at most twice a second unless `now`."""
        self._own()
        if now or time.monotonic() - self._status_at >= 0.5:
            self._status_at = time.monotonic()
            row = {"phase": phase, **fields, "updated": time.time(), "pid": os.getpid()}
            atomic_write(self.folder / "status.json", json.dumps(_plain(row)) + "\n", durable=False, safe="the last checkpoint is whole")

    def remove_checkpoints(self) -> None:
        """Frees what only an unfinished run needs."""
        self._own()
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def truncate_after(self, step: int) -> None:
        """Drops the rows of later steps, which will be made again, and a torn last line. Rows without a step stay."""
        self._own()
        for log in LOGS:
            path = self.folder / f"{log}.jsonl"
            if not path.exists():
                continue
            kept, whole = [], path.read_bytes()
            for line in whole.split(b"\n")[:-1]:
                with contextlib.suppress(ValueError):
                    if json.loads(line).get("step", 0) <= step:
                        kept.append(line + b"\n")
            if b"".join(kept) != whole:
                if log in self._logs:
                    os.close(self._logs.pop(log))
                atomic_write(path, b"".join(kept))


# ---------------------------------------------------------------- checkpoints


class Loaded(NamedTuple):
    """The newest whole checkpoint. step 0 and no state: there is none. events: what was found damaged."""

    step: int
    state: State | None
    events: list[dict]


def _pack(state: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Nested state -> (JSON skeleton, {key: tensor}, {key: tensor that lies spread over ranks}).

    One storage seen twice the same way (tied weights) is written once.
    """
    import numpy as np
    import torch

    tensors: dict[str, torch.Tensor] = {}
    spread: dict[str, torch.Tensor] = {}
    seen: dict[tuple, str] = {}
    alive = []  # so that an id of freed memory is never met again

    def put(tensor: Any) -> str:
        view: tuple
        if hasattr(tensor, "placements"):
            # by its storage, which has no address where a rank's part is empty: all ranks must find the same tensors to be one
            view = (tensor.to_local().untyped_storage()._cdata, tensor.shape)
            if view not in seen:
                seen[view] = f"spread-{len(spread)}"
                spread[seen[view]] = tensor
            return seen[view]
        tensor = tensor.detach()
        view = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() == 0 or view not in seen:
            alive.append(tensor)
            seen[view] = str(len(tensors))
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            fresh = tensor.cpu().contiguous()
            tensors[seen[view]] = fresh if whole else fresh.clone()  # safetensors wants no two tensors in one storage
        return seen[view]

    def walk(value: Any, where: str) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            # rebuilt by its dtype's name; byte order and shape () included
            array = np.ascontiguousarray(value)
            raw = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
            return {"array": put(raw), "dtype": array.dtype.str, "shape": list(np.shape(value)), "scalar": isinstance(value, np.generic)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, torch.Tensor):
            return {"tensor": put(value)}
        if isinstance(value, tuple | list):
            items = [walk(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str | int | float | bool | None):
                    raise TypeError(f"checkpoint: {where}: key {key!r} is not a string or a number")
            return {"dict": [[key, walk(item, f"{where}.{key}")] for key, item in value.items()]}
        kinds = "dicts, lists, tensors, arrays, numbers and strings"
        raise TypeError(f"checkpoint: {where} is a {type(value).__name__}; a state is made of {kinds}")

    return walk(state, "state"), tensors, spread


def spread_tensors(state: State) -> dict[str, Any]:
    """What `save_checkpoint` gives to `spread`: {key: tensor}, the same keys on all ranks."""
    return _pack(state)[2]


def _unpack(skeleton: Any, tensors: dict[str, Any]) -> Any:
    import numpy as np

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "array" in value:
            array = tensors[value["array"]].numpy().view(np.dtype(value["dtype"])).reshape(value["shape"]).copy()
            return array[()] if value["scalar"] else array
        if "tuple" in value:
            return tuple(walk(item) for item in value["tuple"])
        return {key: walk(item) for key, item in value["dict"]}

    return walk(skeleton)


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit())


def save_checkpoint(
    folder: Path,
    step: int,
    state: State,
    *,
    keep: int = 2,
    spread: Callable[[dict[str, Any], Path], None] | None = None,
) -> Path:
    """Writes a nested state as `folder/step-...`: safetensors and JSON with SHA-256 sums, no pickle.

    spread(tensors, folder): writes the tensors that lie spread over ranks (DTensor), each rank its part, in safetensors files.

    Written aside, flushed, renamed; only then are older ones removed, down to the last `keep`.
    Raises UserError on a full disk, the older checkpoints being whole; TypeError when the state holds something else.
    """
    from safetensors.torch import save_file

    skeleton, tensors, parts = _pack(state)
    target = folder / f"step-{step:08d}"
    aside = folder / f"{ASIDE}{target.name}-{os.getpid()}"
    with disk(target, "the checkpoint before it is whole"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            save_file(tensors, aside / "tensors.safetensors")
            if parts and spread:
                spread(parts, aside)
            _write(aside / "state.json", json.dumps(skeleton, separators=(",", ":")).encode())
            sums = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
            _write(aside / "manifest.json", json.dumps({"step": step, "sha256": sums}).encode())
            for path in (*aside.iterdir(), aside):
                fsync(path)
            if target.exists():  # the same step again
                os.replace(target, folder / f"{ASIDE}old-{target.name}-{os.getpid()}")
            os.replace(aside, target)
            fsync(folder)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    for old in _steps(folder)[:-keep]:
        # renamed first: a death in the middle leaves no half of a checkpoint
        os.replace(folder / f"step-{old:08d}", folder / f"{ASIDE}pruned-{old:08d}")
    for left in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    return target


def load_checkpoint(path: Path) -> tuple[int, State]:
    """(step, state) of one checkpoint. Raises ValueError saying what is damaged."""
    from safetensors.torch import load

    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if path.name != f"step-{manifest['step']:08d}":
            raise ValueError(f"manifest.json says step {manifest['step']}")
        data = {}
        for name, known in manifest["sha256"].items():
            data[name] = (path / name).read_bytes()  # not mapped: the sums are of what is used, and pruning frees the disk
            if hashlib.sha256(data[name]).hexdigest() != known:
                raise ValueError(f"{name} does not match its checksum")
        tensors = load(data.pop("tensors.safetensors"))
        skeleton = json.loads(data.pop("state.json"))
        return manifest["step"], _unpack(skeleton, tensors | (_join(path) if data else {}))
    except FileNotFoundError as error:
        raise ValueError(f"{Path(error.filename or path).name} is missing") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError("manifest.json or state.json cannot be read") from error


def _join(path: Path) -> dict[str, Any]:
    """The whole tensors whose parts the ranks wrote, however many they were."""
    import torch
    from torch.distributed import checkpoint

    reader = checkpoint.HuggingFaceStorageReader(str(path))
    known: dict[str, Any] = reader.read_metadata().state_dict_metadata
    found = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in known.items() if name.startswith("spread-")}
    with warnings.catch_warnings():  # one process reading alone is what is meant
        warnings.simplefilter("ignore", UserWarning)
        checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


def load_latest(folder: Path) -> Loaded:
    """The newest checkpoint whose sums are right. A damaged one is named in `events`, set aside, and the one before it used."""
    events: list[dict] = []
    for left in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step:08d}"
        try:
            step, state = load_checkpoint(path)
            return Loaded(step, state, events)
        except ValueError as error:
            events.append({"event": "damaged checkpoint", "checkpoint": str(path), "what": str(error)})
            aside = folder / f"damaged-{step:08d}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)  # or it would count among the last k, and the next death would meet it again
    return Loaded(0, None, events)
