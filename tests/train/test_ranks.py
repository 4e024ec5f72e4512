"""Several ranks train one model: the same losses and weights as one rank, the same errors on all, nothing done twice."""

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fit import PLAIN, Bigram, Scale, documents, nll, weighing
from torch import nn
from toy import QUESTIONS, flags, result, train, user, values_of, write

from temper.config import UserError, build
from temper.forest import Forest, plant
from temper.methods import load
from temper.models.load import load_policy
from temper.records import Ranked, read_jsonl
from temper.runs import Run, load_checkpoint, save_checkpoint, spread_tensors
from temper.train import Compute, TrainingError, fit, machine, ranks, shard
from temper.train.fit import TIMINGS, Loss, Term

LIMIT = 300.0  # seconds after which ranks are taken to wait for each other for ever
STRAGGLE = 20.0  # the same, after the other rank has ended
LEFT_OUT = {*TIMINGS, "sampler_gap", "sampler_gap_most"}  # the latter is rounding and nothing else


# ---------------------------------------------------------------- two processes that do what they are told


def _serve(pipe, rank, address):
    """Becomes a rank, and does what comes through the pipe until it is closed."""
    torch.set_num_threads(1)
    ranks.join(rank, 2, address)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        try:
            answer = ("done", function(*args))
        except Exception as error:
            answer = ("failed", (type(error), str(error), traceback.format_exc()))
        pipe.send_bytes(pickle.dumps(answer))
    ranks.leave()


class Two:
    """Two ranks, started when they are first needed, and again after they had to be ended."""

    def __init__(self, factory):
        self.factory, self.processes, self.pipes = factory, [], []

    def start(self):
        context = multiprocessing.get_context("spawn")
        address = f"file://{self.factory.mktemp('meeting')}/ranks"
        for rank in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, address), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def end(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(10.0)
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def outcomes(self, function, *args):
        """("done", value) or ("failed", (type, message, traceback)) of each rank."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        found, until = [None, None], time.monotonic() + LIMIT
        while None in found:
            for rank, pipe in enumerate(self.pipes):
                if found[rank] is None and pipe.poll(0.02):
                    try:
                        found[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        found[rank] = ("failed", (EOFError, "the process ended", ""))
                    until = min(until, time.monotonic() + STRAGGLE)
            if time.monotonic() > until:
                self.end()
                found = [("failed", (TimeoutError, "waits for the other rank for ever", "")) if one is None else one for one in found]
        return found

    def __call__(self, function, *args):
        """What the function gave on each rank. It must not fail."""
        found = self.outcomes(function, *args)
        failed = [value[2] or value[1] for how, value in found if how == "failed"]
        assert not failed, "\n".join(failed)
        return [value for _, value in found]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    group = Two(tmp_path_factory)
    yield group
    group.end()


# ---------------------------------------------------------------- training: two ranks, and one


def sampled(state):
    """Every answer of the pending rollout: its tokens, and what is known of each token."""
    found = []
    for forest in (Forest.from_tensors(f) for minibatch in state["pending"] for f in minibatch):
        for s in range(forest.S):
            if forest.parent[s] >= 0:
                own, p = slice(int(forest.start[s]), int(forest.end[s])), int(forest.parent[s])
                prompt = forest.tokens[int(forest.start[p]) : int(forest.end[p])].tolist()
                columns = [forest.columns[name][own].tolist() for name in ("old_logp", "ref_logp", "old_value", "returns", "advantage")]
                found.append((prompt, forest.tokens[own].tolist(), columns))
    return sorted(found)


def unclaimed(values):
    """A run beside the inputs that is never begun."""
    return Run(Path(values.get("model") or values["data"]).parent / "unclaimed")


def play(method, values, resume=None, keep=(), folder=None):
    """A method from its settings, without a driver: metrics of each step, the last weights, snapshots, PPO's rollouts.

    folder: where the snapshots are written as checkpoints.
    """
    torch.set_num_threads(1)
    job = load(method).prepare(build(load(method).settings(method), values), unclaimed(values))
    rows, states, rollouts, module = [], {}, [], None
    for step in job.steps(resume):
        module = step.module
        rows.append({name: value for name, value in step.metrics.items() if name not in LEFT_OUT})
        if method == "ppo":
            rollouts.append(sampled(step.snapshot()["source"]))
        if step.n in keep and folder is None:
            states[step.n] = copy.deepcopy(step.snapshot())
        elif step.n in keep and ranks.rank() == 0:
            save_checkpoint(folder, step.n, step.snapshot(), spread=shard.write)
        elif step.n in keep and step.gather:
            shard.write(spread_tensors(step.snapshot()))
    if step.gather:
        step.gather()
    return rows, copy.deepcopy(module.state_dict()), states, rollouts


def short(method, toy, folder):
    """A few steps of each method."""
    if method == "rankings":
        answers = ["It is red.", "Blue.", "The boat is grey, I think.", "No.", "I do not know."]
        rows = [{"prompt": user(q.format(i)), "answers": answers[i % 3 :], "meta": {}} for i in range(6) for q in QUESTIONS]
        data = str(write(folder / "rankings.jsonl", rows))
        return "reward", {"model": toy.sft, "data": data, "batch": 5, "epochs": 1, "held_out": 0}
    if method == "muon":
        return "sft", values_of("sft", toy) | {"lr": 1e-3, "epochs": 0.25, "optimizer": "muon"}
    if method == "lora":
        return "sft", values_of("sft", toy) | {"lr": 1e-3, "epochs": 0.25, "adapter": "lora", "lora_rank": 4, "adapter_lr": 2}
    more = {
        "sft": {"epochs": 0.25},
        "dpo": {"epochs": 1.5},
        "kto": {"epochs": 0.75, "tokens_per_microbatch": 100},
        "bco": {"epochs": 0.75},
        "online-dpo": {"rollouts": 3, "tokens_per_microbatch": 100},
        "reward": {"epochs": 1.5},
        "grpo": {"rollouts": 3, "tokens_per_microbatch": 100, "dynamic": 1, "minibatches": 2},
        "ppo": {"rollouts": 3, "tokens_per_microbatch": 100, "kl_target": 0.5, "samples_per_prompt": 2},
    }
    return method, values_of(method, toy) | {"lr": 1e-3} | more[method]


def agree(rows, others, weights=None, other_weights=None):
    assert len(rows) == len(others) > 0
    for n, (a, b) in enumerate(zip(rows, others, strict=True)):
        assert a.keys() == b.keys()
        noise = {"accuracy"} if abs(a.get("margin", 1.0)) < 1e-5 else set()  # at DPO's start the sign of h is rounding
        for name in a.keys() - noise:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (n, name)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5), n
    if weights is not None:
        assert weights.keys() == other_weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(value, other_weights[name], atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def same_answers(rollouts, others):
    """The same tokens, and the same figures of each to 1e-5."""
    for mine, theirs in zip(rollouts, others, strict=True):
        assert [answer[:2] for answer in mine] == [answer[:2] for answer in theirs]
        for (_, _, a), (_, _, b) in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "muon", "lora", "dpo", "kto", "bco", "online-dpo", "reward", "rankings", "ppo", "grpo"])
def test_two_ranks_train_what_one_does(two, toy, tmp_path, method):
    name, values = short(method, toy, tmp_path)
    (rows, weights, _, rollouts), (theirs, own, _, _) = two(play, name, values)
    alone, expected, _, sampled_alone = play(name, values)
    agree(rows, alone, weights, expected)
    assert rows == theirs
    assert all(torch.equal(value, own[at]) for at, value in weights.items())  # equal to the last bit
    same_answers(rollouts, sampled_alone)
    start = load(name).prepare(build(load(name).settings(name), values), unclaimed(values)).steps(None)
    first = {at: value.clone() for at, value in next(start).module.state_dict().items()}
    assert max(float((weights[at] - value).abs().max()) for at, value in first.items()) > 1e-3  # they went somewhere


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_a_snapshot_of_two_ranks_goes_on_with_one_and_one_of_one_with_two(two, toy, tmp_path, method):
    """PPO: in the middle of a rollout, whose rest is in the snapshot."""
    name, values = short(method, toy, tmp_path)
    at = 3
    (rows, weights, states, rollouts), _ = two(play, name, values, None, (at,))
    rest, end, _, more = play(name, values, states[at])
    assert len(rest) == len(rows) - at
    agree(rest, rows[at:], end, weights)
    same_answers(more, rollouts[at:])
    alone, expected, states, sampled_alone = play(name, values, None, (at,))
    (rest, end, _, more), _ = two(play, name, values, states[at])
    agree(rest, alone[at:], end, expected)
    same_answers(more, sampled_alone[at:])


# ---------------------------------------------------------------- weights spread over the ranks

FULL = {"shard": "full"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "muon", "lora", "dpo", "kto", "online-dpo", "reward", "ppo"])
def test_spread_over_two_ranks_what_one_does(two, toy, tmp_path, method):
    """Unequal numbers of micro-batches too: a rank that has fewer makes passes without effect."""
    name, values = short(method, toy, tmp_path)
    values |= {"tokens_per_microbatch": 100, "fit_memory": method == "reward"}
    (rows, weights, _, rollouts), (theirs, own, _, _) = two(play, name, values | FULL)
    alone, expected, _, sampled_alone = play(name, values)
    agree(rows, alone, weights, expected)
    assert rows == theirs
    assert all(torch.equal(value, own[at]) for at, value in weights.items())
    same_answers(rollouts, sampled_alone)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_a_checkpoint_of_spread_weights_goes_on_with_one_rank_and_one_of_one_spread(two, toy, tmp_path, method):
    name, values = short(method, toy, tmp_path)
    at = 3
    (rows, weights, _, rollouts), _ = two(play, name, values | FULL, None, (at,), tmp_path / "checkpoints")
    step, state = load_checkpoint(tmp_path / "checkpoints" / f"step-{at:08d}")
    files = {path.suffix for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}  # no pickle
    assert step == at
    rest, end, _, more = play(name, values, state)
    agree(rest, rows[at:], end, weights)
    same_answers(more, rollouts[at:])
    alone, expected, states, sampled_alone = play(name, values, None, (at,))
    (rest, end, _, more), _ = two(play, name, values | FULL, states[at])
    agree(rest, alone[at:], end, expected)
    same_answers(more, sampled_alone[at:])


def _held(method, values):
    """Numbers that this rank holds between steps, of the weights that others see and of those that are trained; all there are."""
    job = load(method).prepare(build(load(method).settings(method), values), unclaimed(values))
    whole = sum(p.numel() for p in job.policy[0].parameters())
    step = next(job.steps(None))
    seen = sum(p.numel() for p in step.module.parameters())
    state = spread_tensors(step.snapshot())
    kept = sum(x.to_local().numel() for x in state.values())
    step.gather()
    return seen, kept, whole, sum(p.numel() for p in step.module.parameters())


def test_a_rank_holds_its_part(two, toy, tmp_path):
    name, values = short("sft", toy, tmp_path)
    for seen, kept, whole, again in two(_held, name, values | FULL):
        assert seen == 0
        assert kept <= 3 * (whole / 2) * 1.05  # weights and two states of the optimiser; uneven shapes take a little more
        assert again == whole


@pytest.mark.slow
def test_a_stage_with_spread_weights(two, toy, tmp_path):
    """The driver: evaluation, samples and the model that is written need whole weights; checkpoints are every rank's."""
    values = values_of("sft", toy) | {"epochs": 0.25, "lr": 1e-3}
    summary, _ = two(saving, "sft", tmp_path / "two", values | FULL)
    alone = train("sft", tmp_path / "one", **values)
    assert summary["held_out_loss"] == pytest.approx(alone["held_out_loss"], abs=1e-5)
    keep = lambda name: [{k: v for k, v in row.items() if k != "eval"} for row in result(tmp_path / name)[1] if "eval" not in row]  # noqa: E731
    agree(keep("two"), keep("one"))
    samples = [Run(tmp_path / name).rows("samples") for name in ("two", "one")]
    assert samples[0] == samples[1]
    mine, theirs = (load_policy(str(tmp_path / name))[0].state_dict() for name in ("two", "one"))
    for at, value in mine.items():
        torch.testing.assert_close(value, theirs[at], atol=1e-5, rtol=0)


def test_what_is_no_transformer_cannot_be_spread(two):
    for error in two(_spread_bigram):
        assert error.startswith("--shard full: Bigram is not made of transformer models alone")


def _spread_bigram():
    module = Bigram()
    try:
        next(fit(module, lambda step: [plant(documents(2))], nll, steps=1, optim=PLAIN, compute=Compute(shard="full")))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("method", "how"), [("sft", {}), ("reward", {}), ("dpo", {}), ("ppo", {}), ("sft", FULL), ("ppo", FULL)])
def test_a_batch_with_fewer_trees_than_ranks(two, toy, tmp_path, method, how):
    """One record in a step, or one prompt in a rollout: a rank has nothing to do, and the update is the same."""
    name, values = short(method, toy, tmp_path)
    values |= (
        {"prompts_per_step": 1, "minibatches": 1, "kl_target": None}
        if method == "ppo"
        else {"batch": 1, "epochs": 0.03 if method == "sft" else 0.3}
    )
    (rows, weights, _, rollouts), _ = two(play, name, values | how)
    alone, expected, _, sampled_alone = play(name, values)
    agree(rows, alone, weights, expected)
    same_answers(rollouts, sampled_alone)


# ---------------------------------------------------------------- stages


def stage(method, out, values):
    return train(method, out, **values)


def saving(method, out, values):
    """The same with a checkpoint at every step."""
    return train(method, out, save_seconds=1e-9, **values)


def late_leader(method, out, values, rank):
    """A stage in which this rank is late with the preparation."""
    module = load(method)
    prepare = module.prepare

    def later(*args):
        if ranks.rank() == rank:
            time.sleep(1.0)
        return prepare(*args)

    module.prepare = later
    try:
        return train(method, out, **values)
    finally:
        module.prepare = prepare


@pytest.mark.slow
def test_two_ranks_collect_the_same_comparisons(two, toy, tmp_path):
    values = values_of("collect", toy) | {"samples_per_prompt": 5}
    summary, follower = two(stage, "collect", tmp_path / "two", values)
    assert follower == {}
    train("collect", tmp_path / "one", **values)
    assert len(read_jsonl(tmp_path / "one" / "rankings.jsonl", Ranked)) > 3
    for name in "rankings", "pairs":
        assert (tmp_path / "two" / f"{name}.jsonl").read_bytes() == (tmp_path / "one" / f"{name}.jsonl").read_bytes()
    assert Run(tmp_path / "two").stage["summary"] == summary
    there, alone = Run(tmp_path / "two").stage, Run(tmp_path / "one").stage
    assert {**there["identity"], "ranks": 1} == alone["identity"]
    assert (there["record"]["ranks"], there["identity"]["ranks"], alone["record"]["ranks"]) == (2, 2, 1)
    assert there["card"] == alone["card"]


@pytest.mark.slow
@pytest.mark.parametrize(("late", "how"), [(0, {}), (1, {}), (1, FULL)])
def test_constitutional_ai_on_two_ranks(two, toy, tmp_path, late, how):
    """Two phases, and files in between that the leader writes and both read, whoever comes first."""
    values = values_of("constitution", toy) | {"epochs": 1, "lr": 1e-4, "sl_lr": 1e-4}
    two(late_leader, "constitution", tmp_path / "two", values | how, late)
    train("constitution", tmp_path / "one", **values)
    for name in "revisions", "helpful":
        assert (tmp_path / "two" / f"{name}.jsonl").read_bytes() == (tmp_path / "one" / f"{name}.jsonl").read_bytes()
    rows, alone = (result(tmp_path / name)[1] for name in ("two", "one"))
    assert [row["phase"] for row in rows if "phase" in row] == [row["phase"] for row in alone if "phase" in row]
    first = [row for row in rows if row.get("phase") == 1]
    agree(first, [row for row in alone if row.get("phase") == 1])
    pairs = [(tmp_path / name / "ai_pairs.jsonl").read_text().splitlines() for name in ("two", "one")]
    assert len(pairs[0]) == len(pairs[1]) > 0


@pytest.mark.slow
def test_launched_by_torchrun(toy, tmp_path):
    """The command itself: `torchrun --nproc-per-node 2 -m temper sft ...`. Only the leader speaks."""
    values = values_of("sft", toy) | {"epochs": 0.25, "lr": 1e-3}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "temper"]
    words = ["sft", *flags(values), "--out", str(tmp_path / "two"), "--threads", "1", "--looks", "1", "--quiet", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*launch, *words], env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr
    (said,) = [line for line in done.stdout.splitlines() if line.strip()]
    train("sft", tmp_path / "one", **values)
    there, alone = Run(tmp_path / "two"), Run(tmp_path / "one")
    assert json.loads(said)["summary"] == there.stage["summary"]
    assert there.stage["identity"] == {**alone.stage["identity"], "ranks": 2}
    keep = lambda rows: [{k: v for k, v in row.items() if k not in LEFT_OUT} for row in rows if "eval" not in row]  # noqa: E731
    agree(keep(there.rows("metrics")), keep(alone.rows("metrics")))
    looks = [[row["eval"]["held_out_loss"] for row in run.rows("metrics") if "eval" in row] for run in (there, alone)]
    assert looks[0] == pytest.approx(looks[1], abs=1e-5)


def test_a_stage_that_is_done_is_done_for_both(two, toy, tmp_path):
    values = values_of("sft", toy) | {"epochs": 0.1}
    first = two(stage, "sft", tmp_path / "out", values)[0]
    assert two(stage, "sft", tmp_path / "out", values)[0] == first
    assert Run(tmp_path / "out").done


# ---------------------------------------------------------------- errors


def _fit(source, loss, module, steps=2, **more):
    return list(fit(module, source, loss, steps=steps, optim=PLAIN, **more))


def _nan_on(rank):
    """The loss of one rank is no number at the second step; both say where their weights are."""
    module = Scale()

    def loss(m, forest):
        bad = float("nan") if ranks.rank() == rank and forest.weights["tokens"] == 2 else 1.0
        return Loss({"fine": Term(m.w * 1, "tokens"), "policy": Term(m.w * bad, "tokens")}, {})

    steps = fit(module, lambda step: [weighing(tokens=1.0 + step)], loss, steps=3, optim=PLAIN)
    next(steps)
    before = module.w.item()
    try:
        next(steps)
    except TrainingError as error:
        return str(error), before, module.w.item()
    return None


def _steep_on(rank):
    """The same with a loss that is finite and a gradient that is not."""
    module = Scale()

    def loss(m, forest):
        here = ((m.w - 1).sqrt() if ranks.rank() == rank else m.w * 1).sum()
        return Loss({"root": Term(here, "tokens")}, {})

    try:
        next(fit(module, lambda step: [weighing(tokens=1.0)], loss, steps=1, optim=PLAIN))
    except TrainingError as error:
        return str(error), 1.0, module.w.item()
    return None


def _unchecked_on(rank):
    """The check before the first update fails on one rank."""
    module = Scale()

    def check(module, batches):
        assert ranks.rank() != rank, "policy and reference differ"

    try:
        next(
            fit(
                module,
                lambda step: [weighing(tokens=1.0)],
                lambda m, f: Loss({"x": Term(m.w * 1, "tokens")}, {}),
                steps=1,
                optim=PLAIN,
                check=check,
            )
        )
    except TrainingError as error:
        return str(error), 1.0, module.w.item()
    return None


def _short_on(rank):
    """One rank's memory does not hold its record."""
    module = Scale()

    def loss(m, forest):
        if ranks.rank() == rank:
            raise MemoryError
        return Loss({"x": Term(m.w * 1, "tokens")}, {})

    try:
        next(fit(module, lambda step: [weighing(tokens=1.0)], loss, steps=1, optim=PLAIN))
    except TrainingError as error:
        return str(error), 1.0, module.w.item()
    return None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("fails", "what"),
    [
        (_nan_on, "step 2: loss term 'policy' is nan in micro-batch 1 of 1"),
        (_steep_on, "step 1: the gradient of loss term 'root' is not finite at w in micro-batch 1 of 1"),
        (_short_on, "step 1: memory cannot hold one record of 2 tokens"),
        (_unchecked_on, "check before the first update: policy and reference differ"),
    ],
)
def test_what_is_wrong_on_one_rank_stops_both(two, fails, what, rank):
    for message, before, after in two(fails, rank):
        assert message.startswith(what)
        assert before == after


# ---------------------------------------------------------------- the loop on its own


def _bigram(steps, shared):
    """Weights after training on documents shared out by rank, or all on this one."""
    module, trees = Bigram(), documents(12)
    sizes = [len(t[0].tokens) for t in trees]

    def source(step):
        return [plant([trees[i]]) for i in (ranks.share(sizes) if shared else range(12))]

    rows = [step.metrics for step in _fit(source, nll, module, steps)]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows], module.state_dict()


def test_sums_over_ranks_in_float64(two):
    """To 1e-12: the means are those over all tokens, not means of the ranks' means."""
    (rows, weights), (others, same) = two(_bigram, 4, True)
    alone, expected = _bigram(4, False)
    assert rows == others
    for a, b in zip(rows, alone, strict=True):
        assert a == pytest.approx(b, rel=1e-12)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-12, rtol=0)
        assert torch.equal(value, same[name])


# ---------------------------------------------------------------- the parts


def _shares(many):
    return [(ranks.shares(sizes), ranks.share(sizes)) for sizes in many]


def test_shares_give_every_item_to_exactly_one_rank(two):
    rng = np.random.default_rng(0)
    many = [[], [5], [3, 3], [1] * 7, *(rng.integers(1, 100, rng.integers(2, 30)).tolist() for _ in range(40))]
    first, second = two(_shares, many)
    for sizes, (parts, own), (same, other) in zip(many, first, second, strict=True):
        assert parts == same == [own, other]
        assert sorted([*own, *other]) == list(range(len(sizes)))
        assert all(part == sorted(part) for part in parts)
        loads = [sum(sizes[i] for i in part) for part in parts]
        assert abs(loads[0] - loads[1]) <= max(sizes, default=0)
        assert (not own, not other) == (len(sizes) < 1, len(sizes) < 2)
        assert ranks.shares(sizes) == [list(range(len(sizes)))]  # one rank does it all


def _cores_used(cores):
    """The cores of this rank's threads, where the machine had only these."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)
    machine.use(1)
    return {frozenset(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores to be told apart")
def test_ranks_that_fill_the_machine_keep_to_their_cores(two):
    a, b, *more = sorted(os.sched_getaffinity(0))
    assert two(_cores_used, {a, b}) == [{frozenset({a})}, {frozenset({b})}]
    if more:  # there is room beside them for others
        assert two(_cores_used, {a, b, more[0]}) == [{frozenset({a, b, more[0]})}] * 2


def _gathered():
    mine = ranks.rank()
    return [ranks.gather(value) for value in (mine, "x" * (9 * ranks.ROOM) if mine else None, [mine] * 3 * ranks.ROOM)]


def test_gather_of_small_and_large_and_one_of_each(two):
    first, second = two(_gathered)
    assert first == second == [[0, 1], [None, "x" * (9 * ranks.ROOM)], [[0] * 3 * ranks.ROOM, [1] * 3 * ranks.ROOM]]


def _parts(folder):
    """What the small ones give on this rank."""
    mine, sizes = ranks.rank(), [4, 1, 3, 2]
    share = ranks.share(sizes)
    with ranks.leader_first():
        found = (folder / "written").exists()
        if mine == 0:
            time.sleep(0.3)
            (folder / "written").touch()
    return {
        "count": ranks.count(),
        "gather": ranks.gather(f"rank {mine}"),
        "sum": ranks.all_sum({"both": 1.0 + mine, f"of {mine}": 5.0}),
        "whole": ranks.whole(share, [sizes[i] * 10 for i in share]),
        "led": ranks.led(["state", mine] if mine == 0 else None),
        "orders": [*map(ranks.order, ("save", "stop"))] and ["save", "stop"] if mine == 0 else list(ranks.orders()),
        "agree": [ranks.agree(None), ranks.agree("bad" if mine else None), ranks.agree(f"bad {mine}")],
        "first": found,
    }


def test_the_parts(two, tmp_path):
    leader, follower = two(_parts, tmp_path)
    assert (leader.pop("first"), follower.pop("first")) == (False, True)
    assert (
        leader
        == follower
        == {
            "count": 2,
            "gather": ["rank 0", "rank 1"],
            "sum": {"both": 3.0, "of 0": 5.0, "of 1": 5.0},
            "whole": [40, 10, 30, 20],
            "led": ["state", 0],
            "orders": ["save", "stop"],
            "agree": [None, "bad", "bad 0"],
        }
    )


def _gradients():
    """Sums; of a gradient that one rank lacks, and of one that all lack; of two kinds of numbers."""
    module = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in ("both", "one", "none")})
    module["long"] = nn.Parameter(torch.ones(1, dtype=torch.float64))
    module["both"].grad = torch.tensor([1.0, 2.0]) * (1 + ranks.rank())
    module["long"].grad = torch.tensor([1e-12], dtype=torch.float64) + ranks.rank()
    if ranks.rank():
        module["one"].grad = torch.tensor([7.0, 8.0])
    ranks.sum_gradients(module.parameters())
    return {name: None if p.grad is None else p.grad.tolist() for name, p in module.items()}


def test_gradients_are_summed_where_any_rank_has_one(two):
    for found in two(_gradients):
        assert found.pop("long") == pytest.approx([1.0 + 2e-12], abs=1e-15)  # in float64
        assert found == {"both": [3.0, 6.0], "one": [7.0, 8.0], "none": None}


def test_one_rank_needs_no_group():
    assert (ranks.count(), ranks.rank()) == (1, 0)
    assert ranks.gather("x") == ["x"]
    assert ranks.all_sum({"a": 2.0}) == {"a": 2.0}
    assert ranks.whole([0, 1], "ab") == ["a", "b"]
    assert ranks.led(3) == 3
    ranks.order("next")
    assert ranks.agree("bad") == "bad"
    with ranks.leader_first():
        pass


def _draws():
    from temper.train.fit import seed_everything

    seed_everything(3, 5)
    return torch.rand(3).tolist(), np.random.rand()


def test_ranks_draw_different_random_numbers_and_the_leader_those_of_a_single_one(two):
    leader, follower = two(_draws)
    assert leader == _draws()
    assert leader[0] != follower[0]
    assert leader[1] != follower[1]
