"""Rollouts against transformers' `generate`: four answers to each prompt, greedy for the comparison, sampled for the clock."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.data import Setup, forward_flops
from bench.machine import Refused
from temper.forest import Segment, plant
from temper.rollout import Request, Sampling, sample

EACH = 4  # answers to a prompt
PAGE = 64  # tokens of a page of the cache, for continuous batching
TIE = 1e-4  # logits this near each other may be taken in either order


@dataclass(frozen=True)
class Generate:
    """Settings of `generate`. cache: dynamic, static or continuous (its own batching); prompts: at a time, those of like length
    together; 0 is all, as they come. cache vllm: vLLM's engine instead, in this process."""

    cache: str
    prompts: int = 0

    def __str__(self) -> str:
        if self.cache == "continuous":
            return "generate_batch (continuous batching)"
        if self.cache == "vllm":
            return "vLLM, LLM.generate with CUDA graphs"
        return f"generate, {self.cache} cache, {f'{self.prompts} prompts at a time, sorted by length' if self.prompts else 'all at once'}"


class Rollouts:
    name = "rollout"
    kernel: Literal["torch", "c"] = "torch"
    named: ClassVar = {"static": lambda how: how.cache == "static"}  # peers that get a row of their own beside the best

    def __init__(self, setup: Setup, each: int = EACH) -> None:
        self.setup, self.each = setup, each
        self.prompts = setup.prompts
        self.few = few = max(1, len(self.prompts) // 4)
        self.candidates = [
            *(Generate(cache, n) for cache in ("dynamic", "static") for n in sorted({few, 2 * few, len(self.prompts)})),
            Generate("continuous"),
            *([Generate("vllm")] if setup.device == "cuda" and find_spec("vllm") else []),
        ]
        self.default: Generate | None = Generate("dynamic")
        self.turn = 0

    def side(self, who: str, how: Generate) -> Callable[[], object]:
        """One of them alone, in a process of its own."""
        if who == "ours":
            model = self.setup.policy()
            return lambda: self.ours(model)
        plain = self.setup.plain(self.setup.policy())
        return lambda: self.peer(plain, how)

    def ours(self, model: Any, greedy: bool = False) -> list[list[int]]:
        """The answers' tokens, all of the first prompt first."""
        self.turn += 1
        how = Sampling(temperature=0.0 if greedy else 1.0, max_new=self.setup.scale.max_new, kernel=self.kernel)
        groups = sample(model, Request(self.prompts, sampling=how, stop=self.setup.stop, n=self.each, seed=("bench", self.turn)))
        return [answer.tokens for group in groups for answer in group]

    def peer(self, model: Any, how: Generate, greedy: bool = False) -> list[list[int]]:
        """The same by transformers."""
        self.turn += 1
        torch.manual_seed(self.turn)
        most = self.setup.scale.max_new
        if how.cache == "vllm":
            return vllm(_engine(str(self.setup.folder / "policy")), self.prompts, self.each, self.setup.stop, most, greedy, self.turn)
        return generate(model, self.prompts, how, each=self.each, stop=self.setup.stop, max_new=most, greedy=greedy)

    def compare(self, how: Generate) -> float:
        """Share of greedy answers that differ, all where two logits tie. Raises Refused for any that differs elsewhere."""
        ours, peer = self.setup.policy(), self.setup.plain(self.setup.policy())
        mine, theirs = self.ours(ours, greedy=True), self.peer(peer, how, greedy=True)
        different = 0
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if a == b:
                continue
            different += 1
            at = next((t for t, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            if at == min(len(a), len(b)):
                raise Refused(f"answer {k} has {len(a)} tokens of ours, {len(b)} of the peer")
            ids = torch.tensor([[*self.prompts[k // self.each], *a[:at]]], device=self.setup.device)
            with torch.inference_mode():
                logits = peer(ids).logits[0, -1].float()
            if float((logits[a[at]] - logits[b[at]]).abs()) > TIE:
                raise Refused(f"answer {k}: token {at} is {a[at]} of ours, {b[at]} of the peer")
        return different / len(mine)

    def flops(self) -> float:
        """Operations that one turn cannot do without: each prompt once, each sampled token once, the head for each."""
        model = self.setup.policy()
        answers = self.ours(model)
        trees = [
            [Segment(p), *(Segment(a[:-1], parent=0) for a in answers[i * self.each : (i + 1) * self.each] if len(a) > 1)]
            for i, p in enumerate(self.prompts)
        ]
        head = 2 * model.get_output_embeddings().weight.numel()
        return forward_flops(model, plant(trees)) + head * sum(map(len, answers))


class CompiledRollouts(Rollouts):
    """Ours with the attention of decoding compiled from C; against the peers that the search of `rollout` finds near each other."""

    name = "rollout-c"
    kernel = "c"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.candidates = [how for how in self.candidates if how.cache == "continuous" or (how.cache, how.prompts) == ("static", self.few)]
        self.default = None


def left_padded(rows: list[list[int]], pad: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) [R, L], each row at the right edge."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def generate(
    model: Any, prompts: list[list[int]], how: Generate, *, each: int, stop: list[int], max_new: int, greedy: bool
) -> list[list[int]]:
    """`each` answers to every prompt, in order, each up to the id that ended it."""
    pad = model.config.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new,
        do_sample=not greedy,
        top_k=0,
        eos_token_id=stop,
        pad_token_id=pad,
        num_return_sequences=1 if greedy else each,
    )
    if not greedy:
        config.temperature = 1.0
    if how.cache == "continuous":
        found = _continuous(model, prompts, config)
    else:
        if how.cache == "static":
            config.cache_implementation = "static"
        found = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i])) if how.prompts else list(range(len(prompts)))
        step = how.prompts or len(prompts)
        for at in range(0, len(order), step):
            chosen = order[at : at + step]
            ids, mask = left_padded([prompts[i] for i in chosen], pad, str(model.device))
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :].tolist()
            for k, i in enumerate(chosen):
                n = config.num_return_sequences
                found[i] = [_ended(row, stop) for row in out[k * n : (k + 1) * n]]
    return [answer for answers in found for answer in (answers * each if greedy else answers)]


def _continuous(model: Any, prompts: list[list[int]], config: GenerationConfig) -> list[list[list[int]]]:
    n = config.num_return_sequences or 1
    longest = max(map(len, prompts)) + config.max_new_tokens
    # room for all rows at once, said beforehand: by default it takes nine tenths of the free memory, and on a CPU the system kills it
    how = ContinuousBatchingConfig(page_size=PAGE, num_blocks=n * len(prompts) * (longest // PAGE + 2), max_batch_tokens=2048)
    results = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=how, progress_bar=False, warmup=model.device.type == "cuda"
    )
    answers = [list(result.generated_tokens) for result in results.values()]
    if len(answers) != n * len(prompts):
        raise RuntimeError(f"{len(answers)} of {n * len(prompts)} answers came back")
    return [answers[i : i + n] for i in range(0, len(answers), n)]


@cache
def _engine(folder: str) -> Any:
    """vLLM holding the model; half of the card's memory, for ours is in the same process."""
    from vllm import LLM

    return LLM(folder, dtype="float32", gpu_memory_utilization=0.5, enable_prefix_caching=True)


def vllm(engine: Any, prompts: list[list[int]], each: int, stop: list[int], max_new: int, greedy: bool, seed: int) -> list[list[int]]:
    """As `generate`."""
    from vllm import SamplingParams

    n = 1 if greedy else each
    how = SamplingParams(n=n, temperature=0.0 if greedy else 1.0, max_tokens=max_new, stop_token_ids=stop, seed=seed)
    out = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
    found = [[_ended(list(answer.token_ids), stop) for answer in one.outputs] for one in out]
    return [answer for answers in found for answer in (answers * each if greedy else answers)]


def _ended(row: list[int], stop: list[int]) -> list[int]:
    """Up to the first id that ends an answer, that one included."""
    return row[: next((t + 1 for t, token in enumerate(row) if token in stop), len(row))]
