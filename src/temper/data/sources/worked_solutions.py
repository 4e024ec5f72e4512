r"""Worked solutions with an answer that can be checked: GSM8K's `#### 18` (arXiv:2110.14168), MATH's `\boxed{18}` (arXiv:2103.03874)."""

import re
from typing import Any

from temper.data.sources.messages import one_question
from temper.records import Chat, Message

NAME = "worked solutions"
HELP = r'{"question": ..., "answer": "... #### 18"}, or {"problem": ..., "solution": "... \boxed{18}"}'
FIELDS = {"question", "problem", "solution"}
KIND = "chat"
_LAST = re.compile(r"####[ \t]*([^\n]+?)\s*\Z")


def recognise(row: dict[str, Any]) -> str:
    if isinstance(row.get("question"), str) and isinstance(row.get("answer"), str) and "####" in row["answer"]:
        return "rows with 'question' and an 'answer' that ends with ####"
    if isinstance(row.get("problem"), str) and isinstance(row.get("solution"), str):
        return "rows with 'problem' and 'solution'"
    return ""


def _boxed(solution: str) -> str | None:
    """What stands in the last \\boxed{...}, braces within it counted."""
    at = solution.rfind("\\boxed{")
    depth = 0
    for end in range(at + 6, len(solution) if at >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[at + 7 : end].strip()
    return None


def answer_in(solution: str) -> str | None:
    """The answer that a worked solution ends with, thousands' commas removed from a number; None where it gives none."""
    found = _LAST.search(solution)
    answer = found[1] if found else _boxed(solution)
    return answer.replace(",", "") if answer and re.fullmatch(r"-?[\d,]+(\.\d+)?", answer) else answer


def convert(row: dict[str, Any]) -> Chat:
    """The solution is what is learned; its `answer` in meta is what an answer is checked against."""
    question, solution = (row["question"], row["answer"]) if "question" in row else (row["problem"], row["solution"])
    if not question.strip():
        raise ValueError("the question is empty")
    given = row.get("answer") if "problem" in row else None
    answer = str(given) if given is not None else answer_in(solution)
    if not answer:
        raise ValueError("the solution ends without an answer to check: neither a line '#### 18' nor \\boxed{18}")
    return Chat(messages=[Message(role="user", content=question), Message(role="assistant", content=solution)], meta={"answer": answer})


def write(record: Chat, meta: dict[str, Any]) -> dict[str, Any]:
    system, question, solution = one_question(record, NAME)
    if system:
        raise ValueError(f"{NAME} hold no system turn")
    answer = meta.pop("answer", None)
    if _LAST.search(solution) and answer in (None, answer_in(solution)):
        return {"question": question, "answer": solution}
    if answer is None and answer_in(solution) is None:
        raise ValueError(f"{NAME} end with an answer to check, this one has none")
    return {"problem": question, "solution": solution, **({"answer": answer} if answer is not None else {})}
