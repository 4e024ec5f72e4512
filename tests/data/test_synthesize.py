"""Self-Instruct against a real endpoint: a small model that the test trains, behind http.server and the rollout engine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import pytest
import torch

from temper.client import Endpoint
from temper.config import UserError
from temper.data import synthesize as made
from temper.data.quality.words import words
from temper.data.synthesize import Synthesize, Task, Teacher, instance_of, instructions_of, read_seeds, rouge_l, synthesize
from temper.data.template import attach_default_template, render_prompt, stop_ids
from temper.data.trees import chat_tree
from temper.methods.base import Batching, offline
from temper.methods.sft import lm_loss
from temper.models.load import Size, new_model
from temper.models.tokenizer import train_tokenizer
from temper.records import Chat, Message, read_jsonl
from temper.rollout import Request, Sampling, sample
from temper.train import Optim, fit

VERBS, OBJECTS = ("Describe", "Explain", "Praise", "Compare", "Sort", "Label"), ("boats", "herring", "lanterns", "storms", "nets", "bells")
HOW, WHERE = (
    ("kindly", "briefly", "slowly", "twice", "loudly", "well"),
    ("in winter", "at noon", "by night", "near home", "for sale", "on deck"),
)


def task(rng):
    return f"{rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(HOW)} {rng.choice(WHERE)}."


SEEDS = [
    {
        "id": f"seed_{i}",
        "instruction": task(Random(i)),
        "instances": [{"input": "", "output": "It is so."}],
        "is_classification": i % 4 == 0,
    }
    for i in range(12)
]


class Script(Teacher):
    """What the small model is trained on: a rule's answers to the prompts of Self-Instruct."""

    def __init__(self, seed):
        self.s, self.server, self.judge = Synthesize(seeds="", endpoint="", model="m", out=""), None, None
        self.rng, self.heard = Random(seed), []

    def _ask(self, server, prompt, seed, temperature=0.0):
        first, last = prompt.splitlines()[0], prompt.splitlines()[-1]
        answer = {
            made.NEW: "\n".join(f"{i}. {task(self.rng)}" for i in range(9, 13)),
            made.CLASSIFY: "Yes" if last.split()[1] in ("Sort", "Label") else "No",
            made.INPUT_FIRST: "Input: none\nOutput: It is so.",
            made.OUTPUT_FIRST: "Label: good\nInput: A fine day.",
            made.JUDGE: "4",
        }[first]
        self.heard.append(Chat(messages=[Message(role="user", content=prompt), Message(role="assistant", content=answer)]))
        return answer


@pytest.fixture(scope="module")
def teacher():
    """(model, tokenizer), trained for a few seconds to answer as the script does."""
    torch.set_num_threads(1)
    seeds = [Task(s["id"], s["instruction"], "", "It is so.", s["is_classification"]) for s in SEEDS]
    heard = []
    for k in range(40):
        script = Script(k)
        made.one_round(script.s.model_copy(update={"at_once": 1}), script, seeds, [], k)
        heard += script.heard
    tokenizer = train_tokenizer(("\n".join(m.content for m in c.messages) for c in heard), 420, context=512)
    attach_default_template(tokenizer)
    model = new_model(Size(width=32, layers=2, heads=2, context=512), len(tokenizer), tokenizer, seed=0)
    trees = [chat_tree(tokenizer, chat) for chat in heard]
    batching = Batching(batch=16)
    for _ in fit(model, offline(trees, batching), lm_loss, steps=70, optim=Optim(lr=2e-2, schedule="cosine", warmup=0.1)):
        pass
    return model, tokenizer


@pytest.fixture
def server(teacher):
    """The model as an OpenAI-compatible endpoint. left: requests it answers before it goes away; busy: how often it says so first."""
    model, tokenizer = teacher
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                serving.seen.append((self.headers.get("Authorization"), body))
                serving.left -= 1
                if serving.busy:
                    serving.busy -= 1
                    return self.reply(503, {"error": "busy"})
                if serving.left < 0:
                    return self.reply(500, {"error": "gone"})
                ids = render_prompt(tokenizer, [Message(**m) for m in body["messages"]])
                how = Sampling(temperature=body["temperature"], max_new=min(body["max_tokens"], 80))
                ((answer,),) = sample(model, Request([ids], sampling=how, stop=stop_ids(tokenizer), seed=("http", body["seed"])))
                text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
                return self.reply(200, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": answer.finish}]})

        def reply(self, status, value):
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving.left, serving.busy, serving.seen = 10**9, 0, []
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield serving
    serving.shutdown()
    serving.server_close()


def settings(tmp_path, server, name="made.jsonl", **more):
    seeds = tmp_path / "seeds.jsonl"
    seeds.write_text("".join(json.dumps(row) + "\n" for row in SEEDS))
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    how = {"n": 8, "max_new": 80, "at_once": 2, "patience": 1.0, **more}
    return Synthesize(seeds=str(seeds), endpoint=url, model="small", out=str(tmp_path / name), **how)


@pytest.mark.slow
def test_a_small_model_teaches(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    server.busy = 2
    found = synthesize(settings(tmp_path, server))
    rows = read_jsonl(tmp_path / "made.jsonl", Chat)
    assert found["examples"] == len(rows) == 8
    asked = [row.messages[0].content.split("\n\n")[0] for row in rows]
    every = [s["instruction"] for s in SEEDS] + asked
    assert max(rouge_l(words(a), words(b)) for i, a in enumerate(asked) for b in every[: len(SEEDS) + i]) < 0.7
    for row in rows:
        assert row.meta["teacher"] == "small"
        assert row.meta["mark"] >= 3
        assert len(row.meta["prompt_sha256"]) == 64
        assert {name.split("_")[0].split(":")[0] for name in row.meta["seeds"]} <= {"seed", "made"}
    refused = [json.loads(line) for line in (tmp_path / "made.refused.jsonl").read_text().splitlines()]
    assert len(refused) == found["refused"]
    assert all(row["why"] for row in refused)
    assert {key for key, _ in server.seen} == {"Bearer sk-secret"}
    assert not any(b"sk-secret" in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.slow
def test_an_endpoint_that_goes_away(server, tmp_path):
    """One line; what had come is kept; the same command goes on and gives what an uninterrupted one gives."""
    synthesize(settings(tmp_path, server, "whole.jsonl"))
    asked = len(server.seen)
    server.left = asked // 2
    with pytest.raises(UserError, match=r"does not answer \(status 500.*of 8 examples are kept in .*the same command goes on"):
        synthesize(settings(tmp_path, server))
    assert not (tmp_path / "made.jsonl").exists()
    with pytest.raises(UserError, match="begun with other seeds or settings"):
        synthesize(settings(tmp_path, server, seed=1))
    server.left, before = 10**9, len(server.seen)
    synthesize(settings(tmp_path, server))
    assert len(server.seen) - before < asked  # whole rounds were not asked again
    assert (tmp_path / "made.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    with pytest.raises(UserError, match="is there already"):
        synthesize(settings(tmp_path, server))


def test_rouge_l():
    a, b = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "lay", "on", "a", "mat"]
    assert rouge_l(a, b) == pytest.approx(2 * 4 / 12)  # the cat . on . mat
    assert rouge_l(a, b, floor=0.7) == 0 or rouge_l(a, b, floor=0.7) == pytest.approx(8 / 12)
    assert rouge_l(a, a) == 1
    assert rouge_l([], a) == 0


def test_what_a_teacher_writes_is_read():
    assert instructions_of("9. Name a boat.\n\n10) Praise it.\nTask 11: Sell it.\n- Sink it.") == [
        "Name a boat.",
        "Praise it.",
        "Sell it.",
        "Sink it.",
    ]
    assert instance_of("Input: a\nb\nOutput: c", False) == ("a\nb", "c")
    assert instance_of("Input: None\nOutput: c", False) == ("", "c")
    assert instance_of("Output: c", False) == ("", "c")
    assert instance_of("Label: good\nInput: a day", True) == ("a day", "good")
    assert instance_of("I do not know.", False) is None
    assert instance_of("Input: a\nOutput: ", False) is None


@pytest.mark.parametrize(
    ("instruction", "why"), [("Do it.", "2 words"), ("Draw a map of the town.", "no text"), ("* and what then?", "mark")]
)
def test_instructions_that_are_no_use(instruction, why):
    assert why in made.refused(instruction)
    assert not made.refused("Name three boats in the harbour.")


def test_seeds(tmp_path, real):
    found = read_seeds(str(real / "self-instruct-seed-tasks.jsonl"))
    assert len(found) == 175
    assert sum(t.classification for t in found) == 26
    assert found[0].name == "seed_task_0"
    (tmp_path / "prompts.txt").write_text("Name a boat.\n\nName a bird.\n")
    assert [t.instruction for t in read_seeds(str(tmp_path / "prompts.txt"))] == ["Name a boat.", "Name a bird."]
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x", "instances": []}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:1: not a seed task"):
        read_seeds(str(tmp_path / "bad.jsonl"))


def test_the_key_stays_where_it_is(tmp_path, monkeypatch):
    """A server that repeats the key in its refusal does not bring it into the message."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            data = f"wrong key {self.headers['Authorization']}".encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    serving = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    endpoint = Endpoint(f"http://127.0.0.1:{serving.server_address[1]}", "m", key_env="SOME_KEY", patience=0.5)
    with pytest.raises(UserError, match=r"status 401: wrong key Bearer \*\*\*; is the key in SOME_KEY right") as caught:
        endpoint.chat([{"role": "user", "content": "x"}])
    assert "sk-secret" not in str(caught.value)
    serving.shutdown()
    with pytest.raises(UserError, match="put the key into the environment variable"):
        Endpoint("http://me:secret@host/v1", "m")
