"""What is measured on: records, a tokenizer trained on them, models of two sizes, and the trees of each method."""

import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from temper.data.sources import read
from temper.data.template import attach_default_template, stop_ids
from temper.data.trees import chat_trees, comparison_trees, prompt_ids
from temper.forest import Forest, Tree, plant
from temper.methods import sft
from temper.methods.base import Batching, Window
from temper.models.adapt import Adapter
from temper.models.adapters import adapted
from temper.models.fused import unfuse
from temper.models.load import Size, load_policy, load_scalar, load_tokenizer, new_model, save
from temper.models.tokenizer import train_tokenizer
from temper.records import Chat, Message, Pair, Prompt, Rated, write_jsonl
from temper.train import Optim

LONGEST = 512  # tokens of a row
RECORDS = 800
SEED = 0
# as the peers' defaults have it, but for the rate: Adam turns gradients near 0 into whole steps, so rounding grows with it
OPTIM = Optim(lr=1e-5, schedule="constant", warmup=0.0, beta2=0.999)
HARMLESS = "hh-harmless-base-test.jsonl.gz"


class Scale(NamedTuple):
    """A size of model, and how much it is given at a time."""

    size: Size
    vocabulary: int
    chats: int  # of an SFT step
    pairs: int  # of a DPO or reward step
    prompts: int  # of a rollout, 4 answers to each
    max_new: int
    start: int  # SFT steps before anything is measured, so that answers end about as the data's do


SCALES = {
    "tiny": Scale(Size(width=192, layers=4, heads=4, context=1024), 2048, 32, 16, 64, 128, 40),
    "small": Scale(Size(width=512, layers=8, heads=8, mlp=1344, context=1024), 8192, 16, 8, 16, 64, 20),
    "smoke": Scale(Size(width=32, layers=2, heads=2, context=1024), 512, 4, 4, 8, 24, 60),
}


def records(world: bool = False) -> tuple[list[Pair], str]:
    """Pairs of answers, and where they are from: HH dialogues in the folder TEMPER_TEST_DATA; else the embedded world's
    demonstrations, each answer against one to another question. world: these in any case."""
    path = Path(os.environ.get("TEMPER_TEST_DATA") or ".") / HARMLESS
    if path.is_file() and not world:
        return read(str(path), "pairs", skip_bad=True)[0][:RECORDS], "HH harmless-base"
    chats = read(f"world:demonstrations?n={RECORDS + 1}", "chat")[0]
    answers = [chat.messages[-1].content for chat in chats]
    return [
        Pair(prompt=chat.messages[:-1], chosen=good, rejected=bad)
        for chat, good, bad in zip(chats, answers, answers[1:], strict=False)
        if chat.messages[-1].role == "assistant" and good != bad
    ], "the embedded world"


def _chat(pair: Pair) -> Chat:
    return Chat(messages=[*pair.prompt, Message(role="assistant", content=pair.chosen)])


def make(name: str, folder: Path, pairs: list[Pair]) -> None:
    """Write the records, a policy that has seen a little SFT and a reward model with a new head into the folder."""
    scale = SCALES[name]
    texts = [m.content for pair in pairs for m in _chat(pair).messages] + [pair.rejected for pair in pairs]
    tokenizer = train_tokenizer(texts, scale.vocabulary, context=scale.size.context)
    attach_default_template(tokenizer)
    model = new_model(scale.size, scale.vocabulary, tokenizer, seed=SEED)
    window = Window(max_length=LONGEST, too_long="drop")
    long = comparison_trees(tokenizer, pairs, model, window)[1].dropped
    kept = [pair for i, pair in enumerate(pairs) if i not in long]
    if scale.start:
        trees = chat_trees(tokenizer, [_chat(pair) for pair in kept], model, window)[0][: scale.start * scale.chats]
        batching = Batching(batch=scale.chats, epochs=scale.start * scale.chats / len(trees), seed=SEED)
        settings = sft.SFT(model="", data="", batching=batching, optim=Optim(lr=1e-3, schedule="constant", warmup=0.2))
        for _ in sft.train(settings, model, trees):
            pass
    write_jsonl(folder / "pairs.jsonl", kept)
    save(model, tokenizer, folder / "policy", stop=stop_ids(tokenizer))
    reward, _ = load_scalar(str(folder / "policy"), seed=SEED)
    save(reward, tokenizer, folder / "reward")


class Setup:
    """What `make` wrote, read back; every row and every process of its own begins here."""

    def __init__(self, name: str, folder: str | Path, device: str = "cpu") -> None:
        self.name, self.folder, self.device = name, Path(folder), device
        self.scale = SCALES[name]
        self.window = Window(max_length=LONGEST, too_long="drop")
        self.tokenizer = load_tokenizer(self.folder / "policy")
        self.pairs: list[Any] = read(str(self.folder / "pairs.jsonl"), "pairs")[0]

    def policy(self, adapters: Adapter | None = None) -> Any:
        return load_policy(self.folder / "policy", self.device, adapters=adapters, seed=SEED)[0]

    def scorer(self) -> Any:
        return load_scalar(self.folder / "reward", self.device)[0]

    def plain(self, model: Any) -> Any:
        """The same model as transformers alone would run it."""
        unfuse(model)
        model.set_attn_implementation("sdpa")
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    @cached_property
    def stop(self) -> list[int]:
        return stop_ids(self.tokenizer)

    @cached_property
    def chat_trees(self) -> list[Tree]:
        return chat_trees(self.tokenizer, [_chat(pair) for pair in self.pairs], LONGEST, self.window)[0]

    def pair_trees(self) -> list[Tree]:
        """Made anew each time: reference log-probs are written onto them."""
        return comparison_trees(self.tokenizer, self.pairs, LONGEST, self.window)[0]

    @cached_property
    def thumbs(self) -> list[Rated]:
        """Of each pair one answer: the chosen with a thumb up, of the next pair the rejected with a thumb down, and so on."""
        return [
            Rated(prompt=pair.prompt, answer=pair.rejected if i % 2 else pair.chosen, rating=float(i % 2 == 0))
            for i, pair in enumerate(self.pairs)
        ]

    def thumb_trees(self) -> list[Tree]:
        """Made anew each time, as those of pairs."""
        return comparison_trees(self.tokenizer, self.thumbs, LONGEST, self.window)[0]

    @cached_property
    def asked(self) -> list[Prompt]:
        """The first prompts that leave room for an answer."""
        every = [Prompt(messages=pair.prompt) for pair in self.pairs]
        dropped = prompt_ids(self.tokenizer, every, LONGEST, self.window, room=self.scale.max_new)[1].dropped
        return [prompt for i, prompt in enumerate(every) if i not in dropped][: self.scale.prompts]

    @cached_property
    def prompts(self) -> list[list[int]]:
        return prompt_ids(self.tokenizer, self.asked, LONGEST, self.window, room=self.scale.max_new)[0]


def training_flops(model: Any, trees: list[Tree], learned: int | None = None) -> float:
    """Floating-point operations that a step on these trees cannot do without: products of weights and of attention, forward, and backward
    to their inputs and to the weights that learn, each shared prompt once; the head on learned tokens, or on `learned` of them."""
    forest = plant(trees)
    head = model.get_output_embeddings() or model.score
    products = [(m.weight, forest.T) for m in _linear(model)] + [(head.weight, len(forest.learned) if learned is None else learned)]
    return 3 * _attention_flops(model, forest) + sum((6 if w.requires_grad else 4) * w.numel() * n for w, n in products)


def forward_flops(model: Any, forest: Forest) -> float:
    """Of the trunk, once over the forest."""
    return 2 * sum(m.weight.numel() for m in _linear(model)) * forest.T + _attention_flops(model, forest)


def _linear(model: Any) -> list[torch.nn.Linear]:
    """Of the trunk, adapters included."""
    trunk = (model.get_base_model() if adapted(model) else model).base_model
    return [m for m in trunk.modules() if isinstance(m, torch.nn.Linear)]


def _attention_flops(model: Any, forest: Forest) -> float:
    seen = float((forest.position + 1).sum())  # pairs of a token and one that it sees
    return 4 * model.config.num_hidden_layers * model.config.hidden_size * seen
