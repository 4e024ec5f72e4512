"""Constitutional AI: a model criticises and revises its own answers by written principles, then judges pairs of them. Floor 5.

arXiv:2212.08073. (1) On red-team prompts the model answers, criticises its answer by a principle drawn at random and revises it, as
often as `revisions` says; it is then fine-tuned on the revisions of every round and on its own answers to helpful prompts. The
critique is never part of what is learned. (2) The fine-tuned model answers each prompt several times; the model as it was before compares
two answers, in both orders (arXiv:2309.00267), on red-team prompts under principles about harm, on the others under those about help,
which keeps it from refusing without need; the label is the probability of the option's
letter, soft and unclamped; preference training (DPO) follows, with human comparisons of helpfulness in the mix.
Deviations: (1) starts from the SFT model, not the base; (2) trains by DPO where the paper trained a preference model and used RL.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from temper.config import Settings, UserError, opt
from temper.data.sources import Report
from temper.data.store import mixed
from temper.data.template import chat_template, render_prompt, stop_ids
from temper.data.trees import chat_trees, comparison_trees, limit_of
from temper.forest import Segment, Tree
from temper.methods import preference, sft
from temper.methods.base import Batching, Corpus, Job, Prepared, Window, asked, forests, left_out, list_left_out, numbered
from temper.models.adapt import Adapter, hold
from temper.models.heads import token_logp
from temper.models.load import export, load_policy, restore, save
from temper.records import Chat, Message, Pair, read_jsonl, write_jsonl
from temper.rollout import Request, Sampling, generator, sample
from temper.runs import Run
from temper.train import Compute, Optim, State, Step, ranks
from temper.world.constitution import DEFAULT, Constitution, load

METRICS = {
    **sft.METRICS,
    **{f"{name}": text for name, text in preference.METRICS.items() if name != "loss"},
    "phase": "1: revisions, 2: AI preferences",
}
USED = ("harm", "help")  # what principles may be about: harm for red-team prompts, help for helpful ones; the rest is announced
EXAMPLES = """
  temper constitution --model runs/sft --red-team redteam.jsonl --helpful prompts.jsonl --out runs/constitution
  temper constitution --model runs/sft --red-team redteam.jsonl --helpful prompts.jsonl --principles mine.yaml --out runs/mine
"""


class Phase1(Settings):
    """Fine-tuning on revisions."""

    sl_epochs: float = opt(2.0, "passes over revisions and helpful answers", gt=0)
    sl_lr: float = opt(3e-4, "peak learning rate of that", gt=0)


class CAI(Settings):
    """Make a model harmless by a constitution, with no human label of harm."""

    model: str = opt(..., "the helpful model: it answers, criticises, revises and judges")
    red_team: str = opt(..., "prompts that ask for harm")
    helpful: str = opt(..., "ordinary prompts, which keep the model from turning evasive; those of the red team are left out")
    helpful_pairs: str | None = opt(
        None,
        "human comparisons of helpfulness for the second phase, as many as red-team prompts; those on such prompts are left out",
    )
    principles: str | None = opt(None, "the constitution, a YAML file; default: the harbour's")
    revisions: int = opt(1, "rounds of critique and revision", ge=1)
    judged_by: int = opt(3, "principles drawn for each comparison", ge=1)
    beta: float = opt(0.1, "pull to the fine-tuned model in the second phase", gt=0)
    sampling: Sampling = Sampling()
    window: Window = Window()
    phase1: Phase1 = Phase1()
    batching: Batching = Batching()
    optim: Optim = Optim(lr=1e-4, schedule="cosine", warmup=0.1)
    compute: Compute = Compute()
    adapters: Adapter = Adapter()


def settings(name: str) -> type[Settings]:
    return CAI


def principles(path: str | Path) -> dict[str, Constitution]:
    """The constitution's principles by what they are about: harm, honesty, help. Each speaks of its own prompts: on red-team prompts
    "do not refuse without need" would speak against "do no harm".

    Raises UserError naming the file and what is wrong in it.
    """
    try:
        constitution = load(path)
    except (OSError, ValueError) as e:
        raise UserError(str(e)) from None
    found = {p.about: tuple(q for q in constitution.principles if q.about == p.about) for p in constitution.principles}
    if "harm" not in found:
        raise UserError(f"{path}: no principle says `about: harm`; red-team answers are criticised by those")
    return {about: constitution._replace(principles=some) for about, some in found.items()}


@dataclass
class Author:
    """A model that is asked: what every phase needs to answer, criticise, revise and judge."""

    model: Any
    tokenizer: Any
    s: CAI

    def answers(self, conversations: Sequence[list[Message]], purpose: int, n: int = 1) -> list[list[str]]:
        """n answers to each conversation; `purpose` keeps the random numbers of different requests apart.

        Those that did not end are '', and so are those to a conversation that leaves no room for an answer.
        """
        ids = [render_prompt(self.tokenizer, c) for c in conversations]
        fits = [i for i, x in enumerate(ids) if self.room(len(x) + self.s.sampling.max_new)]
        seed, out = ("constitution", self.s.batching.seed, purpose), [[""] * n for _ in ids]
        groups = sample(
            self.model, Request([ids[i] for i in fits], sampling=self.s.sampling, stop=stop_ids(self.tokenizer), n=n, seed=seed)
        )
        for i, group in zip(fits, groups, strict=True):
            out[i] = [self.tokenizer.decode(a.tokens, skip_special_tokens=True).strip() if a.finish == "stop" else "" for a in group]
        return out

    def room(self, tokens: int) -> bool:
        """Whether so many tokens are within the model's window."""
        window, _ = limit_of(self.model, None)
        return window is None or tokens <= window

    def preference(
        self, constitution: Constitution, questions: Sequence[str], pairs: Sequence[tuple[str, str]], purpose: int
    ) -> list[float | None]:
        """P(the first answer is better): the letter's probability among the two, averaged over both orders and drawn principles.

        None where a comparison is longer than the model's window.
        """
        letters = single_letters(self.tokenizer)
        rng = _rng(self.s.batching.seed, purpose)
        trees: list[Tree] = []
        asked: list[list[int]] = []  # of each pair its trees, those of one order and the other by turns
        for question, (a, b) in zip(questions, pairs, strict=True):
            heads = []
            for k in rng.permutation(len(constitution.principles))[: self.s.judged_by]:
                for first, second in (a, b), (b, a):
                    text = constitution.comparison(question, first, second, constitution.principles[k])
                    heads.append(render_prompt(self.tokenizer, [Message(role="user", content=text)]))
            here = heads if all(self.room(len(ids) + 1) for ids in heads) else []
            asked.append(list(range(len(trees), len(trees) + len(here))))
            trees += [[Segment(ids, [0.0] * len(ids)), *(Segment(x, [1.0], parent=0) for x in letters)] for ids in here]
        first_letter = torch.zeros(len(trees))
        with torch.no_grad():
            for index, forest in forests(trees, self.s.batching.tokens_per_microbatch, device=self.model.device):
                first_letter[index] = token_logp(self.model, forest).view(-1, 2).softmax(-1)[:, 0].cpu()
        for_a = torch.where(torch.arange(len(trees)) % 2 == 0, first_letter, 1 - first_letter)
        return [float(for_a[here].mean()) if here else None for here in asked]


def single_letters(tokenizer: Any) -> list[list[int]]:
    """The token of A and that of B. Raises UserError when a letter takes more than one."""
    letters = [tokenizer.encode(x, add_special_tokens=False) for x in "AB"]
    if any(len(x) != 1 for x in letters):
        raise UserError("the tokenizer has no single tokens for A and B, which the answer to a comparison must begin with")
    return letters


def _rng(seed: int, purpose: int) -> np.random.Generator:
    return generator("constitution choice", seed, purpose)


def revise(author: Author, constitution: Constitution, prompts: Sequence[list[Message]]) -> list[Chat]:
    """Answer, criticise, revise; again. One record per prompt and round whose revision ended; meta keeps the whole exchange."""
    rng = _rng(author.s.batching.seed, 0)
    current = [a for (a,) in author.answers(prompts, purpose=1)]
    out = []
    for r in range(author.s.revisions):
        drawn = [constitution.principles[k] for k in rng.integers(len(constitution.principles), size=len(prompts))]
        live = [i for i, a in enumerate(current) if a]
        asked = [
            [*prompts[i], Message(role="assistant", content=current[i]), Message(role="user", content=drawn[i].critique)] for i in live
        ]
        critiques = [c for (c,) in author.answers(asked, purpose=2 + 2 * r)]
        asked = [
            [*talk, Message(role="assistant", content=c), Message(role="user", content=drawn[i].revision)]
            for i, talk, c in zip(live, asked, critiques, strict=True)
        ]
        revised = [a for (a,) in author.answers(asked, purpose=3 + 2 * r)]
        for i, c, new in zip(live, critiques, revised, strict=True):
            if c and new:
                meta = {"answer": current[i], "principle": drawn[i].name, "critique": c, "round": r + 1}
                out.append(Chat(messages=[*prompts[i], Message(role="assistant", content=new)], meta=meta))
            current[i] = new
    return out


def differing(answers: list[str]) -> tuple[str, str] | None:
    """The first answer and the first that is not the same."""
    return next(((answers[0], other) for other in answers[1:] if other != answers[0]), None)


def compare(author: Author, judge: Author, constitution: Constitution, prompts: Sequence[list[Message]], purpose: int) -> list[Pair]:
    """Pairs of the author's answers with the judge's soft labels: chosen is the likelier, soft its probability."""
    groups = author.answers(prompts, purpose, n=4)
    asked = [(p, two) for p, g in zip(prompts, groups, strict=True) if (two := differing([a for a in g if a] or [""]))]
    questions = ["\n".join(m.content for m in p) for p, _ in asked]
    chance = judge.preference(constitution, questions, [two for _, two in asked], purpose + 1)
    return [
        Pair(prompt=p, chosen=a if x >= 0.5 else b, rejected=b if x >= 0.5 else a, soft=max(x, 1 - x))
        for (p, (a, b)), x in zip(asked, chance, strict=True)
        if x is not None
    ]


class Inputs(NamedTuple):
    """What the model is asked, and human comparisons for the second phase."""

    red_team: list[list[Message]]
    helpful: list[list[Message]]
    human: list[Pair]
    left_out: str


def read_inputs(s: CAI, model: Any, tokenizer: Any, run: Run) -> Inputs:
    """All files, before anything is computed: a mistake in one must not come up after the first phase. What they leave out is listed."""
    left: list[dict[str, str]] = []

    def prompts(spec: str) -> list[list[Message]]:
        found = asked(spec, run, tokenizer, model, s.window, room=s.sampling.max_new, seed=s.batching.seed)
        left.extend(found.left)
        return [r.messages for r in found.every()[0]]

    red_team = prompts(s.red_team)
    dangerous = {p[-1].content for p in red_team}
    helpful = [p for p in prompts(s.helpful) if p[-1].content not in dangerous]
    human: list[Pair] = []
    if s.helpful_pairs:
        found = mixed(s.helpful_pairs, "pairs", s.window.skip_bad, s.batching.seed)
        human = [p for p in found.records if p.prompt[-1].content not in dangerous][: len(red_team)]
        left += left_out([found.report], [comparison_trees(tokenizer, human, model, s.window)[1]])
    return Inputs(red_team, helpful, human, list_left_out(run, left))


def demonstrations(s: CAI, run: Run, author: Author, harm: Constitution, red_team: list, helpful: list) -> list[Chat]:
    """What the first phase learns: revisions of the answers to the red team, and the model's own answers to helpful prompts."""
    with ranks.leader_first():
        revised, kept = run.file("revisions.jsonl"), run.file("helpful.jsonl")
        if not kept.exists():  # written after revisions.jsonl, so it stands for both
            write_jsonl(revised, revise(author, harm, red_team))
            own = zip(helpful, author.answers(helpful, purpose=500), strict=True)
            write_jsonl(kept, [Chat(messages=[*p, Message(role="assistant", content=a)]) for p, (a,) in own if a])
    chats = [*read_jsonl(revised, Chat), *read_jsonl(kept, Chat)]
    if not chats:
        raise UserError(
            f"{s.model}: no answer to the prompts ended within --max-new {s.sampling.max_new}; raise it, or fine-tune the model more"
        )
    return chats


def prepare(settings: CAI, run: Run) -> Job:
    s, b = settings, settings.batching
    rules = principles(s.principles or DEFAULT)
    model, tokenizer = load_policy(s.model, **s.compute.placed, adapters=s.adapters, seed=b.seed)
    chat_template(tokenizer)  # a base model has none: looked at before it is asked anything
    judge, _ = load_policy(s.model, **s.compute.placed)
    author, judging = Author(model, tokenizer, s), Author(judge, tokenizer, s)
    red_team, helpful, human, left = read_inputs(s, model, tokenizer, run)
    single_letters(tokenizer)
    chats = demonstrations(s, run, author, rules["harm"], red_team, helpful)
    trees, cut = chat_trees(tokenizer, chats, model, s.window, learn="last")
    revising = b.model_copy(update={"epochs": s.phase1.sl_epochs})
    first = revising.steps(len(trees))
    second = b.steps(len(red_team) + len(helpful) + len(human))

    def phase1(resume: State | None) -> Iterator[Step]:
        optim = s.optim.model_copy(update={"lr": s.phase1.sl_lr})
        return sft.train_on(model, trees, revising, optim, resume, s.compute)

    def phase2(resume: State | None) -> Iterator[Step]:
        with ranks.leader_first():
            tuned, labelled = run.file("revised"), run.file("ai_pairs.jsonl")
            if resume is not None:
                restore(model, tuned)
            elif ranks.rank() == 0:
                save(model, tokenizer, tuned)
                labelled.unlink(missing_ok=True)
            if not labelled.exists():
                labels = compare(author, judging, rules["harm"], red_team, purpose=1000)
                labels += compare(author, judging, rules["help"], helpful, purpose=2000) if "help" in rules else []
                write_jsonl(labelled, labels)
        pairs = read_jsonl(labelled, Pair)
        pairs += human[: len(pairs)]
        if not pairs:
            raise UserError(f"{s.red_team}: no prompt got two different answers that could be compared; raise --temperature or --max-new")
        answer_trees, _ = comparison_trees(tokenizer, pairs, model, s.window)
        hold(model)
        preference.with_reference(model, answer_trees, b.tokens_per_microbatch, preference.references(run))
        return preference.train_on(model, answer_trees, "dpo", {"beta": s.beta}, b, s.optim, second, resume, s.compute)

    def steps(resume: State | None) -> Iterator[Step]:
        phase = resume["phase"] if resume else 1
        if phase == 1:
            yield from numbered(phase1(resume["state"] if resume else None), 1, 0)
            resume = None
        yield from numbered(phase2(resume["state"] if resume else None), 2, first)

    return Job(
        total=first + second,
        steps=steps,
        save=lambda path: export(model, tokenizer, path, stop=stop_ids(tokenizer)),
        card={
            "red_team": len(red_team),
            "helpful": len(helpful),
            "records": len(chats),
            "left_out": left,
            "principles": [p.name for about, rule in rules.items() if about in USED for p in rule.principles],
        },
        notes=[
            f"principle {p.name} is about {about}: not used (critiques and revisions are about harm, comparisons about harm and help)"
            for about, rule in rules.items()
            if about not in USED
            for p in rule.principles
        ],
        policy=(model, tokenizer),
        asks=[*red_team[:2], *helpful[:2]],
        prepared=Prepared(Corpus(chats, trees, Report(s.red_team), cut), tokenizer, model, sft.lm_loss),
    )
