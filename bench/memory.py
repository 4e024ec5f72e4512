"""Peak memory of PPO on one backbone, against four models and against LoRA SFT at the same tokens: `python -m bench.memory`.

Each way runs in a process of its own: the base is loaded, then everything above it is counted (adapters, gradients, optimiser, rollouts,
activations) over two rollouts of training. The models are random: memory does not depend on what they say.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from temper.config import build
from temper.data.template import attach_default_template
from temper.methods import load
from temper.models.adapt import Adapter
from temper.models.load import Size, export, load_policy, load_scalar, new_model, save
from temper.models.tokenizer import train_tokenizer
from temper.runs import Run
from temper.train import machine

SIZES = {  # and answers of a rollout: where activations outweigh the model, and where the model outweighs them, as large ones do
    "small": (Size(width=256, layers=6, heads=8, context=256), 16),
    "wide": (Size(width=768, layers=8, heads=8, context=256), 4),
}
ASKED, ANSWER = 60, 64  # words of a prompt, tokens of an answer
WAYS = ("lora sft", "ppo, one backbone", "ppo, four models")


def files(folder: Path, size: str) -> None:
    """Base, an SFT adapter and a reward adapter on it, a reward model with all weights; demonstrations and prompts of equal length."""
    words = ["the", "baker", "lives", "in", "a", "red", "house", "by", "old", "harbour", "where", "boats", "lie"]
    tokenizer = train_tokenizer([" ".join(words)] * 3, 320)
    attach_default_template(tokenizer)
    save(new_model(SIZES[size][0], 8192, tokenizer, seed=0), tokenizer, folder / "base")
    export(load_policy(folder / "base", adapters=Adapter(adapter="lora"))[0], tokenizer, folder / "sft")
    export(load_scalar(folder / "base", adapters=Adapter(adapter="lora"))[0], tokenizer, folder / "reward")
    export(load_scalar(folder / "base")[0], tokenizer, folder / "whole_reward")
    asks = [" ".join(words[(i * (k + 1)) % len(words)] for i in range(ASKED)) for k in range(4 * SIZES[size][1])]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"messages": [{"role": "user", "content": a}]}) + "\n" for a in asks))
    chats = [[{"role": "user", "content": a}, {"role": "assistant", "content": " ".join([*words] * 8)[: 5 * ANSWER]}] for a in asks]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))


def peak(folder: Path, way: str) -> dict[str, float]:
    """Megabytes above the loaded base, and tokens of a step."""
    rows = len((folder / "prompts.jsonl").read_text().splitlines()) // 4
    torch.set_num_threads(1)
    common: dict[str, Any] = {"model": str(folder / ("base" if way == "ppo, four models" else "sft"))}
    if way == "lora sft":
        method = "sft"
        values = common | {"data": str(folder / "chats.jsonl"), "held_out": 0.0, "batch": rows, "epochs": 0.5}
    else:
        method = "ppo"
        reward = str(folder / ("whole_reward" if way == "ppo, four models" else "reward"))
        values = common | {"reward": reward, "prompts": str(folder / "prompts.jsonl"), "rollouts": 2, "prompts_per_step": rows}
        values |= {"max_new": ANSWER, "epochs_per_batch": 1, "missing_eos": None}
    load_policy(folder / "base")  # what imports and loading take once is not counted
    base = sum(f.stat().st_size for f in (folder / "base").glob("*.safetensors"))
    tokens = 0.0

    def run() -> None:
        nonlocal tokens
        for step in load(method).prepare(build(load(method).settings(method), values), Run(folder / "run")).steps(None):
            tokens = step.metrics["tokens"]

    found = machine.peak_of(run, torch.device("cpu"))
    return {"mb": (float("nan") if found is None else found - base) / 2**20, "tokens": tokens}


def main(size: str = "small") -> dict[str, dict[str, float]]:
    """Prints and returns what each way takes above one loaded base model."""
    with tempfile.TemporaryDirectory() as place:
        files(Path(place), size)
        found = {
            way: json.loads(subprocess.run([sys.executable, "-m", "bench.memory", place, way], capture_output=True, check=True).stdout)
            for way in WAYS
        }
    for way, x in found.items():
        share = x["mb"] / found[WAYS[0]]["mb"]
        print(f"{way:<18} {x['mb']:8.0f} MB above the loaded model at {x['tokens']:.0f} tokens, {share:.2f} x LoRA SFT")
    return found


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(peak(Path(sys.argv[1]), sys.argv[2])))
    else:
        main(*sys.argv[1:])
