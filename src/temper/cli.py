"""The command line: command -> module, imported when it is asked for. No logic. Floor 9.

A command's module has `read(argv)`, which checks what is asked for, and `main(argv)`, which does it.
"""

import sys
from importlib import import_module

from temper.config import UserError
from temper.hollow import hollow

COMMANDS = {  # command -> (module with read(argv) and main(argv) -> exit code, what it does)
    "run": ("temper.ladder.run", "run a recipe of stages; without arguments the embedded ladder"),
    "pretrain": ("temper.ladder.by_hand", "train a tokenizer and a language model from plain text"),
    "sft": ("temper.ladder.by_hand", "teach a base model to answer, from demonstrations"),
    "collect": ("temper.ladder.by_hand", "have the embedded world's annotators compare a model's answers"),
    "reward": ("temper.ladder.by_hand", "train a reward model from pairs of answers"),
    "process-reward": ("temper.ladder.by_hand", "train a model that rates each step of a solution"),
    "ppo": ("temper.ladder.by_hand", "train a policy against a reward model"),
    "grpo": ("temper.ladder.by_hand", "train a policy by comparing answers to a prompt: GRPO, RLOO, DAPO, ..."),
    "dpo": ("temper.ladder.by_hand", "train on preference pairs or rankings directly"),
    "rdpo": ("temper.ladder.by_hand", "DPO for labels of which a known share is flipped"),
    "ipo": ("temper.ladder.by_hand", "pairs: lead each margin to a place of its own"),
    "hinge": ("temper.ladder.by_hand", "pairs: learn each up to a margin, then leave it alone (SLiC)"),
    "lndpo": ("temper.ladder.by_hand", "DPO on log-ratios per token, where answers differ in length"),
    "rpo": ("temper.ladder.by_hand", "DPO and the likelihood of the chosen answer"),
    "simpo": ("temper.ladder.by_hand", "pairs without a reference, by likelihood per token"),
    "orpo": ("temper.ladder.by_hand", "imitation and an odds ratio, without a reference, in one stage"),
    "cpo": ("temper.ladder.by_hand", "pairs and imitation, without a reference"),
    "fdpo": ("temper.ladder.by_hand", "DPO under another divergence than the reverse KL"),
    "pldpo": ("temper.ladder.by_hand", "DPO on whole rankings (Plackett-Luce)"),
    "kto": ("temper.ladder.by_hand", "train on answers with a thumb up or down"),
    "bco": ("temper.ladder.by_hand", "thumbs, as a classifier whose logit is the implicit reward"),
    "online-dpo": ("temper.ladder.by_hand", "pairs of the model's own fresh answers, ordered by a rater"),
    "constitution": ("temper.ladder.by_hand", "make a model harmless by written principles"),
    "best-of-n": ("temper.ladder.by_hand", "sample n answers, keep the one that a rater likes best; what each n gives"),
    "rejection": ("temper.ladder.by_hand", "fine-tune on a model's own best answers, in rounds: RFT, RAFT, expert iteration"),
    "mix": ("temper.models.mix", "interpolate the weights of experts into one model: rewarded soups"),
    "front": ("temper.report.front", "draw the trade-off between two rewards: soups, mixed log-probs, trained policies"),
    "adapter": ("temper.models.commands", "merge, combine, export and check adapters"),
    "doctor": ("temper.doctor", "check data, model and settings before training"),
    "advise": ("temper.advise.command", "how to adapt a model to a task: run the rivals, ask, recommend with reasons"),
    "data": ("temper.data.commands", "read, convert and describe data"),
    "probe": ("temper.evals.probes", "show what a reward model can be fooled by"),
    "compare": ("temper.report.compare", "put the same prompts through the stages of a run, side by side"),
    "rate": ("temper.judges.rate", "rate the answers in a file by a reward, before a model is trained on it"),
    "chat": ("temper.report.chat", "talk to a stage"),
    "report": ("temper.report.build", "write report.html and report.json of a run"),
    "world": ("temper.world.show", "look at the embedded world"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: temper COMMAND [OPTIONS]\n\n{lines}\n\ntemper COMMAND --help shows a command's options and examples."


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a check failed, 2 the input was wrong, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"temper {version('temper-lm')}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            raise UserError(f"no command {argv[0]!r}; {f'did you mean {near[0]!r}?' if near else 'temper --help lists them'}")
        module = COMMANDS[argv[0]][0]
        words = argv if module.endswith("by_hand") else argv[1:]
        with hollow():
            import_module(module).read(words)  # --help and mistakes end here, before PyTorch is imported
        return import_module(module).main(words)
    except UserError as e:
        print(f"temper: {e}", file=sys.stderr)
        return e.code
    except KeyboardInterrupt:
        print("temper: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
