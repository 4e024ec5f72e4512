"""The figures: a table in the terminal, results.json, and the picture and table of docs/performance.md, which are made from it."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.machine import Refused
from bench.rows import NAMES

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, PICTURE = ROOT / "bench" / "results.json", ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png"
BEGIN, END = "<!-- figures: made by `python -m bench --page` -->", "<!-- end of figures -->"
OURS, PEER = "#3b6ea5", "#b5651d"
HEAD = (
    "step",
    "model",
    "against",
    "ratio",
    "interval",
    "ours",
    "peer",
    "peak memory, ours / peer",
    "of the ceiling",
    "the peer's settings",
)


def cells(row: dict[str, Any]) -> list[str]:
    mine, theirs = row["ours_peak_mb"], row["peer_peak_mb"]
    memory = "" if mine is None else f"{mine:.0f} / {theirs:.0f} MB ({mine / theirs:.2f})"
    return [
        *(row["name"], row["model"], row["against"]),
        *(f"{row['ratio']:.2f} ×", f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}"),
        *(f"{row['ours']:.3f} s", f"{row['peer']:.3f} s", memory, f"{row['roofline_share']:.0%}", row["peer_settings"]),
    ]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(*HEAD, title="ours beside the peer: how many times as long the peer takes")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)


def write(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The new results, and of the old those of other rows and models. Raises Refused where they are not of one machine."""
    for what in "device", "threads", "torch":
        if old["machine"][what] != new["machine"][what]:
            raise Refused(f"{what}: {RESULTS.name} has {old['machine'][what]}, this is {new['machine'][what]}; run all of it")
    if old["versions"] != new["versions"] or old["records"] != new["records"]:
        raise Refused(f"{RESULTS.name} is of other versions or records; run all of it")
    out = dict(new)
    for part in "rows", "tried", "scaling", "refused":
        fresh = {(row["name"], row["model"]) for each in ("rows", "refused") for row in new[each]} if part != "scaling" else set()
        fresh |= {(row["name"], row["model"]) for row in new[part]}
        out[part] = [row for row in old[part] if (row["name"], row["model"]) not in fresh] + new[part]
    out["curves"] = new["curves"] or old["curves"]
    out["rows"].sort(key=lambda row: (row["model"] != "tiny", NAMES.index(row["name"])))
    out["command"] = "; ".join(dict.fromkeys([*old["command"].split("; "), new["command"]]))
    return out


def figures(results: dict[str, Any] | None) -> str:
    """What stands between the marks of the page."""
    if not results:
        return "Not measured yet: `make bench` writes the figures here."
    m = results["machine"]
    lines = [
        f"{results['date']}; {m['device']}, {m['threads']} thread{'s' if m['threads'] > 1 else ''}, torch {m['torch']}, "
        + ", ".join(f"{k} {v}" for k, v in results["versions"].items())
        + f"; records: {results['records']}. Measured ceilings: {m['matmul_gflops']:.0f} GFLOP/s, {m['copy_gbs']:.1f} GB/s.",
        "",
        "![ratios, memory and cost curves](performance.png)",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{'---|' * len(HEAD)}",
        *(f"| {' | '.join(cells(row))} |" for row in results["rows"]),
    ]
    if results.get("scaling"):
        lines += ["", "| ours, one thread to two | model | ratio | interval |", "|---|---|---|---|"]
        for s in results["scaling"]:
            lines.append(f"| {s['name']} | {s['model']} | {s['ratio']:.2f} × | {s['ratio_low']:.2f}–{s['ratio_high']:.2f} |")
    for r in results.get("refused", []):
        lines += ["", f"Refused: {r['name']} ({r['model']}): {r['why']}."]
    return "\n".join(lines)


def page(results: dict[str, Any] | None) -> None:
    """Put the figures into the page, and draw the picture."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{figures(results)}\n\n{END}{after}", encoding="utf-8")
    if results:
        picture(results)


def picture(results: dict[str, Any]) -> None:
    """Ratios with their intervals, peak memory, and the cost curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in results["rows"] if row["against"] == "best"]
    curves = list(dict.fromkeys(point["curve"] for point in results["curves"]))
    grid: list[Any] = [["ratio"] * 2 + ["memory"] * 2, curves] if len(curves) == 4 else [["ratio", "memory"]]
    figure, axes = pyplot.subplot_mosaic(grid, figsize=(15, 7))
    low = [row["ratio"] - row["ratio_low"] for row in rows]
    high = [row["ratio_high"] - row["ratio"] for row in rows]
    axes["ratio"].bar([_name(row) for row in rows], [row["ratio"] for row in rows], yerr=[low, high], color=OURS, capsize=3)
    axes["ratio"].set_title("peer's time over ours")
    told = [row for row in rows if row["ours_peak_mb"]]
    axes["memory"].bar([_name(row) for row in told], [row["ours_peak_mb"] / row["peer_peak_mb"] for row in told], color=OURS)
    axes["memory"].set_title("our peak memory over the peer's")
    for name in "ratio", "memory":
        axes[name].axhline(1, color="black", linewidth=0.8)
    for curve in curves if len(curves) == 4 else []:
        points = [point for point in results["curves"] if point["curve"] == curve]
        for side, colour in ("ours", OURS), ("peer", PEER):
            axes[curve].loglog([p["x"] for p in points], [p[side] for p in points], "o-", base=2, color=colour, label=side)
        axes[curve].set_title(f"seconds by {curve}")
        axes[curve].legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=100)


def _name(row: dict[str, Any]) -> str:
    return f"{row['name']}\n{row['model']}"
