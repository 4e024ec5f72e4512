"""The figures: a table in the terminal, results.json, and the picture and table of docs/performance.md, which are made from it."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, PICTURE = ROOT / "bench" / "results.json", ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.png"
BEGIN, END = "<!-- figures: made by `python -m bench --page` -->", "<!-- end of figures -->"
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
    curves = list(dict.fromkeys(point["curve"] for point in results.get("curves", [])))
    figure, axes = pyplot.subplots(2 if curves else 1, max(2, len(curves)), figsize=(4 * max(2, len(curves)), 7 if curves else 3.5))
    axes = axes if curves else [axes]
    names = [f"{row['name']}\n{row['model']}" for row in rows]
    low = [row["ratio"] - row["ratio_low"] for row in rows]
    high = [row["ratio_high"] - row["ratio"] for row in rows]
    axes[0][0].bar(names, [row["ratio"] for row in rows], yerr=[low, high], color="#3b6ea5", capsize=3)
    axes[0][0].axhline(1, color="black", linewidth=0.8)
    axes[0][0].set_title("peer's time over ours")
    told = [row for row in rows if row["ours_peak_mb"]]
    axes[0][1].bar([f"{r['name']}\n{r['model']}" for r in told], [r["ours_peak_mb"] / r["peer_peak_mb"] for r in told], color="#8a5a83")
    axes[0][1].axhline(1, color="black", linewidth=0.8)
    axes[0][1].set_title("our peak memory over the peer's")
    for axis in axes[0][:2]:
        axis.tick_params(axis="x", labelsize=6)
    for axis in axes[0][2:]:
        axis.axis("off")
    for axis, curve in zip(axes[1] if curves else [], curves, strict=False):
        points = [p for p in results["curves"] if p["curve"] == curve]
        for side, colour in ("ours", "#3b6ea5"), ("peer", "#b5651d"):
            axis.loglog([p["x"] for p in points], [p[side] for p in points], "o-", color=colour, label=side)
        axis.set_title(f"seconds by {curve}")
        axis.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)
