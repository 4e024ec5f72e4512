"""What rates sampled answers: one number each, none where it could not be found. Floor 4."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from temper.records import Prompt


class Answer(NamedTuple):
    """One sampled answer, with the prompt it answers."""

    prompt: Prompt
    prompt_ids: Sequence[int]  # as the policy saw it
    tokens: Sequence[int]  # as they were sampled, what ended them included
    text: str  # decoded, without special tokens
    ended: bool  # it came to its end, rather than to --max-new


class Rater(Protocol):
    """A reward model, a check by program, the embedded world's gold score, ..."""

    name: str

    def rate(self, answers: Sequence[Answer]) -> list[float | None]:
        """One number per answer, in order, the larger the better; None where there is none to be had: such an answer is left out
        of learning and counted, never scored 0. Answers to one prompt stand together."""
        ...
