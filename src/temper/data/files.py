"""Rows of a file with their line numbers: text, JSON, JSONL, CSV, Parquet; plain, .gz or .zst; standard input; and back. Floor 2."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from temper.config import UserError
from temper.records import atomic, line

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
PACKED = (".gz", ".zst")
STDIN = Path("-")
PART = 8192  # characters a part of a long plain text has at most, where its lines allow
MAX_LINE = 16 << 20  # bytes; a longer line is no row that a model could read, and must not fill the memory
BREAKS = (EOFError, OSError, zlib.error)  # what unpacking a broken file raises
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of such bytes


class Row(NamedTuple):
    """value: what was read; line: 1-based, `line:column` of a row that stands behind another. broken: why there is no value."""

    line: int | str
    value: Any
    broken: str = ""


def kind_of(path: Path) -> str:
    """One of SUFFIXES, by the name without .gz or .zst. Raises UserError for another one."""
    suffix = (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()
    suffix = {".ndjson": ".jsonl", ".text": ".txt", ".md": ".txt"}.get(suffix, suffix)
    if suffix not in SUFFIXES:
        known = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, plain or with {' or '.join(PACKED)}"
        raise UserError(f"{path}: unknown kind of file {suffix or '(no ending)'!r}; give {known}")
    return suffix


def need(module: str, what: str) -> Any:
    """A module of the `data` extra. Raises UserError, which says how to install it, where it is missing."""
    try:
        return import_module(module)
    except ImportError:
        raise UserError(f"{what} needs {module.split('.')[0]}: pip install 'temper-lm[data]'") from None


# ---------------------------------------------------------------- bytes


def _unpack(path: Path, file: Any, how: str) -> Any:
    if how == ".gz":
        return gzip.GzipFile(fileobj=file, mode="rb")
    if how == ".zst":
        return io.BufferedReader(need("pyarrow", f"{path}: .zst").CompressedInputStream(file, "zstd"))
    return file


def _broken_off(path: Path, error: Exception) -> str:
    """Why the file cannot be read any further. Raises UserError where that is not its content's fault."""
    if isinstance(error, OSError) and error.errno is not None:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    how = "gzip" if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error) else "zstd"
    return f"broken {how} ({' '.join(str(error).split())}); nothing after it can be read, fetch the file again"


def _lines(file: Any) -> Iterator[bytes]:
    """Lines with their LF; of one longer than MAX_LINE only its first MAX_LINE + 1 bytes."""
    while data := file.readline(MAX_LINE + 1):
        yield data
        if len(data) > MAX_LINE:
            while data and not data.endswith(b"\n"):
                data = file.readline(1 << 20)


def _parse_error(error: Exception) -> str:
    return f"not JSON ({error.msg.lower()}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else f"not JSON ({error})"


# ---------------------------------------------------------------- rows


def _jsonl(path: Path, file: Any) -> Iterator[Row]:
    number = 0
    try:
        for number, data in enumerate(_lines(file), 1):
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if not data.strip():
                continue
            try:
                if len(data) > MAX_LINE:
                    raise ValueError(f"longer than {MAX_LINE >> 20} MiB; a line should hold one row")
                yield Row(number, json.loads(data.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield Row(number, None, f"byte {error.start + 1} of the line is not UTF-8")
            except json.JSONDecodeError as error:
                yield Row(number, None, _parse_error(error))
            except (ValueError, RecursionError) as error:
                yield Row(number, None, str(error) if len(data) > MAX_LINE else _parse_error(error))
    except BREAKS as error:
        yield Row(number + 1, None, _broken_off(path, error))


def _read(path: Path, file: Any) -> tuple[str, str]:
    """(the text, why it breaks off or ""); bytes that are not UTF-8 become lone surrogates, which JSON text itself never holds."""
    data, why = bytearray(), ""
    try:
        while block := file.read1(1 << 16):
            data += block
    except BREAKS as error:
        why = _broken_off(path, error)
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff"), why


def _json(path: Path, file: Any) -> Iterator[Row]:
    """The elements of the array that the file holds, each with the line it starts on; or objects one after the other."""
    text, cut = _read(path, file)
    blank = re.compile(r"[ \t\r\n]*")
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        found = blank.match(text, at)
        return found.end() if found else at

    def stop(at: int, why: str) -> Row:
        return Row(1 + text.count("\n", 0, at), None, cut or f"not JSON ({why}); nothing after it can be read")

    at, line, counted, begin = skip(0), 1, 0, 0  # begin: of the line
    array = text.startswith("[", at)
    if array:
        at = skip(at + 1)
    first = True
    while at < len(text):
        if array and text[at] == "]":
            if skip(at + 1) < len(text):
                yield stop(skip(at + 1), "text after the end of the list")
            return
        if array and not first:
            if text[at] != ",":
                yield stop(at, "expected ',' or ']' after a row")
                return
            at = skip(at + 1)
        breaks = text.count("\n", counted, at)
        begin = text.rfind("\n", counted, at) + 1 if breaks else begin
        line, counted = line + breaks, at
        place = line if first or breaks else f"{line}:{at - begin + 1}"
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            pos, why = (error.pos, error.msg.lower()) if isinstance(error, json.JSONDecodeError) else (at, str(error))
            yield stop(pos, why)
            return
        wrong = _NOT_UTF8.search(text, at, end)
        yield Row(place, None, f"byte {_byte(wrong[0])} in the row is not UTF-8") if wrong else Row(place, value)
        at, first = skip(end), False
    if array or cut:
        yield stop(len(text), "the list is not closed; the file may be cut")


def _byte(escaped: str) -> str:
    return f"0x{ord(escaped) - 0xDC00:02x}"


def _csv(path: Path, file: Any, delimiter: str) -> Iterator[Row]:
    """Rows by the names of the header, every value as text."""
    csv.field_size_limit(MAX_LINE)
    texts = (data.decode("utf-8", "surrogateescape") for data in _lines(file))
    reader = csv.reader((text.removeprefix("\ufeff") if n == 0 else text for n, text in enumerate(texts)), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        at = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield Row(at, None, f"not CSV ({error})")
            continue
        except BREAKS as error:
            yield Row(at, None, _broken_off(path, error))
            return
        if cells is None:
            return
        if not header:
            header = cells
            if twice := {name for name in cells if cells.count(name) > 1}:
                raise UserError(f"{path}:{at}: the header names {min(twice)!r} twice; the first line should name each column once")
        elif not any(cells):
            continue
        elif wrong := _NOT_UTF8.search("".join(cells)):
            yield Row(at, None, f"byte {_byte(wrong[0])} in the row is not UTF-8")
        elif len(cells) != len(header):
            yield Row(at, None, f"{len(cells)} cells, but the header names {len(header)} columns")
        else:
            yield Row(at, dict(zip(header, cells, strict=True)))


def without_none(value: Any) -> Any:
    """A value of a table without what is null in it: tables fill in every column that any row has."""
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value


def _parquet(path: Path, file: Any) -> Iterator[Row]:
    parquet = need("pyarrow.parquet", f"{path}: reading Parquet")
    from pyarrow import ArrowException

    number = 0
    try:
        for batch in parquet.ParquetFile(file if file.seekable() else io.BytesIO(file.read())).iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(number, without_none(value))
    except (ArrowException, OSError) as error:
        yield Row(number + 1, None, f"broken Parquet ({' '.join(str(error).split())}); fetch the file again")


def parts_of(text: str, size: int = PART) -> list[str]:
    """The text cut after blank lines, else after lines, into parts of at most `size` characters where the lines allow.

    Joined, the parts are the text.
    """
    pieces = [
        p for block in re.split(r"(?<=\n\n)(?!\n)", text) for p in ([block] if len(block) <= size else block.splitlines(keepends=True))
    ]
    parts: list[str] = []
    length = 0
    for piece in pieces:
        if not parts or length + len(piece) > size:
            parts.append("")
            length = 0
        parts[-1] += piece
        length += len(piece)
    return [part for part in parts if part]


def _plain(path: Path, file: Any) -> Iterator[Row]:
    text, cut = _read(path, file)
    if not cut and (wrong := _NOT_UTF8.search(text)):
        at = 1 + text.count("\n", 0, wrong.start())
        column = len(text[: wrong.start()].rpartition("\n")[2].encode("utf-8", "surrogateescape")) + 1
        raise UserError(f"{path}:{at}: byte {column} of the line is not UTF-8; save the file as UTF-8")
    if cut:
        raise UserError(f"{path}:{1 + text.count(chr(10))}: {cut}")
    if not text.strip():
        return
    line = 1
    parts = parts_of(text)
    for k, part in enumerate(parts, 1):
        yield Row(line, {"text": part, "part": k, "parts": len(parts)})
        line += part.count("\n")


_READERS: dict[str, Callable[[Path, Any], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": functools.partial(_csv, delimiter=","),
    ".tsv": functools.partial(_csv, delimiter="\t"),
    ".parquet": _parquet,
    ".txt": _plain,
}


def _looks_like(head: bytes) -> str:
    """One of SUFFIXES, by how the content begins: where there is no name to go by."""
    if head.startswith(b"PAR1"):
        return ".parquet"
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0].strip()
    if first.startswith(b"["):
        return ".json"
    if first.startswith(b"{"):
        return ".jsonl" if first.endswith(b"}") or len(first) > 1000 else ".json"
    for mark, kind in ((b",", ".csv"), (b"\t", ".tsv")):
        if mark in first and all(re.fullmatch(rb'"?[A-Za-z_]\w*"?', name) for name in first.split(mark)):
            return kind
    return ".txt"


def _stdin() -> Iterator[Row]:
    with tempfile.SpooledTemporaryFile(max_size=1 << 26) as spool:  # what a pipe gives can be read only once
        shutil.copyfileobj(sys.stdin.buffer, spool)
        spool.seek(0)
        how = {b"\x1f\x8b": ".gz", b"\x28\xb5": ".zst"}.get(spool.read(2), "")
        spool.seek(0)
        try:
            head = _unpack(STDIN, io.BytesIO(spool.read(1 << 16)), how).read1(1 << 12)
        except BREAKS:
            head = b"{}"  # the reader of lines says what is broken
        spool.seek(0)
        yield from _READERS[_looks_like(head)](STDIN, _unpack(STDIN, spool, how))


def rows(path: Path) -> Iterator[Row]:
    """Every row of a file; of standard input for `-`, whose kind is told by how it begins. What cannot be read is a Row with `broken`.

    Raises UserError where there is no such file, its kind is unknown, or a plain text cannot be read to its end.
    """
    if path == STDIN:
        yield from _stdin()
        return
    reader = _READERS[kind_of(path)]
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    with file:
        yield from reader(path, _unpack(path, file, path.suffix.lower()))


# ---------------------------------------------------------------- writing


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The rows in a file of the kind that its name says, atomically and with the same bytes each time; `-` is JSONL on standard output.

    Raises UserError for an unknown kind, and for what the kind cannot hold: a table of CSV holds text and numbers, a .txt only texts.
    """
    if path == STDIN:
        sys.stdout.buffer.writelines(map(line, rows))
        sys.stdout.buffer.flush()
        return
    kind, how = kind_of(path), path.suffix.lower()
    with atomic(path) as file:
        if how == ".gz":
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                _WRITERS[kind](path, packed, rows)
        elif how == ".zst":
            own = os.fdopen(os.dup(file.fileno()), "wb")  # it closes what it is given
            with need("pyarrow", f"{path}: .zst").CompressedOutputStream(own, "zstd") as packed:
                _WRITERS[kind](path, packed, rows)
        else:
            _WRITERS[kind](path, file, rows)


def _write_jsonl(path: Path, file: Any, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        file.write(line(row))


def _write_json(path: Path, file: Any, rows: Iterable[dict[str, Any]]) -> None:
    between = b"[\n"
    for row in rows:
        file.write(between + line(row).rstrip(b"\n"))
        between = b",\n"
    file.write(b"\n]\n" if between != b"[\n" else b"[]\n")


def _write_csv(path: Path, file: Any, rows: Iterable[dict[str, Any]], delimiter: str) -> None:
    table = list(rows)
    names = list(dict.fromkeys(name for row in table for name in row))
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    writer.writerow(names)
    for row in table:
        if wrong := next((name for name, value in row.items() if not isinstance(value, str | int | float)), None):
            raise UserError(f"{path}: a table of text cannot hold {wrong!r}, {str(row[wrong])[:60]}; write .jsonl or .parquet")
        writer.writerow([row.get(name, "") for name in names])
    file.write(out.getvalue().encode())


def _write_parquet(path: Path, file: Any, rows: Iterable[dict[str, Any]]) -> None:
    parquet = need("pyarrow.parquet", f"{path}: writing Parquet")
    import pyarrow

    try:
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: Parquet cannot hold these rows ({' '.join(str(error).split())}); write .jsonl") from None


def _write_plain(path: Path, file: Any, rows: Iterable[dict[str, Any]]) -> None:
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise UserError(f"{path}: a .txt file holds plain text only, not {', '.join(map(repr, row))}; write .jsonl")
        file.write(row["text"].encode())


_WRITERS: dict[str, Callable[[Path, Any, Iterable[dict[str, Any]]], None]] = {
    ".jsonl": _write_jsonl,
    ".json": _write_json,
    ".csv": functools.partial(_write_csv, delimiter=","),
    ".tsv": functools.partial(_write_csv, delimiter="\t"),
    ".parquet": _write_parquet,
    ".txt": _write_plain,
}
