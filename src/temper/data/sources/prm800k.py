"""PRM800K: solutions of MATH problems, each step rated by a person: 1 right, 0 neutral, -1 wrong (arXiv:2305.20050)."""

from typing import Any

from temper.records import Message, Record, Steps

NAME = "PRM800K"
HELP = '{"question": {"problem": ...}, "label": {"steps": [{"completions": [{"text": ..., "rating": ...}]}]}}'
FIELDS = {"question", "label"}
LABEL = {1: 1.0, -1: 0.0}  # a neutral step has no label, for whether it counts as right is a choice; its rating stays in meta


def recognise(row: dict[str, Any]) -> str:
    question, label = row.get("question"), row.get("label")
    if isinstance(question, dict) and "problem" in question and isinstance(label, dict) and "steps" in label:
        return "a 'question' with its 'problem', a 'label' with its 'steps'"
    return ""


def flatten(row: dict[str, Any], kind: str) -> list[Record]:
    """The solution that was gone on with, and one more for each rated alternative to one of its steps, the steps before it unlabelled.

    So every rating is the label of exactly one step.
    """
    prompt = [Message(role="user", content=row["question"]["problem"])]
    answer = row["question"].get("ground_truth_answer")
    meta = {} if answer is None else {"answer": answer}
    path: list[str] = []
    ratings: list[Any] = []
    others: list[tuple[list[str], list[Any]]] = []
    steps = row["label"]["steps"] or []
    for i, step in enumerate(steps, 1):
        rated = step.get("completions") or []
        if any(not isinstance(one, dict) or not isinstance(one.get("text"), str) for one in rated):
            raise ValueError(f"step {i} has a completion without text")
        chosen, human = step.get("chosen_completion"), step.get("human_completion")
        if chosen is None and not human and i == len(steps) and rated:
            chosen = 0  # the last step, which nobody went on from
        others += [([*path, one["text"]], [*[None] * len(path), one.get("rating")]) for k, one in enumerate(rated) if k != chosen]
        following = rated[chosen] if isinstance(chosen, int) and chosen < len(rated) else human
        if following is None:
            break
        path.append(following["text"])
        ratings.append(following.get("rating"))
    solutions = [(path, ratings)] if path else []
    return [
        Steps(prompt=prompt, steps=texts, labels=[LABEL.get(r) for r in rated], meta={**meta, "ratings": rated})
        for texts, rated in solutions + others
    ]
