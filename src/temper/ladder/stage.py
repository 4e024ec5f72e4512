"""One stage: a method, its settings, a folder; trained, resumed or found done. Floor 7."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from temper.checks import Finding, examine, foresee, headline
from temper.config import Settings, UserError, build, dump, opt
from temper.data import hub
from temper.data.store import content, parts
from temper.data.template import render_prompt, stop_ids
from temper.driver import drive, follow, make, peak_mb
from temper.judges.rating import reads
from temper.methods import load
from temper.methods.base import Job
from temper.models.load import load_tokenizer
from temper.rollout import Request, Sampling, sample
from temper.runs import Run, disk, fingerprint, model_fingerprint
from temper.train import machine, ranks

ROUNDING = ("ranks", "shard", "activations", "fit_memory", "tokens_per_microbatch")  # of an identity: another one changes last digits
MODELS = ("model", "reward", "report", "step_reward", "value_model")  # settings that name a model
INPUTS = (*MODELS, "data", "prompts", "red_team", "helpful", "helpful_pairs", "ptx_data", "principles")  # settings that name what is read


class Place(Settings):
    """Where a stage is written, and how it runs."""

    out: str = opt(..., "folder of the stage: model/, stage.json, metrics.jsonl")
    threads: int = opt(2, "CPU threads; the last digits of every figure depend on it", ge=1)
    looks: int = opt(8, "evaluations along the way", ge=1)
    save_seconds: float = opt(60.0, "seconds between checkpoints", gt=0)
    fresh: bool = opt(False, "remove what temper wrote in --out and start over")
    quiet: bool = opt(False, "no progress")
    doctor: Literal["refuse", "warn", "off"] = opt("refuse", "checks before the first step: refuse on errors, only tell them, or none")
    evaluation_sets: list[str] = opt([], "files of test questions that no row may hold")


class Refused(UserError):
    """The checks before the first step found errors."""

    code = 1


@dataclass(frozen=True)
class Context:
    """What a recipe knows and a stage by hand does not."""

    parent: str | None = None
    command: str = ""
    evaluation: Mapping[str, Any] | None = None  # how the recipe evaluates
    probe: Mapping[str, str] | None = None  # {"reference": folder, "reward": folder}: look at gold, KL and proxy along the way


def input_fingerprint(name: str, value: str) -> str:
    """By the content of what is read: the files of a model's folder, the constitution, and as `data.store.content` says. What is not there
    (a hub name, a mistake) counts as its name.
    """
    if value == "-":
        raise UserError(f"{name}: standard input cannot be read again when the stage goes on; save it and name the file")
    if name in ("reward", "report") and reads(value) != [value]:
        return fingerprint([value, *(input_fingerprint(part, one) for part, one in _named({name: value}))])
    path = Path(value)
    if name in MODELS:
        return model_fingerprint(value)
    if name == "principles":
        return fingerprint(path if path.is_file() else value)
    return content(value)


def code_of(method: str) -> list[str]:
    """The modules that decide what a method makes, for `code_version`."""
    return [load(method).__name__]


def identity(method: str, settings: Settings, place: Place) -> dict[str, Any]:
    """What decides a stage's result: equal identities (and code) give equal bits on one machine."""
    values = dump(settings)
    inputs = {name: input_fingerprint(name, values[name]) for name in INPUTS if values.get(name)}
    own = {k: v for k, v in values.items() if k not in inputs}
    return {"method": method, "settings": own, "inputs": inputs, "threads": place.threads, "ranks": ranks.count()}


def run_stage(method: str, settings: Settings, place: Place, context: Context | None = None) -> dict[str, Any]:
    """Run a stage to its end from wherever it stands; returns its summary, which is also in stage.json.

    Raises UserError for wrong input, Interrupted after a signal (saved; the same command goes on).
    """
    context = context or Context()
    machine.use(place.threads)
    if ranks.rank():
        return _follow(method, settings, place)
    began, worked = time.monotonic(), time.process_time()
    values = dump(settings)
    record = {
        "parent": context.parent,
        "named": {name: values[name] for name in INPUTS if values.get(name)},
        "command": context.command,
        "seed": values.get("seed"),
        "threads": place.threads,
        "ranks": ranks.count(),
    }
    if place.fresh:
        _must_be_there(values)
    with Run.claim(
        place.out, identity(method, settings, place), fresh=place.fresh, record=record, code=code_of(method), rounding=ROUNDING
    ) as run:
        if ranks.led(run.done):
            run.remove_checkpoints()  # killed right after it was done, it left them
            return _complete(run, run.stage["summary"])
        try:
            summary = _train(method, settings, place, context, run)
        except UserError:
            run.abandon()  # nothing was trained yet: the corrected command finds the folder free
            raise
        spent = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - worked}  # with what came before the first step
        return _complete(run, {**summary, **{name: round(max(summary[name], x), 3) for name, x in spent.items()}})


def _follow(method: str, settings: Settings, place: Place) -> dict[str, Any]:
    """A rank that does not lead: it does what the leader does and writes nothing."""
    if ranks.led(True):
        return {}
    run = Run(place.out)
    job = _prepare(method, settings, place, run)
    if job.make:
        job.make(Path(place.out) / job.artefact, lambda done, of: None)
        peak_mb()
    else:
        follow(job.steps)
    return {}


def _named(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(setting, what it names that is read); of a reward every model and file that it is made of."""
    for name in INPUTS:
        value = values.get(name)
        if name in ("reward", "report") and value and not value.startswith("@"):
            yield from (("data" if part.endswith((".py", ".json")) else name, part) for part in reads(value))
        elif value:
            yield name, value


def _must_be_there(values: Mapping[str, Any]) -> None:
    """Before an old run is removed: files exist, models have at least a tokenizer. A typo then loses nothing."""
    if problem := absent(values):
        raise UserError(problem)
    for name, value in _named(values):
        if name in MODELS:
            load_tokenizer(value)


def absent(values: Mapping[str, Any]) -> str | None:
    """The first input that is not there, in words. Not looked for: the embedded world, other stages (@), what may be a name of the hub."""
    for name, value in _named(values):
        if value.startswith(("world:", "@")):
            continue
        for spec in () if name in MODELS else parts(value):
            if not spec.startswith("world:") and not Path(spec).exists() and not hub.is_name(spec):
                return f"{spec}: no such file"
        local = name in MODELS and (value.startswith((".", "/", "~")) or value.count("/") > 1)
        if local and not Path(value).expanduser().exists():
            return f"{value}: no such folder"
    return None


def _train(method: str, settings: Settings, place: Place, context: Context, run: Run) -> dict[str, Any]:
    """Prepare, then train or make; the run is done after it."""
    run.set_status(phase="prepare", now=True)
    job = _prepare(method, settings, place, run)
    if job.notes:
        job.card["notes"] = list(job.notes)  # a stage of a recipe has no other way to say them
    run.update(card=job.card, artefact=job.artefact)
    if not place.quiet:
        for note in job.notes:
            print(note, file=sys.stderr)
    artefact = run.file(job.artefact)
    if produce := job.make:

        def made(path: Path, told: Callable[[int, int], None]) -> int:
            produce(path, told)
            tokens = job.card.pop("tokens", 0)
            run.update(card=job.card)  # what it counted on the way
            return tokens

        return make(made, artefact, run, title=Path(place.out).name, quiet=place.quiet)

    def finish(module: Any) -> None:
        with disk(artefact, "the last checkpoint is whole"):
            checked = job.save(artefact)
        if checked:
            run.update(card={**job.card, "export": checked})

    return drive(
        job.steps,
        run,
        steps=job.total,
        finish=finish,
        evaluate=_look(job, context),
        evaluate_every=max(1, job.total // place.looks),
        samples=_samples(job) if job.asks else None,
        samples_every=max(1, job.total // place.looks),
        save_seconds=place.save_seconds,
        quiet=place.quiet,
        title=Path(place.out).name,
        command=context.command,
    )


def _prepare(method: str, settings: Settings, place: Place, run: Run) -> Job:
    """The job; on its card what the checks say of it. They look before the model is loaded and again at what was made of the data, unless a
    checkpoint says that it went well before. All ranks refuse together.
    """
    looks = place.doctor != "off" and ranks.rank() == 0 and not any(run.checkpoints.glob("*"))
    values = dump(settings)
    _heed(foresee(method, values, ranks.count()) if looks else [], method, place)
    job = load(method).prepare(settings, run)
    prepared, job.prepared = job.prepared, None
    found = examine(method, values, prepared, job.total, place.evaluation_sets) if looks and prepared else []
    if found:
        job.card["doctor"] = [line.strip() for line in headline(found)]
    _heed(found, method, place)
    return job


def _heed(found: Sequence[Finding], method: str, place: Place) -> None:
    """Tell what was found. Raises Refused on errors, if that is asked for."""
    if found and not place.quiet:
        print("doctor:", "\n".join(headline(found)), file=sys.stderr)
    errors = [f.lines()[0].removeprefix("error: ") for f in found if f.severity == "error"]
    more = f" (and {len(errors) - 1} more errors)" if len(errors) > 1 else ""
    wrong = f"{errors[0]}{more}; `temper doctor {method} ...` says more, --doctor warn trains all the same" if errors else None
    if wrong := ranks.agree(wrong if place.doctor == "refuse" else None):
        raise Refused(wrong)


def _samples(job) -> Callable[[], list[dict[str, Any]]]:
    """The greedy answers to a few prompts, for samples.jsonl."""
    model, tokenizer = job.policy
    ids = [render_prompt(tokenizer, ask) for ask in job.asks]
    window = getattr(model.config, "max_position_embeddings", None) or max(map(len, ids)) + 64
    short = [i for i, x in enumerate(ids) if len(x) + 64 <= window]

    def look() -> list[dict[str, Any]]:
        groups = sample(model, Request([ids[i] for i in short], sampling=Sampling(temperature=0.0, max_new=64), stop=stop_ids(tokenizer)))
        answers = [tokenizer.decode(a.tokens, skip_special_tokens=True) for (a,) in groups]
        return [{"prompt": job.asks[i][-1].content, "answer": answer} for i, answer in zip(short, answers, strict=True)]

    return look


def _complete(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """The summary with the last held-out figures, in stage.json too: a death right after the last step may have left them out."""
    last: dict[str, Any] = next((row["eval"] for row in reversed(run.rows("metrics")) if "eval" in row), {})
    summary = {**summary, **{name: value for name, value in last.items() if name.startswith(("held_out", "expected", "ceiling"))}}
    if summary != run.stage["summary"]:
        run.update(summary=summary)
    return summary


def _look(job, context: Context) -> Callable[[], dict[str, float]] | None:
    """The method's own held-out figures, and on the embedded world gold, KL and proxy; None where there is neither."""
    probe = None
    if context.probe is not None and job.policy:
        from temper.evals.harbour import Evaluation, Probe

        model, tokenizer = job.policy
        probe = Probe(
            model,
            tokenizer,
            build(Evaluation, dict(context.evaluation or {})),
            reference=context.probe.get("reference"),
            reward=context.probe.get("reward"),
        )
    if not job.evaluate and not probe:
        return None
    return lambda: {**(job.evaluate() if job.evaluate else {}), **(probe() if probe else {})}
