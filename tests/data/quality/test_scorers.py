"""A trained scorer, and a judge behind a real HTTP server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import numpy as np
import pytest
from data.quality.conftest import chat, text

from temper.config import UserError
from temper.data.quality.score import FEATURES, auc, features, fit


def labelled(n=40):
    good = [chat(f"Explain {text(5, k)}", f"Step by step: {text(20, k)}") | {"label": True} for k in range(n)]
    return good + [chat(f"Explain {text(5, k)}", f"lol whatever {text(20, k + n)}") | {"label": 0} for k in range(n)]


@pytest.mark.slow
def test_the_scorer_learns_what_the_labels_say_and_shows_how_well(look, put):
    path = put("labelled.jsonl", labelled())
    found, report = look("score", [chat("Explain it", "Step by step: it is so"), chat("Explain it", "lol whatever")], labelled=path)
    assert list(found) == [1]
    assert found[1].score < 0.5
    assert report.numbers["auc"] == 1.0
    assert report.numbers["accuracy"]["n"] == 80
    assert "AUC 1.00" in report.notes[0]


def test_labels_without_meaning_score_as_chance(look, put):
    rows = [chat("Q", text(30, k)) | {"label": k % 2} for k in range(120)]
    _, report = look("score", [chat("Q", "A")], labelled=put("l.jsonl", rows))
    assert 0.3 < report.numbers["auc"] < 0.7  # measured on rows it has not seen


def test_fit_is_logistic_regression():
    """The gradient of the penalised loss is zero at the solution."""
    texts = [features(text(6, k)) for k in range(30)]
    labels = np.array([k % 3 == 0 for k in range(30)], float)
    scorer = fit(texts, labels)
    x = np.zeros((30, FEATURES))
    for row, at in zip(x, texts, strict=True):
        row[at] = len(at) ** -0.5
    off = 1 / (1 + np.exp(-(x @ scorer.weights + scorer.bias))) - labels
    assert np.abs(x.T @ off / 30 + 1e-4 * scorer.weights).max() < 1e-4
    assert scorer(text(6, 3)) == pytest.approx(off[3] + labels[3])


def test_auc_counts_ties_half():
    assert auc(np.array([0.9, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0])) == pytest.approx(3.5 / 4)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([chat("Q", "A")], r"l\.jsonl:1: field 'label' is None"),
        ([chat("Q", "A") | {"label": 1}] * 9, "9 rows labelled 1 and 0 labelled 0"),
        ([{"label": 1, "strange": 2}], r"l\.jsonl:1: a row of no known format"),
    ],
)
def test_bad_labels_are_refused(look, put, rows, match):
    with pytest.raises(UserError, match=match):
        look("score", [chat("Q", "A")], labelled=put("l.jsonl", rows))


# ---------------------------------------------------------------- the judge


@pytest.fixture
def server():
    """A chat endpoint that rates by the length of the answer; `plan` holds replies to give first."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        plan: ClassVar[list] = []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            status, said = self.plan.pop(0) if self.plan else (200, None)
            if said is None:
                question, answer = body["messages"][0]["content"].split("<<<\nUSER: ")[1].split("\n>>>")[0].split("\n\nANSWER: ")
                rated = {"clarity": 1 if question == "?" else 5, "quality": min(5, len(answer.split()))}
                said = f"<think>{{so}}</think> {json.dumps(rated)}"
            out = json.dumps({"choices": [{"message": {"content": said}}]} if said != "garbage" else {"oops": 1}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(out)))
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", Handler, seen
    httpd.shutdown()
    httpd.server_close()


ROWS = [chat("Why?", "one two three four five"), chat("?", "one two three four five"), chat("Why?", "one {two}")]


def test_a_judge_rates_clarity_and_quality(look, server, monkeypatch):
    url, _, seen = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    found, report = look("judge", ROWS, endpoint=url, judge_model="m", min_clarity=2, min_quality=3)
    assert {i: v.why for i, v in found.items()} == {1: "rated low: clarity 1 < 2", 2: "rated low: quality 2 < 3"}
    assert report.numbers["quality"] == {"1": 0, "2": 1, "3": 0, "4": 0, "5": 2}
    path, key, body = seen[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("m", 0)
    assert not look("judge", ROWS[1:], endpoint=url, judge_model="m", min_quality=2)[0]


def test_many_rows_come_out_in_their_order(look, server):
    rows = [chat("Why?", " ".join(["word"] * (1 + k % 5))) for k in range(60)]
    found, _ = look("judge", rows, endpoint=server[0], judge_model="m", min_quality=5, at_once=3)
    assert sorted(found) == [k for k in range(60) if k % 5 != 4]
    assert all(v.score == 1 + k % 5 for k, v in found.items())


@pytest.mark.slow
def test_a_busy_server_is_asked_again_and_an_unreadable_reply_removes_the_row(look, server):
    url, handler, seen = server
    handler.plan = [(503, "busy"), (429, "slow"), (200, "I would say four")]
    found, _ = look("judge", ROWS[:1], endpoint=url, judge_model="m", min_quality=1, patience=5)
    assert len(seen) == 3
    assert found[0].why == "no rating: the judge said 'I would say four'"


@pytest.mark.parametrize(
    ("plan", "match", "asked"),
    [([(404, "x")], "status 404", 1), ([(500, "x")] * 3, "status 500", 1), ([(200, "garbage")], "is it an OpenAI-compatible endpoint", 1)],
)
def test_a_server_that_fails_is_one_clear_line(look, server, plan, match, asked):
    url, handler, seen = server
    handler.plan = list(plan)
    with pytest.raises(UserError, match=match):
        look("judge", ROWS[:1], endpoint=url, judge_model="m", min_quality=1, patience=0.1)
    assert len(seen) == asked


def test_no_server_and_no_rating_asked_for(look):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9: does not answer"):
        look("judge", ROWS[:1], endpoint="http://127.0.0.1:9", judge_model="m", min_quality=1, patience=0.1)
    with pytest.raises(ValueError, match="no rating is asked for"):
        look("judge", ROWS, endpoint="http://x", judge_model="m")
