"""What papers say of the choices, and how far each claim goes: the only place where the advice quotes them."""

from typing import NamedTuple


class Claim(NamedTuple):
    """What a paper says, and how far that goes."""

    arxiv: str
    text: str
    limit: str


LITERATURE = {
    "lora": Claim(
        "2405.09673",
        "LoRA equals full fine-tuning on instruction data; on code and maths it learns less and forgets less"
        " (HumanEval .358 at rank 16 against .497, what was known before .646 against .446)",
        "one family of models, rates matched by a sweep; what is forgotten was not measured here",
    ),
    "prompt-tuning": Claim(
        "2104.08691",
        "prompt tuning meets full fine-tuning at about 10 billion parameters; below that it trails prefix tuning, LoRA and full",
        "a statement on scale, on classification-like tasks; its parameters are k x width, for example 100 x 4,096 = 409,600",
    ),
    "few": Claim(
        "2305.16938",
        "models of 6.7 to 30 billion parameters fine-tuned on 16 examples generalise out of domain as well as or better than with the"
        " examples in the prompt; that fewer than 50 examples overfit and few-shot is safer is folklore",
        "classification; a very small model cannot learn from examples in its prompt at all",
    ),
    "nll": Claim(
        "2203.02155",
        "the validation loss overfits after one pass while further passes still raise the reward model's score and people's preference",
        "so a likelihood is not quality: read the answers, or give --reward",
    ),
    "amount": Claim(
        "2305.11206",
        "1,000 curated demonstrations made a good assistant of a 65B model, fewer than 2,000 were unstable at 7B; others used 27,540"
        " (arXiv:2307.09288) and 939,344 (arXiv:2411.15124)",
        "no number holds for every task: what your own rows are worth is measured by giving --data and --model",
    ),
    "qlora": Claim(
        "2305.14314",
        "LoRA on weights in four bits; a 7B model fits one consumer GPU at usual lengths only so",
        "on a GPU with bitsandbytes (--quantise 4bit)",
    ),
    "dpo": Claim(
        "2305.18290",
        "pairs are learned from directly, without sampling and without a reward model; the reference's log-probs can be written beforehand,"
        " so that one model is held",
        "whether it equals PPO is contested: see the next reason",
    ),
    "online": Claim(
        "2404.10719",
        "tuned PPO beat DPO on every task of that study; online methods beat offline ones at equal KL (arXiv:2405.08448)",
        "elsewhere PPO was comparable at a cost many times as high (arXiv:2411.15124)",
    ),
    "kto": Claim(
        "2402.01306",
        "thumbs alone matched DPO from 1B to 30B parameters, also with 90% fewer good answers",
        "the authors' own comparison; needs both thumbs up and down",
    ),
    "grpo": Claim(
        "2402.03300",
        "several answers to each prompt are compared with each other: no value network; the reward can be a program's verdict"
        " (arXiv:2501.12948)",
        "a prompt whose answers are all right or all wrong teaches nothing, so the model must sometimes be right already",
    ),
    "people": Claim(
        "2203.02155",
        "people agreed on 72.6% and 77.3% of comparisons; 63% in arXiv:2204.05862. A comparison cost $0.30 (arXiv:2305.14387)",
        "InstructGPT ranked 4 to 9 answers to each of 33,207 prompts; nobody has shown how few would do",
    ),
    "principles": Claim(
        "2212.08073",
        "written principles replaced labels of harmfulness: critiques, revisions, and comparisons by the model",
        "for harmlessness alone: helpfulness came from 135,296 human comparisons",
    ),
}
