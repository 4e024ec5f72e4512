"""Side by side on one machine, in turn, on the same work.

    python -m bench                            all rows, tiny and small, one thread; bench/results.json and docs/performance.md
    python -m bench sft dpo --model tiny       some of it, printed
    python -m bench sft --model tiny --update  the same, put in the place of these rows in bench/results.json and docs/performance.md
    python -m bench --smoke                    in seconds: do both sides compute the same? nothing is timed
    python -m bench --page                     the table and picture of docs/performance.md again, from bench/results.json

Both sides are compared first, by losses and gradient norms or by greedy tokens, and a row whose sides differ is refused (exit code 1).
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import curves, rows, table
from bench.data import SCALES, Setup, make, records
from bench.machine import Refused, about
from bench.training import quiet_peers
from temper.train import machine

MORE = ("scaling", "curves")
PEERS = ("trl", "transformers", "accelerate")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "rows", nargs="*", choices=[[], *rows.NAMES, *MORE], metavar="ROW", help=f"some of {', '.join((*rows.NAMES, *MORE))}"
    )
    parser.add_argument("--model", choices=[*SCALES], help="one size of model instead of tiny and small; smoke is for trying the bench")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--times", type=int, default=7, help="turns that are timed, at least five")
    parser.add_argument("--out", type=Path, help="where the results go when only some rows are asked for")
    parser.add_argument("--update", action="store_true", help="replace these rows in bench/results.json, if it is of this machine")
    parser.add_argument("--smoke", action="store_true", help="compare the two sides, measure nothing")
    parser.add_argument("--page", action="store_true", help="make docs/performance.md from bench/results.json")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.times < 5:
        parser.error(f"--times {args.times}: at least 5")
    if args.page:
        table.page(json.loads(table.RESULTS.read_text()) if table.RESULTS.is_file() else None)
        return 0
    quiet_peers()
    if args.alone:
        what = json.loads(args.alone)
        machine.use(what["threads"])
        print(rows.run_alone(what))
        return 0
    machine.use(args.threads)
    return smoke(args) if args.smoke else full(args)


def smoke(args: argparse.Namespace) -> int:
    """Whether the sides agree, on the embedded world and a very small model."""
    os.environ.pop("TEMPER_TEST_DATA", None)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        make("smoke", Path(folder), records()[0][:80])
        for name in [name for name in rows.NAMES if name in (args.rows or rows.NAMES)]:
            try:
                print(f"{name}: both sides agree, to {rows.check(name, Setup('smoke', folder, args.device)):.1e}")
            except Refused as problem:
                wrong += 1
                print(f"{name}: {problem}")
    return int(wrong > 0)


def full(args: argparse.Namespace) -> int:
    console = Console(width=None if sys.stdout.isatty() else 200)
    asked = args.rows or [*rows.NAMES, *MORE]
    pairs, source = records()
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "machine": about(args.device, args.threads),
        "versions": {name: importlib.metadata.version(name) for name in PEERS},
        "records": source,
        **{"rows": [], "tried": [], "scaling": [], "curves": [], "refused": []},
    }
    console.print(results["machine"])
    for size in [args.model] if args.model else ["tiny", "small"]:
        with tempfile.TemporaryDirectory() as folder:
            make(size, Path(folder), pairs)
            setup = Setup(size, folder, args.device)
            for name in [name for name in rows.NAMES if name in asked]:

                def say(what: str, seconds: float | None, name: str = name, size: str = size) -> None:
                    results["tried"].append({"name": name, "model": size, "settings": what, "seconds": seconds})
                    console.print(f"  {name}, {size}: {'' if seconds is None else f'{seconds:.3f} s  '}{what}", highlight=False)

                try:
                    for row in rows.measure(name, setup, args.times, results["machine"]["matmul_gflops"], say):
                        results["rows"].append(rows.fields(row))
                        table.show(results["rows"][-1:], console)
                except Refused as problem:
                    results["refused"].append({"name": name, "model": size, "why": str(problem)})
                    console.print(f"{name}, {size}: refused: {problem}")
            if "scaling" in asked and args.device == "cpu" and (os.cpu_count() or 1) > 1:
                for one in rows.scaling(setup, args.times):
                    results["scaling"].append(one)
                    console.print(one)
            if "curves" in asked and size != "small":
                for point in curves.points(setup, 3):
                    results["curves"].append(point)
                    console.print(point)
    table.show(results["rows"], console)
    if args.update:
        results = table.merged(json.loads(table.RESULTS.read_text()), results) if table.RESULTS.is_file() else results
    if args.out or args.update or not (args.rows or args.model):
        table.write(results, args.out or table.RESULTS)
        if not args.out:
            table.page(results)
    return int(bool(results["refused"]))


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
