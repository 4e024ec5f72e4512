"""`temper chat DIR/STAGE`: talk to one stage in the terminal. Floor 7.

The whole conversation goes through the model's chat template at every turn; a base model, which has none, continues the text. When the
conversation outgrows the model's window the oldest turns are left out, and that is said.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from temper.config import Settings, UserError, opt, parse
from temper.data.template import render_prompt, stop_ids
from temper.models.mix import is_mixture, load_askable, parse_mixture
from temper.records import Message
from temper.report.gather import evaluated_at
from temper.report.words import clean
from temper.rollout import Request, Sampling, stream

EXAMPLES = """
  temper chat runs/harbour/ppo
  temper chat runs/harbour/sft --system "Answer in one sentence." --temperature 0
  temper chat runs/harbour/dpo --once "Where does Kai live?"
  temper chat '0.3*runs/harbour/dpo + 0.7*runs/harbour/constitution'
"""
COMMANDS = "/reset forgets the conversation, /system TEXT sets the system turn (without TEXT: removes it), /quit or Ctrl-D ends"


class Chat(Settings):
    """Talk to a stage, turn by turn."""

    stage: str = opt(..., "a stage's folder, such as runs/harbour/sft, or a model's; or a mixture: 0.3*A + 0.7*B", positional=True)
    system: str | None = opt(None, "a system turn")
    temperature: float | None = opt(None, "of sampling; 0 takes the most likely token; default: as the stage's evaluation", ge=0)
    max_new: int = opt(64, "tokens an answer may have", ge=1)
    seed: int = opt(0, "of the samples", ge=0)
    once: str | None = opt(None, "ask this and end")
    json_: bool = opt(False, "print each answer as a line of JSON")


class Answer(NamedTuple):
    """What the model said; `dropped`: messages at the start that no longer fitted the window."""

    text: str
    finish: str
    tokens: int
    dropped: int


def model_folder(place: str, needs: str = "config.json") -> str:
    """The model of a stage, or of a folder that is one, a hub name, or a mixture. Raises UserError for the folder of a whole run."""
    if is_mixture(place):
        return " + ".join(f"{weight}*{model_folder(name, needs)}" for name, weight in parse_mixture(place).items())
    folder = Path(place)
    if (folder / "model").is_dir():
        return str(folder / "model")
    inside = sorted(p.name for p in folder.iterdir() if (p / "model").is_dir()) if folder.is_dir() else []
    if inside:
        raise UserError(f"{place}: a run with the stages {', '.join(inside)}; say which: temper chat {folder / inside[-1]}")
    if folder.is_dir() and not (folder / needs).exists() and not (folder / "adapter_config.json").exists():
        raise UserError(f"{place}: holds no model; give the folder of a stage that is done")
    return place


class Conversation:
    """Turns so far, and the model that continues them."""

    def __init__(self, model: Any, tokenizer: Any, settings: Chat) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.system = settings.system
        stage = Path(settings.stage.rstrip("/").removesuffix("/model"))
        self.temperature = evaluated_at(stage) if settings.temperature is None else settings.temperature
        self.turns: list[Message] = []
        self.asked = 0

    @property
    def chat(self) -> bool:
        """Does the model have a chat template?"""
        return bool(self.tokenizer.chat_template)

    def say(self, text: str, heard: Callable[[str], None] | None = None) -> Answer:
        """The model's answer to the next user turn. Raises UserError where even that turn alone is too long; it is then forgotten.

        heard: given the answer's text piece by piece as it comes.
        """
        s = self.settings
        turns = [*self.turns, Message(role="user", content=text)]
        head = [Message(role="system", content=self.system)] if self.system else []
        window = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        dropped = 0
        ids = render_prompt(self.tokenizer, [*head, *turns])
        while len(ids) + s.max_new > window and len(turns) > 1:
            turns, dropped = turns[2:], dropped + 2
            ids = render_prompt(self.tokenizer, [*head, *turns])
        if len(ids) + s.max_new > window:
            raise UserError(
                f"{len(ids)} tokens and --max-new {s.max_new} do not fit the model's window of {window}; say less, or lower --max-new"
            )
        sampling = Sampling(temperature=self.temperature, max_new=s.max_new)
        tokens: list[int] = []
        said = ""
        for step in stream(self.model, Request([ids], sampling=sampling, stop=stop_ids(self.tokenizer), seed=(s.seed, self.asked))):
            tokens.append(step.token)
            answer = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            if heard and answer.startswith(said) and not answer.endswith("\ufffd"):  # else half a character, which the next token ends
                heard(answer[len(said) :])
                said = answer
        assert step.rollout is not None
        if heard and answer.startswith(said):
            heard(answer[len(said) :])
        self.turns = [*turns, Message(role="assistant", content=answer)]
        self.asked += 1
        return Answer(answer, step.rollout.finish, len(tokens), dropped)

    def command(self, line: str) -> str | None:
        """What a line that begins with / does; None: end."""
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return None
        if word == "/reset":
            self.turns = []
            return "the conversation is forgotten" + (", the system turn stays" if self.system else "")
        if word == "/system":
            self.system = rest.strip() or None
            return f"system: {self.system}" if self.system else "no system turn"
        return f"no command {word}; {COMMANDS}"


def _lines(quiet: bool) -> Iterator[str]:
    with contextlib.suppress(ImportError):  # history and editing of the line, where the system has them
        import readline  # noqa: F401
    while True:
        try:
            yield input("" if quiet else "you> ")
        except EOFError:
            if not quiet:
                print()
            return


def read(argv: list[str]) -> Chat:
    """What is asked for. Raises UserError for wrong flags, and for a folder without a model."""
    s = parse(Chat, argv, "temper chat", EXAMPLES)
    model_folder(s.stage)
    if s.once is not None and not s.once.strip():
        raise UserError("--once: is empty; give some text")
    return s


def main(argv: list[str]) -> int:
    s = read(argv)
    talk = Conversation(*load_askable(model_folder(s.stage)), s)
    console = Console(highlight=False)

    def tell(text: str) -> None:
        if not s.json_:
            console.print(Text(clean(text), style="dim"))

    def respond(text: str) -> None:
        answer = talk.say(text, None if s.json_ else lambda piece: console.print(Text(clean(piece)), end="", soft_wrap=True))
        if s.json_:
            print(
                json.dumps({"prompt": text, "answer": answer.text, **{k: v for k, v in answer._asdict().items() if k != "text"}}),
                flush=True,
            )
        else:
            console.print(Text(("" if answer.text else "(nothing)") + (" \u2026" if answer.finish == "length" else ""), style="dim"))
            if answer.dropped:
                tell(f"(the oldest {answer.dropped} turns no longer fitted the model's window and were left out)")

    if s.once is not None:
        respond(s.once)
        return 0
    tell(
        f"{s.stage}: {COMMANDS}"
        if talk.chat
        else f"{s.stage} has no chat template: a base model, which continues what you write. {COMMANDS}"
    )
    for line in _lines(s.json_ or not sys.stdin.isatty()):
        if line.startswith("/"):
            said = talk.command(line.strip())
            if said is None:
                return 0
            tell(said)
        elif line.strip():
            try:
                respond(line)
            except UserError as error:
                tell(str(error))
                if s.json_:
                    print(json.dumps({"prompt": line, "error": str(error)}), flush=True)
    return 0
