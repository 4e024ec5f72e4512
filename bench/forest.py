"""Side by side on one machine: pairs as a forest against padded rows, and rollouts against transformers' `generate`.

    python bench/forest.py            a tiny (1M) and a small (8M) model, one thread; writes bench/results.json
    python bench/forest.py --smoke    equality only, in seconds

Both sides do the same work on the same model in turn, after warm-up; losses (or greedy tokens) are compared first and the row is
refused when they differ. Figures are medians of nine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from temper.forest import Segment, per_segment, plant
from temper.models.heads import token_logp
from temper.models.load import Size, new_model
from temper.rollout import Sampling, sample
from temper.rollout.engine import plain_attention

SIZES = {"tiny": Size(width=128, layers=4, heads=4), "small": Size(width=256, layers=8, heads=8)}
PAIRS, PROMPT, ANSWERS = 16, 120, (60, 80)


def median(run, times: int) -> tuple[float, float, float]:
    """Median, least and most seconds of `run`, after one run that does not count."""
    run()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), min(seconds), max(seconds)


def pairs(model, vocab: int, times: int) -> dict:
    """Forward and backward of the answers' log-probs: the prompt once per pair, against padded rows of prompt and answer."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(6, vocab, (n,), generator=generator).tolist()  # noqa: E731
    items = [(draw(PROMPT), draw(ANSWERS[0]), draw(ANSWERS[1])) for _ in range(PAIRS)]
    forest = plant([[Segment(p, [0.0] * PROMPT), *(Segment(a, [1.0] * len(a), parent=0) for a in two)] for p, *two in items])
    rows = [p + a for p, *two in items for a in two]
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    learned = mask.clone()
    learned[:, :PROMPT] = 0

    def ours():
        model.zero_grad()
        token = torch.zeros(forest.T).index_put((forest.learned,), token_logp(model, forest))
        logp = per_segment(token, forest)[forest.parent >= 0]
        (-logp.sum()).backward()
        return logp.detach()

    def peer():
        model.zero_grad()
        with plain_attention(model):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        token = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        logp = (token * learned[:, 1:]).sum(-1)
        (-logp.sum()).backward()
        return logp.detach()

    gap = float((ours() - peer()).abs().max())
    if gap > 1e-2:
        raise SystemExit(f"pairs: the two sides differ by {gap:.2g} nats; not measured")
    return {"name": "dpo", "unit": "s", "gap": gap, "peer_settings": "padded rows, sdpa, full logits", **_ratio(ours, peer, times)}


def rollouts(model, vocab: int, times: int) -> dict:
    """Greedy answers to 32 prompts, 4 each: ours, against `generate` with its default cache."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(6, vocab, (40,), generator=generator).tolist() for _ in range(32)]
    how = Sampling(temperature=0.0, max_new=48)

    def ours():
        return [a.tokens for group in sample(model, prompts, sampling=how, stop=[1], n=4) for a in group]

    def peer():
        ids = torch.tensor(prompts).repeat_interleave(4, 0)
        with plain_attention(model), torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False, pad_token_id=0, eos_token_id=1
            )
        return out[:, 40:].tolist()

    same = sum(a == b[: len(a)] for a, b in zip(ours(), peer(), strict=True)) / 128
    if same < 0.99:
        raise SystemExit(f"rollouts: only {same:.0%} of the greedy answers agree; not measured")
    return {"name": "rollout", "unit": "s", "gap": 1 - same, "peer_settings": "generate, dynamic cache", **_ratio(ours, peer, times)}


def _ratio(ours, peer, times: int) -> dict:
    if not times:
        return {}
    (a, a_low, a_high), (b, b_low, b_high) = median(ours, times), median(peer, times)
    return {"ours": a, "peer": b, "ratio": b / a, "ratio_low": b_low / a_high, "ratio_high": b_high / a_low}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="compare results, measure nothing")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for name, size in list(SIZES.items())[: 1 if args.smoke else None]:
        vocab = 2048
        model = new_model(size, vocab, seed=0)
        for measure in pairs, rollouts:
            rows.append({"model": name, "against": "default", **measure(model, vocab, 0 if args.smoke else 9)})
            print(json.dumps(rows[-1]))
    if not args.smoke:
        Path(__file__).with_name("results.json").write_text(
            json.dumps({"threads": args.threads, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
