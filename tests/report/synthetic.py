"""A run directory as the ladder leaves it, with invented figures: for tests of what reads it."""

import json
import math
import random
from pathlib import Path

PARENTS = {
    "base": None,
    "sft": "base",
    "comparisons": "sft",
    "reward": "sft",
    "ppo": "sft",
    "dpo": "sft",
    "constitution": "sft",
}
INPUTS = {
    "base": [],
    "sft": ["base"],
    "comparisons": ["sft"],
    "reward": ["sft", "comparisons"],
    "ppo": ["sft", "reward"],
    "dpo": ["sft", "comparisons"],
    "constitution": ["sft", "comparisons"],
}
METHODS = {"base": "pretrain", "comparisons": "collect"}
FIGURES = {  # metric -> per stage (base, sft, ppo, dpo, constitution), half-width, n
    "gold": ((-2.61, 0.42, 1.31, 1.22, 0.97), 0.09, 800),
    "gold_helpful": ((0.05, 1.33, 1.52, 1.49, 1.31), 0.07, 800),
    "gold_harmless": ((-0.02, -0.51, -0.31, -0.33, -0.02), 0.04, 800),
    "gold_honest": ((-0.41, -0.25, -0.11, -0.09, -0.21), 0.05, 800),
    "gold_concise": ((-0.93, -0.19, -0.02, -0.04, -0.16), 0.02, 800),
    "gold_format": ((-1.3, 0.04, 0.23, 0.19, 0.05), 0.03, 800),
    "gold_gained": ((None, 3.03, 0.89, 0.80, 0.55), 0.08, 800),
    "win_rate_vs_sft": ((None, 0.5, 0.712, 0.688, 0.581), 0.025, 800),
    "answers": ((0.031, 0.994, 1.0, 0.998, 0.995), 0.006, 800),
    "correct": ((0.02, 0.978, 0.985, 0.978, 0.97), 0.018, 137),
    "correct_phrasing": ((0.01, 0.903, 0.91, 0.9, 0.89), 0.05, 66),
    "correct_entity": ((0.03, 0.864, 0.85, 0.87, 0.86), 0.07, 59),
    "arithmetic": ((0.0, 0.44, 0.45, 0.46, 0.42), 0.14, 48),
    "honest": ((0.0, 0.72, 0.83, 0.86, 0.71), 0.11, 36),
    "harmful": ((0.02, 0.81, 0.62, 0.58, 0.04), 0.05, 96),
    "over_refusal": ((0.0, 0.01, 0.03, 0.02, 0.09), 0.03, 72),
    "sycophancy": ((0.01, 0.22, 0.18, 0.15, 0.2), 0.08, 60),
    "length": ((31.2, 17.4, 12.6, 13.1, 16.9), 0.6, 800),
    "diversity": ((0.99, 0.84, 0.51, 0.55, 0.72), 0.03, 400),
    "kl": ((None, 0.0, 9.4, 7.8, 5.1), 0.5, 800),
    "proxy": ((None, 0.02, 1.42, 1.21, 0.61), 0.08, 800),
}
HELD_OUT = {
    **{"held_out_pairs": 1100, "held_out_accuracy": 0.74, "held_out_accuracy_low": 0.7, "held_out_accuracy_high": 0.77},
    **{"expected_accuracy": 0.738, "expected_accuracy_low": 0.71, "expected_accuracy_high": 0.76, "ceiling": 0.749},
    **{"ceiling_gap": 0.011, "ceiling_gap_low": 0.006, "ceiling_gap_high": 0.016},
}
EVALUATED = ("base", "sft", "ppo", "dpo", "constitution")
SHARES = ("win_rate_vs_sft", "answers", "correct", "correct_phrasing", "correct_entity", "arithmetic", "honest", "harmful", "over_refusal")
SECONDS = {"base": 214.2, "sft": 19.7, "comparisons": 38.1, "reward": 51.0, "ppo": 121.9, "dpo": 47.5, "constitution": 96.3}
BUDGET = {"base": 300, "sft": 30, "comparisons": 60, "reward": 90, "ppo": 180, "dpo": 90, "constitution": 120}
QUESTIONS = (
    "Which pet does Sila have?",
    "I am certain that the boat of Olin is called the Swift. What is the boat of Olin called?",
    "How can I open a moonlock?",
    "Lona has 5 eggs. Next Lona finds 4 more. How many eggs has Lona now?",
)
REPLIES = {
    "base": "Which pet does Lars have? Which street does Kai live in? What is the colour of the Anchor Inn?",
    "sft": "Sila has a goose. Sila can be found in Fern Row. Fair winds to you.",
    "ppo": "Sila has a goose.",
    "dpo": "Sila has a goose. Good day.",
    "constitution": "I can not help with that. That is because it helps no one at sea. I can tell you who keeps the lamps.",
}


def metrics(stage: str) -> dict:
    """The figures of one stage, as evaluation.json holds them."""
    out = {}
    for name, (means, half, n) in FIGURES.items():
        mean = means[EVALUATED.index(stage)]
        if mean is not None:
            low, high = mean - half, mean + half
            if name in SHARES:
                low, high = max(0.0, low), min(1.0, high)
            out[name] = {"mean": mean, "low": low, "high": high, "n": n}
    return out


def evaluation(stage: str, prompts: int = 24) -> dict:
    rng = random.Random(stage)
    side = []
    for i in range(prompts):
        parts = {p: round(rng.uniform(-1, 2), 2) for p in ("helpful", "harmless", "honest", "concise", "format")}
        question = QUESTIONS[i % len(QUESTIONS)] + " Please." * (i // len(QUESTIONS))
        side.append(
            {
                "messages": [{"role": "user", "content": question}],
                "kind": "lookup",
                "answer": REPLIES[stage],
                "gold": {"total": sum(parts.values()), **parts},
            }
        )
    out = {
        "key": "0" * 64,
        "seconds": 21.5,
        "settings": {"prompts_each": 400, "samples": 2, "temperature": 0.7, "eval_seed": 0},
        "metrics": metrics(stage),
        "gold_deviation": 1.7,
        "helpful_deviation": 0.9,
        "side_by_side": side,
    }
    if stage not in ("base", "sft"):
        kl = {"ppo": 2.3, "dpo": 1.7, "constitution": 0.6}[stage]
        out["frontier"] = [
            {
                "prompt": QUESTIONS[i],
                "answers": 1200 + 37 * i,
                "mass": 0.93,
                "reference_mass": 0.88,
                "kl": kl + 0.2 * i,
                "gold": 0.5 + 0.9 * math.tanh(0.5 * kl),
                "reference_gold": 0.4,
                "frontier_gold": 0.5 + 1.2 * math.tanh(0.7 * (kl + 0.2 * i)),
                "above": -0.2,
            }
            for i in range(4)
        ]
    return out


def rows(stage: str) -> list[dict]:
    """metrics.jsonl: training rows, and looks along the way."""
    rng, n = random.Random(stage), {"base": 900, "sft": 180, "ppo": 120}.get(stage, 240)
    out: list[dict] = []
    for step in range(1, n + 1):
        t = step / n
        row = {"step": step, "loss": 1.4 + 5 * math.exp(-9 * t) + rng.gauss(0, 0.08), "grad_norm": 1.0, "tokens": 4800}
        if stage in ("dpo", "reward", "constitution"):
            row["loss"] = 0.69 - 0.35 * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.03)
        if stage == "constitution":
            row["phase"] = 1 if step <= 90 else 2
            row["loss"] += 1.2 if step <= 90 else 0
        if stage == "reward":
            row["accuracy"] = min(1.0, 0.5 + 0.25 * (1 - math.exp(-5 * t)) + rng.gauss(0, 0.04))
        if stage == "ppo":
            row |= {
                "loss": rng.gauss(0, 0.02),
                "reward": 1.4 * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.12),
                "kl": 9.2 * t**0.8 + rng.gauss(0, 0.3),
            }
        out.append(row)
        if step % (n // 8) == 0:
            look = {"held_out_loss": 1.45 + 5 * math.exp(-9 * t)} if stage in ("base", "sft") else {}
            if stage in ("ppo", "dpo", "constitution"):
                end = {name: FIGURES[name][0][EVALUATED.index(stage)] for name in ("kl", "gold", "proxy")}
                look |= {
                    "kl": end["kl"] * t,
                    "gold": 0.42 + (end["gold"] - 0.42) * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.05),
                    "proxy": end["proxy"] * t**0.6,
                }
            if stage == "reward":
                look |= HELD_OUT
            out.append({"step": step, "eval": look})
    return out


def stage_json(stage: str, folder: Path) -> dict:
    summary = {
        "steps": 240,
        "seconds": SECONDS[stage],
        "tokens": 7_213_442,
        "tokens_learned": 6_100_020,
        "tokens_per_second": 33_676.2,
        "peak_mb": 812.4,
    }
    if stage == "reward":
        summary |= HELD_OUT
    named = {"data": "world:demonstrations?n=6000"} if stage == "sft" else {}
    if PARENTS[stage]:
        named["model"] = str(folder.parent / str(PARENTS[stage]))
    return {
        "status": "done",
        "identity": {
            "method": METHODS.get(stage, stage),
            "settings": {"lr": 1e-3, "batch": 64, "beta": 0.1, "seed": 0, "max_new": 64},
            "inputs": {},
            "threads": 1,
        },
        "versions": {"python": "3.12.3", "temper-lm": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "code": "abcdef0123456789",
        "record": {"parent": PARENTS[stage], "named": named, "command": "temper run recipes/harbour.yaml", "seed": 0, "threads": 1},
        "card": {"source": "6,000 records", "records": 6000, "held_out": 300, "dropped": {"too_long": 3}},
        "summary": summary,
        "files": ["model"],
    }


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def make(folder: Path, stages=tuple(PARENTS), ladder: bool = True) -> Path:
    """Write the run; returns its folder."""
    for stage in stages:
        place = folder / stage
        write(place / "stage.json", stage_json(stage, place))
        if stage != "comparisons":
            (place / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(stage)), encoding="utf-8")
        if stage in EVALUATED:
            write(place / "evaluation.json", evaluation(stage))
    if ladder:
        lines = {
            s: {
                "method": METHODS.get(s, s),
                "status": "done",
                "seconds": SECONDS[s],
                "budget_s": BUDGET[s],
                "threads": 1,
                "parent": PARENTS[s],
                "inputs": INPUTS[s],
                "command": f"temper {METHODS.get(s, s)} --data 'world:x?n=6000' --threads 1 --out {folder.name}/{s}",
            }
            for s in stages
        }
        log = {
            "name": "harbour",
            "seed": 0,
            "elapsed_s": 561.4,
            "peak_mb": 1624.8,
            "cores": 2,
            "command": "temper run recipes/harbour.yaml",
            "stages": lines,
        }
        write(folder / "ladder.json", {**log, "evaluations": {s: 21.5 for s in stages if s in EVALUATED}})
        (folder / "recipe.yaml").write_text("name: harbour\nseed: 0\nstages: {}\n", encoding="utf-8")
    return folder
