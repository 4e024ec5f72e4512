"""`temper data convert`: any readable data in another format, and what that format cannot hold. Floor 2."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from temper.config import Settings, UserError, opt, parse
from temper.data.files import STDIN, write_rows
from temper.data.sources import Report, first, formats, records_of, stream
from temper.records import Record

EXAMPLES = """
  temper data convert alpaca.json --to messages --out alpaca.jsonl
  temper data convert alpaca.jsonl --to alpaca --out again.json
  temper data convert trees.jsonl.gz --to chosen-rejected --out pairs.parquet --skip-bad
  zcat dialogues.gz | temper data convert - --to messages --out - | head
"""
WORDS = ("text", "messages", "prompt", "chosen", "rejected", "answers", "answer", "steps", "tools")  # of a record: they must be kept whole


class Convert(Settings):
    """Write any readable data in another format. What a record knows beyond the format's own fields is written as `meta`."""

    file: str = opt(..., "a file, a folder, - for standard input, owner/name of the hub, or world:NAME", positional=True)
    to: str = opt(..., "the format to write")
    out: str = opt(..., "the file to write: .jsonl .json .csv .parquet .txt, with .gz or .zst; - is standard output")
    meta: bool = opt(True, "write what the format has no field for as `meta`; --no-meta leaves it out and says so")
    skip_bad: bool = opt(False, "leave out the rows that cannot be used, and list them")
    json_: bool = opt(False, "what was done as JSON")


def targets() -> dict[str, types.ModuleType]:
    """The formats that can be written, by the name that --to takes: their file's."""
    found = {m.__name__.rpartition(".")[2].replace("_", "-"): m for m in formats().values() if hasattr(m, "write")}
    return dict(sorted(found.items()))


def to_row(record: Record, target: types.ModuleType, meta: bool = True) -> tuple[dict[str, Any], list[str]]:
    """(the record as a row of a format, what of it the row does not hold), proven by reading the row back.

    Raises ValueError where the format cannot hold the record's words exactly.
    """
    rest = {k: v for k, v in record.meta.items() if k != "at"}
    row = target.write(record, rest)
    if rest and meta:
        row["meta"] = rest
    known = first(row)
    if known is None or (known[0] is not target and known[0].NAME != "temper records"):
        raise ValueError(f"{target.NAME} cannot hold it: the row would be {f'one of {known[0].NAME}' if known else 'of no known format'}")
    try:
        back = records_of(known[0], row, target.KIND)
    except ValueError as error:
        raise ValueError(f"{target.NAME} cannot hold it: {error}") from None
    if len(back) != 1:
        raise ValueError(f"{target.NAME} cannot hold it: the row would be read as {len(back)} records")
    want, got = record.model_dump(mode="json"), back[0].model_dump(mode="json")
    if changed := [name for name in WORDS if want.get(name) != got.get(name)]:
        raise ValueError(f"{target.NAME} cannot hold its {' and '.join(changed)} exactly")
    lost = [name for name in want if name != "meta" and want[name] != got.get(name)]
    return row, lost + [f"meta {k!r}" for k, v in want["meta"].items() if k != "at" and (k not in got["meta"] or got["meta"][k] != v)]


def convert(settings: Convert) -> dict[str, Any]:
    """Write the file; what was read, written, left out and lost. Raises UserError, and then nothing is written."""
    known = targets()
    if settings.to not in known:
        raise UserError(f"--to: no format {settings.to!r}; there are {', '.join(known)}")
    target, report = known[settings.to], Report(settings.file)
    lost: Counter[str] = Counter()
    refused: list[tuple[str, str]] = []
    written = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal written
        for record in stream(settings.file, target.KIND, report, settings.skip_bad):
            try:
                row, missing = to_row(record, target, settings.meta)
            except ValueError as error:
                refused.append((str(record.meta["at"]), " ".join(str(error).split())))
                continue
            lost.update(missing)
            written += 1
            yield row
        if refused and not (settings.skip_bad and written):
            (at, why), more = refused[0], len(refused) - 1
            what = "give another format (--skip-bad leaves such rows out and lists them)" if written else "give another format"
            raise UserError(f"{at}: {why}{f' (and {more} more rows)' if more else ''}; {what}")
        if not written:
            raise UserError(f"{report.summary()}; nothing is left to write")

    write_rows(Path(settings.out), rows())
    return {
        "read": report.summary(),
        "format": report.source,
        "rows": report.rows,
        "written": written,
        "to": target.NAME,
        "out": settings.out,
        "lost": dict(lost),
        "left_out": [list(one) for one in report.skipped + refused],
        "conversions": dict(report.conversions),
    }


def main(argv: list[str]) -> int:
    settings = parse(Convert, argv, "temper data convert", f"{EXAMPLES}\nformats to write: {', '.join(targets())}")
    done = convert(settings)
    out = sys.stderr if Path(settings.out) == STDIN else sys.stdout
    if settings.json_:
        print(json.dumps(done, ensure_ascii=False), file=out)
        return 0
    print(done["read"], file=out)
    for at, why in done["left_out"]:
        print(f"left out: {at}: {why}", file=out)
    for name, n in done["lost"].items():
        print(f"lost: {done['to']} has no place for {name}: {n} rows", file=out)
    print(f"{done['out']}: {done['written']} rows of {done['to']}{'' if done['lost'] else ', nothing of them lost'}", file=out)
    return 0
