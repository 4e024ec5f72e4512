"""What PPO and GRPO share: prompts -> sampled answers -> rewards -> forests with columns, as a source of batches. Floor 5.

A rollout is made of groups: a prompt and its answers under it. Its forests, with all that was written down about them (columns), are in the
checkpoint: current weights cannot make an old rollout again.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from temper.forest import Forest
from temper.judges.rating import Answer
from temper.methods.rated import Sampled, dead, extremes, own, planted, rate, summary, trees_of
from temper.methods.start import Ready
from temper.models.heads import slack, token_logp
from temper.rollout import Request, generator, sample
from temper.train import TrainingError, ranks

CUT = 0.5  # share of answers cut off at --max-new from which on it is announced
HOPELESS = 200  # answers in a row of which none ended: fewer than 1.5% would, at 95% (3 / n)
ERRORS = 4  # standard errors that a mean KL may lie below 0


class Rollouts:
    """The source: step -> micro-batches. Samples anew whenever the last rollout is used up; that one is part of the state.

    A method says what is measured of the answers' tokens, and which columns follow from it.
    """

    name = ""
    dynamic = 0  # rounds of sampling more, while groups are dead

    def __init__(self, settings: Any, module: Any, given: Ready) -> None:
        self.settings, self.module, self.given, self.reference = settings, module, given, given.reference
        self.pending: list[list[Forest]] = []  # one list of micro-batches per minibatch
        self.last: dict[str, float] = {}
        self.at = 0  # prompts sampled from so far
        self.endless = 0  # answers since the last rollout in which one ended
        self.said: list[str] = []  # what was announced
        self.why = ""  # an answer could not be rated
        self.new: list[dict[str, Any]] = []  # what is to be, with the next step
        self.sampler: Any = module["policy"]
        if settings.plan.vllm:
            from temper.rollout.vllm import VLLM

            self.sampler = VLLM(settings.plan.vllm, module["policy"])

    def measure(self, forest: Forest, at: Tensor) -> dict[str, Tensor]:
        """[len(at)] each, of the answers' tokens `at`: ref_logp, and what else the columns need."""
        return {"ref_logp": token_logp(self.reference, forest, temperature=self.settings.sampling.temperature, indices=at)}

    def columns(self, answers: Sequence[Sampled]) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
        """(what the loss needs of each answer beside ref_logp and old_logp, [T] by name; further metrics). answers: measured."""
        raise NotImplementedError

    def normalised(self, rated: list[float]) -> list[float]:
        """The ratings of a rollout, on the scale that is learned from."""
        return rated

    def target(self, length: int) -> float:
        """The weight of each token of an answer of that length."""
        return 1.0

    def __call__(self, step: int) -> list[Forest]:
        plan = self.settings.plan
        rollout, inner = divmod(step, plan.updates)
        if inner == 0:
            self.pending = self._roll(rollout)
        epoch, k = divmod(inner, plan.minibatches)
        order = generator(f"{self.name} order", self.settings.seed, rollout, epoch).permutation(plan.minibatches)
        minibatch = self.pending[order[k]]
        return [minibatch[i] for i in ranks.share([forest.T for forest in minibatch])]

    def reads(self, step: int) -> bool:
        """Whether it samples before this step."""
        return step % self.settings.plan.updates == 0

    def metrics(self, step: int) -> dict[str, float]:
        """Of the rollout that the last step learned from."""
        return self.last

    def events(self, step: int) -> list[dict[str, Any]]:
        """The most and the least rewarded answers of a new rollout, and what it was the first to show."""
        new, self.new = self.new, []
        return new

    def state(self) -> dict[str, Any]:
        own = {"at": self.at, "last": self.last, "endless": self.endless, "said": list(self.said)}
        return own | {"pending": [[f.tensors() for f in minibatch] for minibatch in self.pending]}

    def restore(self, state: dict[str, Any]) -> None:
        self.at, self.last, self.endless, self.said = state["at"], state["last"], state["endless"], list(state["said"])
        self.pending = [[Forest.from_tensors(f) for f in minibatch] for minibatch in state["pending"]]

    def _roll(self, rollout: int) -> list[list[Forest]]:
        plan = self.settings.plan
        groups, sampled = self._collect(rollout)
        answers = [answer for group in groups for answer in group]
        borders = [len(groups) * k // plan.minibatches for k in range(plan.minibatches + 1)]
        trees = trees_of(groups, self.target)
        pending = [planted(trees[a:b], self.settings.tokens_per_microbatch) for a, b in pairwise(borders)]
        for minibatch in pending:
            if not any(forest.weights["answers"] for forest in minibatch):  # all left out: a step without effect
                minibatch[0].weights |= {"tokens": 1.0, "answers": 1.0}
        answers, more = self._annotate([forest for minibatch in pending for forest in minibatch], answers)
        self.last = summary(answers, sampled) | more | ({"asked": len(sampled) / len(groups)} if self.dynamic else {})
        self._guard(answers)
        self.new.append({"event": "rewarded", "rollout": rollout + 1, **extremes(answers)})
        return pending

    def _collect(self, rollout: int) -> tuple[list[list[Sampled]], list[list[Sampled]]]:
        """(the groups to learn from, all that were sampled). Dynamic sampling replaces dead ones (arXiv:2503.14476, sec. 3.2)."""
        plan = self.settings.plan
        if plan.vllm:
            with ranks.leader_first():
                if ranks.rank() == 0:
                    self.sampler.sync(self.given.tokenizer, plan.vllm_folder)
        taken: list[list[Sampled]] = []
        sampled: list[list[Sampled]] = []
        for turn in range(1 + self.dynamic):
            fresh = self._sample(plan.prompts_per_step - len(taken), rollout, turn)
            sampled += fresh
            taken += [group for group in fresh if not self.dynamic or not dead(group)]
            if len(taken) == plan.prompts_per_step:
                break
        taken += [group for group in sampled if dead(group)][: max(0, plan.minibatches - len(taken))] if self.dynamic else []
        for k, group in enumerate(taken):
            for answer in group:
                answer.group = k
        return taken, sampled

    def _sample(self, many: int, rollout: int, turn: int) -> list[list[Sampled]]:
        """The groups of the next prompts, with their rewards."""
        s, given, n = self.settings, self.given, self.settings.plan.samples_per_prompt
        chosen = [given.prompts.order.rows(1, self.at + k)[0] for k in range(many)]
        self.at += many
        ids = [given.prompts.ids[i] for i in chosen]
        mine = ranks.share([len(x) for x in ids])
        key = (self.name, s.seed, rollout, *([turn] if turn else []))
        asked = [ids[k] for k in mine]
        drawn = sample(self.sampler, Request(asked, sampling=s.sampling, stop=given.stop, n=n, seed=key, index=mine))
        answers = []
        for k, group in zip(mine, drawn, strict=True):
            record = given.prompts.records[chosen[k]]
            for a in group:
                text = given.tokenizer.decode(a.tokens, skip_special_tokens=True).strip()
                answer = Answer(record, ids[k], a.tokens, text, a.finish == "stop")
                answers.append(Sampled(answer, torch.tensor(a.logp)))
        self.why = rate(answers, given.reward, given.steps) or self.why
        groups = ranks.whole(mine, [answers[i : i + n] for i in range(0, len(answers), n)])
        self._reward([answer for group in groups for answer in group])
        return groups

    def _reward(self, answers: Sequence[Sampled]) -> None:
        ending, most = self.settings.ending, self.settings.sampling.max_new
        rated = [(a, a.rated) for a in answers if a.rated is not None]
        for (a, _), score in zip(rated, self.normalised([score for _, score in rated]), strict=True):
            a.reward = ending.of(score, len(a.answer.tokens), a.answer.ended, most)
            a.learned = a.answer.ended or ending.truncated == "learn"

    def _annotate(self, forests: Sequence[Forest], answers: Sequence[Sampled]) -> tuple[list[Sampled], dict[str, float]]:
        """Writes the forests' columns; the answers in the forests' order, and the method's metrics."""
        mine = ranks.share([forest.T for forest in forests])
        measured = ranks.whole(mine, [self._measure(forests[i]) for i in mine])
        inside = [[answers[int(row)] for row in forest.columns["row"] if row >= 0] for forest in forests]
        for group, parts in zip(inside, measured, strict=True):
            for name, x in parts.items():
                for answer, part in zip(group, x.split([len(a.answer.tokens) for a in group]), strict=True):
                    answer.found[name] = part
        ordered = [answer for group in inside for answer in group]
        found, more = self.columns(ordered)
        columns = iter(found)
        for forest, group in zip(forests, inside, strict=True):
            written = [{"old_logp": a.logp, "ref_logp": a.found["ref_logp"], **next(columns)} for a in group]
            for name in written[0]:
                x = torch.cat([one[name] for one in written]).float()
                forest.columns[name] = torch.zeros(forest.T).index_put((own(forest),), x)
        return ordered, more

    @torch.no_grad()
    def _measure(self, forest: Forest) -> dict[str, Tensor]:
        forest = forest.to(self.reference.device)
        return {name: x.cpu() for name, x in self.measure(forest, own(forest)).items()}

    def _guard(self, answers: Sequence[Sampled]) -> None:
        """Announces what makes a rollout worth little; stops where so many answers in a row were cut off that none will ever end."""
        s, m, rater = self.settings, self.last, self.given.reward.name
        self.endless = self.endless + len(answers) if m["truncated"] == 1 else 0
        advice = f"raise --max-new (now {s.sampling.max_new}), or look whether the model learned its end token in --model {s.model}"
        if not any(a.learned for a in answers) and m["unrated"] == 1:
            raise TrainingError(f"{rater}: rated none of the {len(answers)} answers of a rollout; {self.why or 'try it on some by hand'}")
        if (s.ending.missing_eos is not None or s.ending.truncated == "mask") and self.endless >= HOPELESS:
            raise TrainingError(f"none of {self.endless} answers in a row ended: there is nothing to learn from their scores; {advice}")
        if m["truncated"] > CUT:
            self._announce("answers cut off", f"{m['truncated']:.0%} of the answers did not end within --max-new; {advice}")
        if m["unrated"] > 0:
            self._announce("answers without a rating", f"{rater} gave {m['unrated']:.0%} of them none, and they are left out; {self.why}")
        if m.get("dead") == 1:
            alike = f"the answers to each prompt are rated alike (mean {m['reward']:.3g}), so comparing them teaches nothing"
            remedy = "take prompts that this model solves sometimes, more --samples-per-prompt, or a finer --reward"
            self._announce("rewards all alike", f"{alike}; {remedy}")
        if m["kl"] < -ERRORS * m["kl_error"] - slack(self.reference, 1e-3, 0.5):
            found = f"the KL to the reference is estimated at {m['kl']:.3g} +- {m['kl_error']:.2g} nats, below 0"
            self._announce(
                "negative KL",
                f"{found}: the answers are not drawn from the policy that is trained; look at sampler_gap, and at what samples",
            )

    def _announce(self, event: str, note: str) -> None:
        if event not in self.said:
            self.said.append(event)
            self.new.append({"event": event, "note": note})
