"""Rows of a file with their line numbers: .txt .json .jsonl, plain or .gz; the bytes are read as they are. Floor 2."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from temper.config import UserError

SUFFIXES = (".jsonl", ".json", ".txt")
PART = 8192  # characters a part of a long plain text has at most, where its lines allow


class Row(NamedTuple):
    """value: what was read; line: 1-based. broken: why there is no value (a line that cannot be read)."""

    line: int
    value: Any
    broken: str = ""


def kind_of(path: Path) -> str:
    """'.jsonl', '.json' or '.txt', by the name without .gz. Raises UserError for another one."""
    suffix = (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()
    suffix = {".ndjson": ".jsonl", ".text": ".txt", ".md": ".txt"}.get(suffix, suffix)
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file {suffix or '(no ending)'!r}; give .txt, .json or .jsonl, plain or with .gz")
    return suffix


def _blocks(path: Path) -> Iterator[bytes]:
    """The file's lines as bytes, LF included, streamed; gzip undone by the name. Raises UserError when it cannot be read."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for line in file:
                number += 1
                yield line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}:{number + 1}: broken gzip ({' '.join(str(error).split())}); fetch the file again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _decode(path: Path, line: int, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{line}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None


def _text(path: Path) -> str:
    return "".join(_decode(path, number, line) for number, line in enumerate(_blocks(path), 1))


def _parse_error(error: Exception) -> str:
    return f"not JSON ({error.msg.lower()}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else f"not JSON ({error})"


def _jsonl(path: Path) -> Iterator[Row]:
    for number, data in enumerate(_blocks(path), 1):
        if number == 1:
            data = data.removeprefix(b"\xef\xbb\xbf")
        if not data.strip():
            continue
        try:
            yield Row(number, json.loads(data.decode("utf-8")))
        except UnicodeDecodeError as error:
            yield Row(number, None, f"byte {error.start + 1} of the line is not UTF-8")
        except (ValueError, RecursionError) as error:
            yield Row(number, None, _parse_error(error))


def _json(path: Path) -> Iterator[Row]:
    """The elements of the array that the file holds, each with the line it starts on; or objects one after the other."""
    text = _text(path).removeprefix("\ufeff")
    blank = re.compile(r"[ \t\r\n]*")
    decoder = json.JSONDecoder()

    def skip(at: int) -> int:
        found = blank.match(text, at)
        return found.end() if found else at

    def stop(at: int, why: str) -> UserError:
        return UserError(f"{path}:{1 + text.count(chr(10), 0, at)}: not JSON ({why}); nothing after it can be read")

    at, line, counted = skip(0), 1, 0
    array = text.startswith("[", at)
    if array:
        at = skip(at + 1)
    first = True
    while at < len(text):
        if array and text[at] == "]":
            if skip(at + 1) < len(text):
                raise stop(skip(at + 1), "text after the end of the list")
            return
        if array and not first:
            if text[at] != ",":
                raise stop(at, "expected ',' or ']' after a row")
            at = skip(at + 1)
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise stop(error.pos, error.msg.lower()) from None
        except (ValueError, RecursionError) as error:
            raise stop(at, str(error)) from None
        yield Row(line, value)
        at, first = skip(end), False
    if array:
        raise stop(len(text), "the list is not closed; the file may be cut")


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


def _plain(path: Path) -> Iterator[Row]:
    text = _text(path).removeprefix("\ufeff")
    if not text.strip():
        return
    line = 1
    parts = parts_of(text)
    for k, part in enumerate(parts, 1):
        yield Row(line, {"text": part, "part": k, "parts": len(parts)})
        line += part.count("\n")


def rows(path: Path) -> Iterator[Row]:
    """Every row of a file. A line of JSONL that cannot be read is a Row with `broken`; other files raise UserError `file:line`."""
    return {".jsonl": _jsonl, ".json": _json, ".txt": _plain}[kind_of(path)](path)
