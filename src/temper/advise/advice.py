"""From answers and figures to recommendations, each with its reasons. Pure: what is recommended follows from `found` alone.

A reason is of one kind: measured (here, on the user's model and data), answered (by the user or assumed for them), reckoned (arithmetic on
what was measured) or literature (an arXiv id, and how far the claim goes).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from temper.advise.literature import LITERATURE
from temper.report.words import amount, capital, duration, names, percent, plain

Kind = Literal["measured", "answered", "reckoned", "literature"]
LOCAL_SHOTS = 16  # examples at which arXiv:2305.16938 compared fine-tuning with the same examples in the prompt
WIDE = 10_000_000_000  # parameters at which prompt tuning met full tuning (arXiv:2104.08691)
MANY = 1000  # pairs or answers whose time is told
PASSES = 3  # over the data, where no trial says how many
RIGHT = 0.02  # share of right answers below which hardly any group of answers holds a right one


def reason(kind: Kind, text: str, source: str = "", limit: str = "") -> dict[str, str]:
    return {"kind": kind, "text": text, "source": source, "limit": limit}


def literature(name: str) -> dict[str, str]:
    claim = LITERATURE[name]
    return reason("literature", claim.text, f"arXiv:{claim.arxiv}", claim.limit)


def answer(found: Mapping[str, Any], name: str) -> Any:
    return found["answers"][name]["value"]


def said(found: Mapping[str, Any], name: str, text: str) -> dict[str, str]:
    """What rests on an answer, and who gave it."""
    return reason("answered", text, found["answers"][name]["from"])


def recommend(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The advice: how to adapt, which preference method, how much data, what it costs; each with choice, command and reasons."""
    return [approach(found), preference(found), amounts(found), costs(found)]


def advice(topic: str, choice: str, reasons: Iterator[dict[str, str]], command: str = "") -> dict[str, Any]:
    return {"topic": topic, "choice": choice, "command": command, "reasons": list(reasons)}


# ---------------------------------------------------------------- figures in words

SHARES = ("correct", "exact", "schema", "json", "ended")


def number(measure: str, x: float | None) -> str:
    return "?" if x is None else percent(x) if measure in SHARES else plain(x, 3)


def told(measure: str, m: Mapping[str, Any]) -> str:
    """mean (low to high)"""
    return f"{number(measure, m['mean'])} ({number(measure, m['low'])} to {number(measure, m['high'])})"


def rival(found: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((r for r in found["rivals"] if r["name"] == name), None)


SPOKEN = {"zero-shot": "the bare request", "system": "a system prompt", "few-shot": "examples in the prompt", "lora": "LoRA",
          "prompt-tuning": "prompt tuning", "full": "full fine-tuning"}  # fmt: skip


# ---------------------------------------------------------------- how to adapt


def approach(found: Mapping[str, Any]) -> dict[str, Any]:
    """Measured where the rivals ran; else from the task and the literature."""
    if found["decision"]:
        chosen = found["decision"]["chosen"]
        return advice("How to adapt the model", capital(SPOKEN[chosen]), _measured(found), command(found, chosen))
    chosen = _unmeasured(found)
    what = "A system prompt, while examples are collected" if chosen == "system" else capital(SPOKEN[chosen])
    return advice("How to adapt the model", f"{what} (not measured)", _supposed(found, chosen), command(found, chosen))


def _unmeasured(found: Mapping[str, Any]) -> str:
    if not answer(found, "examples"):
        return "system"
    if answer(found, "examples") < LOCAL_SHOTS:
        return "few-shot"
    fits = _room(found, "full") is not False
    return "full" if answer(found, "task") in ("facts", "reasoning") and fits else "lora"


def _measured(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    decision, rows = found["decision"], found["rows"]
    chosen, n = decision["chosen"], rows["held_out"]
    limit = f"{n} held-out rows, one split, one system prompt, one choice of examples; intervals are not widened for many comparisons"
    for measure, against in decision["against"].items():
        if measure not in decision["by"] and measure != next(iter(decision["against"])):
            continue
        figures = [f"{r['name']} {told(measure, r['measures'][measure])}" for r in found["rivals"] if measure in r["measures"]]
        worse = [name for name, gap in against["gaps"].items() if (gap["low"] or 0.0) > 0]
        text = f"{measure}: {'; '.join(figures)}"
        text += f". Clearly worse than {against['best']}: {names(worse)}" if worse else ". None is clearly worse than another"
        yield reason("measured", text, "held-out rows", limit)
        limit = ""
    for name in decision["equal"]:
        yield reason("measured", f"{name} could not be told apart from {chosen}, which is cheaper", "held-out rows", "more rows may tell")
    if not decision["by"]:
        yield reason("measured", "nothing told the rivals apart; the cheapest is taken", "held-out rows", f"{n} rows see large gaps only")
    cut = [r["name"] for r in found["rivals"] if "ended" in r["measures"] and r["measures"]["ended"]["mean"] < 0.5]
    if cut:
        text = f"most answers of {names(cut)} did not end within {rows['max_new']} tokens"
        yield reason("measured", text, "held-out rows", "a model that does not stop, or --max-new is too small")
    if "nll" in decision["by"]:
        yield literature("nll")
    if rows.get("unfit"):
        yield reason("measured", f"{rows['unfit']} of {n} held-out answers of the data do not fit the schema themselves", rows["source"])
    if (own := rival(found, chosen)) and own["trained"]:
        yield from _trained(own["trained"], rows)
    yield literature("prompt-tuning" if chosen == "prompt-tuning" else "lora")
    yield _privacy(found)


def _trained(t: Mapping[str, Any], rows: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    rates = [float(rate) for rate, nll in t["tried"].items() if nll is not None]
    notes = []
    if not t["epochs"]:
        yield reason("measured", f"no pass at any of the rates {names(list(t['tried']))} was better than none", "rows kept for choosing")
        return
    if len(rates) > 1 and t["rate"] in (min(rates), max(rates)):
        notes.append(f"it is the {'largest' if t['rate'] == max(rates) else 'smallest'} rate that worked: try --rates beyond it")
    if t["epochs"] == t["of"]:
        notes.append("the last pass was the best: more may help (--epochs, --minutes)")
    if t["of"] < t["asked"]:
        notes.append(f"the time allowed {plain(t['of'], 0)} of {t['asked']} passes (--minutes)")
    if t["rows"] < rows["records"]:
        notes.append(f"it learned from {amount(t['rows'])} of {amount(rows['records'])} rows")
    text = f"rate {t['rate']:g} and {plain(t['epochs'], 0)} of {plain(t['of'], 0)} passes were best on {rows['chosen_on']} other rows"
    yield reason("measured", text, "rows kept for choosing", "; ".join(notes))


def _supposed(found: Mapping[str, Any], chosen: str) -> Iterator[dict[str, str]]:
    task, examples = answer(found, "task"), answer(found, "examples")
    if not examples:
        yield said(found, "examples", "without demonstrations there is nothing to train on: a prompt is what can be had at once")
    elif chosen == "few-shot":
        text = f"{examples} demonstrations fit into the prompt; train an adapter on them as well and keep the better"
        yield said(found, "examples", text)
    if examples:
        yield literature("few")
        yield said(found, "task", f"the task is {task}: " + _for_task(task))
        yield literature("lora")
    if _room(found, "full") is False and task in ("facts", "reasoning"):
        yield reason("reckoned", "full fine-tuning would suit the task but does not fit into the memory", "see the costs")
    yield literature("prompt-tuning")
    if answer(found, "format") == "json":
        yield said(found, "format", "whether answers are JSON that fits is measured with --data, --model and --schema")
    yield _privacy(found)


def _for_task(task: str) -> str:
    if task in ("facts", "reasoning"):
        return "where LoRA learns less than all weights do"
    return "where LoRA is reported to equal all weights, at a fraction of the memory"


def _privacy(found: Mapping[str, Any]) -> dict[str, str]:
    if answer(found, "privacy") == "local":
        return said(found, "privacy", "the text may not leave this machine: all of this runs here, and no hosted model was considered")
    return said(
        found, "privacy", "the text may leave this machine: a larger hosted model with a prompt is another rival, which was not run"
    )


def command(found: Mapping[str, Any], chosen: str) -> str:
    """What to type for it; nothing where that is a way of asking."""
    if chosen in ("zero-shot", "system", "few-shot"):
        return f"temper chat {shlex.quote(found['model'])}" if found["model"] else ""
    adapter = {"prompt-tuning": "prompt"}.get(chosen, chosen)
    words = ["temper", "sft", "--model", found["model"] or "MODEL", "--data", found["data"] or "DATA", "--adapter", adapter]
    own = rival(found, chosen)
    if own and own["trained"]:
        words += ["--lr", f"{own['trained']['rate']:g}", "--epochs", f"{max(1.0, own['trained']['epochs']):g}"]
    if chosen in found["costs"]:
        words += ["--tokens-per-microbatch", str(found["costs"][chosen]["microbatch"])]
    return shlex.join([*words, "--out", "runs/sft"])


# ---------------------------------------------------------------- which preference method


def preference(found: Mapping[str, Any]) -> dict[str, Any]:
    """By what there is to prefer answers by."""
    have = answer(found, "feedback")
    right = _right(found)
    if "verifiable" in have and (right is None or right["high"] is None or right["high"] >= RIGHT):
        method = "grpo"
    elif "pairs" in have:
        method = "dpo"
    elif "thumbs" in have:
        method = "kto"
    elif "people" in have:
        method = "online-dpo"
    elif answer(found, "task") == "harmless":
        method = "constitution"
    else:
        method = ""
    titles = {
        "grpo": "GRPO with the verdict as its reward",
        "dpo": "DPO on the pairs",
        "kto": "KTO on the thumbs",
        "online-dpo": "A reward model from people's comparisons, then online DPO or PPO",
        "constitution": "Constitutional AI: principles in the place of labels of harm",
        "": "None: fine-tune only",
    }
    return advice("Which preference method", titles[method], _why(found, method, have, right), _preference_command(found, method))


def _right(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The share of right answers of the rival that was chosen."""
    own = rival(found, found["decision"]["chosen"]) if found["decision"] else None
    return own["measures"].get("correct") if own else None


def _why(found: Mapping[str, Any], method: str, have: list[str], right: Mapping[str, Any] | None) -> Iterator[dict[str, str]]:
    yield said(found, "feedback", f"to prefer answers by there is: {names(have)}")
    if "verifiable" in have and method != "grpo" and right:
        text = f"right answers after the best way of adapting: {told('correct', right)}: too rare for a group of answers to hold one"
        yield reason("measured", text, "held-out rows", "fine-tune on worked solutions first, then try again")
    if method == "grpo":
        if right:
            yield reason("measured", f"right answers before it: {told('correct', right)}", "held-out rows", "greedy answers, not samples")
        yield literature("grpo")
    if method == "dpo":
        yield literature("dpo")
        yield literature("online")
        if "people" in have:
            text = "people can judge fresh answers: after DPO, compare the new model's own answers, and go on with those (online DPO)"
            yield said(found, "feedback", text)
    if method == "kto":
        yield literature("kto")
    if method == "online-dpo":
        yield literature("people")
        yield literature("online")
    if method == "constitution":
        yield literature("principles")
    yield from _preference_bill(found, method)
    if not method:
        text = "without pairs, thumbs, a program that verifies, or people, no preference method has anything to learn from"
        yield reason("reckoned", text, "", "a rater of your own is enough: --reward of `temper grpo` and `temper best-of-n`")


def _preference_bill(found: Mapping[str, Any], method: str) -> Iterator[dict[str, str]]:
    """What it takes beside fine-tuning, from speeds that were measured."""
    kind = next((k for k in _ways(found) if k in found["costs"]), "")
    own = rival(found, kind) if kind else None
    if not own or not method:
        return
    cost, adapter = found["costs"][kind], kind != "full"
    learn, row = cost["tokens_per_second"]["mean"], cost["tokens_per_row"]
    if method in ("dpo", "kto"):
        took = MANY * 2 * row * (1 / learn + 1 / own["forward_tokens_per_second"])
        text = f"{MANY:,} pairs: about {duration(took)} for a pass, with {kind}; memory as for fine-tuning"
        yield reason(
            "reckoned", text, "two rows of tokens each, learned from once and read once by the reference", "pairs as long as your rows"
        )
    elif method in ("grpo", "online-dpo"):
        took = MANY * (own["answer_tokens"] / own["sampled_tokens_per_second"] + row * (1 / learn + 1 / own["forward_tokens_per_second"]))
        beside = "no second model, the reference being the adapter switched off" if adapter else _gigabytes(cost["bytes"]["weights"])
        text = f"{MANY:,} sampled answers: about {duration(took)}, with {kind}; beside fine-tuning's memory {beside}"
        text += "" if adapter else " for the reference"
        yield reason(
            "reckoned", text, "sampled, read by the reference, learned from once", "answers as long as now; a reward model comes on top"
        )


def _preference_command(found: Mapping[str, Any], method: str) -> str:
    data = shlex.quote(found["data"] or "DATA")
    return {
        "grpo": f"temper grpo --model runs/sft --reward maths --prompts {data} --out runs/grpo",
        "dpo": f"temper dpo --model runs/sft --data {data} --out runs/dpo",
        "kto": f"temper kto --model runs/sft --data {data} --out runs/kto",
        "online-dpo": "temper reward --model runs/sft --data PAIRS --out runs/reward",
        "constitution": "temper constitution --model runs/sft --red-team PROMPTS --helpful PROMPTS --out runs/constitution",
    }.get(method, "")


# ---------------------------------------------------------------- how much data


def amounts(found: Mapping[str, Any]) -> dict[str, Any]:
    """By the curve where there is one."""
    measure, gain = _gain(found)
    if gain is None:
        return advice("How much data", "Start with what there is, and measure whether more pays", _by_books(found))
    better = -gain["high"] if measure == "nll" else gain["low"]
    choice = "More rows of this kind still pay" if better > 0 else "Four times the rows gained nothing that could be measured"
    return advice("How much data", choice, _by_curve(found, measure, gain, better > 0))


def _gain(found: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """(the measure that decided, what a quarter of the rows lost in it)."""
    curve = found["curve"]
    measure = next((m for m in (*(found["decision"] or {}).get("by", ()), "nll") if curve and m in curve["gains"]), "")
    gain = curve["gains"][measure] if curve and measure else None
    return measure, gain if gain and gain["low"] is not None else None


def _by_curve(found: Mapping[str, Any], measure: str, gain: Mapping[str, Any], pays: bool) -> Iterator[dict[str, str]]:
    few, many = found["curve"]["rows"]
    whole, part = rival(found, found["curve"]["rival"]), found["curve"]["quarter"]
    assert whole is not None
    text = f"{found['curve']['rival']} in as many steps, {measure}: {told(measure, part[measure])} from {few} rows,"
    text += f" {told(measure, whole['measures'][measure])} from {many}: a difference of {number_signed(measure, gain)}"
    yield reason("measured", text, "held-out rows", f"between {few} and {many} rows; beyond them it is a guess")
    if pays:
        text = f"about {number_of(measure, abs(gain['mean']) / 2)} for each doubling in that range"
        yield reason("reckoned", text, "half the difference", "gains shrink as rows grow")
    yield literature("amount")


def number_of(measure: str, x: float) -> str:
    return f"{plain(100 * x, 1)} points" if measure in SHARES else plain(x, 3)


def number_signed(measure: str, m: Mapping[str, Any]) -> str:
    mean, low, high = (f"{plain(100 * m[k], 1)}" if measure in SHARES else plain(m[k], 3) for k in ("mean", "low", "high"))
    return f"{mean} ({low} to {high}){' points' if measure in SHARES else ''}"


def _by_books(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    yield said(found, "examples", f"there are {amount(answer(found, 'examples'))} demonstrations")
    yield literature("amount")
    if "people" in answer(found, "feedback"):
        yield literature("people")


# ---------------------------------------------------------------- what it costs


def total(cost: Mapping[str, Any]) -> float:
    """Bytes of training: weights, gradients, optimiser, activations."""
    return sum(cost["bytes"].values())


def _room(found: Mapping[str, Any], kind: str) -> bool | None:
    """Whether it fits where it is to be trained; None where that is not known."""
    hardware, cost = answer(found, "hardware"), found["costs"].get(kind)
    if hardware == "here" and kind in found["too_large"]:
        return False
    if cost is None:
        return None
    if hardware == "here":  # it was measured here, so it fitted
        return True
    return total(cost) < 1e9 * float(hardware)


def seconds(found: Mapping[str, Any], kind: str) -> tuple[float, float] | None:
    """(seconds of training, passes) for all the rows at the measured speed."""
    cost = found["costs"].get(kind)
    if cost is None or not answer(found, "examples"):
        return None
    own = rival(found, kind)
    passes = max(1.0, own["trained"]["epochs"]) if own and own["trained"] else PASSES
    return answer(found, "examples") * passes * cost["tokens_per_row"] / cost["tokens_per_second"]["mean"], passes


def _ways(found: Mapping[str, Any]) -> list[str]:
    """Ways of training, the recommended one first."""
    return [(found["decision"] or {}).get("chosen") or _unmeasured(found), *found["costs"]]


def costs(found: Mapping[str, Any]) -> dict[str, Any]:
    """Memory and hours of each way of training."""
    kind = next((k for k in _ways(found) if k in found["costs"]), "")
    took = seconds(found, kind) if kind else None
    if not kind:
        choice = "Not known: memory and speed are measured on a model (--model)"
    elif took is None:
        choice = f"If it is trained, {kind}: {_gigabytes(total(found['costs'][kind]))}, {_speed(found['costs'][kind])}"
    else:
        choice = f"If it is trained, {kind}: {_gigabytes(total(found['costs'][kind]))}, {duration(took[0])}"
    return advice("What it costs", choice, _bill(found, kind))


def _gigabytes(x: float) -> str:
    return f"{plain(x / 1e9, 1)} GB" if x >= 1e9 else f"{plain(x / 1e6, 0)} MB"


def _speed(cost: Mapping[str, Any]) -> str:
    return f"{plain(cost['tokens_per_second']['mean'], 0)} tokens/s"


def _bill(found: Mapping[str, Any], chosen: str) -> Iterator[dict[str, str]]:
    hardware = answer(found, "hardware")
    for kind, cost in found["costs"].items():
        speed, b = cost["tokens_per_second"], cost["bytes"]
        text = f"{kind}: {_gigabytes(total(cost))} ({_gigabytes(b['weights'])} of weights, {_gigabytes(b['states'])} of gradients and"
        text += f" optimiser, {_gigabytes(b['activations'])} of activations for {amount(cost['tokens_at_once'])} tokens at once);"
        text += f" {amount(cost['trained'])} of {amount(cost['parameters'])} parameters are trained"
        yield reason("measured", text, "the doctor's estimate", "float32; activations by a straight line through two measured peaks")
        low, high = ("?" if speed[k] is None else plain(max(0.0, speed[k]), 0) for k in ("low", "high"))
        yield reason("measured", f"{kind}: {_speed(cost)} ({low} to {high})", f"{speed['n']} steps on this machine")
        if took := seconds(found, kind):
            text = f"{kind}: {duration(took[0])} for {amount(answer(found, 'examples'))} rows, {plain(took[1], 0)} passes"
            own = rival(found, kind)
            limit = "" if own and own["trained"] else f"{PASSES} passes are supposed; give --data to have them measured"
            yield reason("reckoned", text, "rows x tokens of a row x passes / speed", limit)
        if hardware != "here":
            text = f"{kind}: {'fits' if _room(found, kind) else 'does not fit'} into the {float(hardware):g} GB that you named"
            yield reason("reckoned", text, "the same estimate", "the hours are this machine's; those of another are not known")
    budget, took = answer(found, "budget"), seconds(found, chosen) if chosen else None
    if took:
        over = took[0] > 3600 * budget
        text = f"{chosen} {'takes more than' if over else 'is within'} the {budget:g} hours that training may take"
        yield said(found, "budget", text + ("; fewer rows or passes, or a smaller model" if over else ""))
    told_of = [r for r in found["rivals"] if r.get("sampled_tokens_per_second")]
    if told_of:
        fastest = max(told_of, key=lambda r: r["sampled_tokens_per_second"])
        text = f"sampling: {plain(fastest['sampled_tokens_per_second'], 0)} tokens/s ({fastest['name']}, up to 64 answers at once)"
        yield reason("measured", text, "the held-out answers", "what PPO, GRPO and online methods spend most of their time on")
    if any(_room(found, kind) is False for kind in ("lora", "full")):
        yield literature("qlora")
