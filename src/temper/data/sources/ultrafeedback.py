"""UltraFeedback: an instruction with several completions, each scored (arXiv:2310.01377)."""

from typing import Any

from temper.records import Message, Ranked

NAME = "scored completions"
HELP = '{"instruction": ..., "completions": [{"response": ..., "overall_score": ...}, ...]}'
FIELDS = {"instruction", "completions"}
KIND = "comparisons"
SCORES = ("fine-grained_score", "overall_score", "score")  # the mean of the aspects first: some overall scores of 1 stand as 10


def recognise(row: dict[str, Any]) -> str:
    several = row.get("completions")
    if "instruction" in row and isinstance(several, list) and several and isinstance(several[0], dict) and "response" in several[0]:
        return "'completions' with a 'response' each"
    return ""


def _score(completion: dict[str, Any]) -> float | None:
    for name in SCORES:
        if (value := completion.get(name)) is not None:
            try:
                return float(value)
            except (TypeError, ValueError):
                return None
    return None


def convert(row: dict[str, Any]) -> Ranked:
    """The scored answers, the best first; of equal ones the earlier first. Unscored ones are left out and counted in meta."""
    if not isinstance(row["instruction"], str) or not row["instruction"].strip():
        raise ValueError("the instruction is empty")
    scored = []
    for i, completion in enumerate(row["completions"], 1):
        if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
            raise ValueError(f"completion {i} has no text in 'response'")
        if (score := _score(completion)) is not None:
            scored.append((score, completion))
    if len(scored) < 2:
        raise ValueError(f"{len(scored)} of {len(row['completions'])} completions have a score; a ranking needs two")
    scored.sort(key=lambda one: -one[0])
    meta: dict[str, Any] = {"models": [c["model"] for _, c in scored]} if all("model" in c for _, c in scored) else {}
    if left := len(row["completions"]) - len(scored):
        meta["unscored"] = left
    prompt = [Message(role="user", content=row["instruction"])]
    return Ranked(prompt=prompt, answers=[c["response"] for _, c in scored], scores=[score for score, _ in scored], meta=meta)


def write(record: Any, meta: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(record, Ranked) or record.scores is None:
        raise ValueError(f"{NAME} need scores; this is an order without")
    if len(record.prompt) != 1:
        raise ValueError(f"{NAME} hold one question, this prompt has {len(record.prompt)} turns")
    models = meta.pop("models", None) or [None] * len(record.answers)
    completions = [
        {**({"model": model} if model is not None else {}), "response": answer, "overall_score": score}
        for model, answer, score in zip(models, record.answers, record.scores, strict=True)
    ]
    return {"instruction": record.prompt[0].content, "completions": completions}
