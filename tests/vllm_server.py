"""A small HTTP server in this process that answers as vLLM's does, samples with the native engine, and can fail."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from transformers import AutoModelForCausalLM

from temper.rollout import Request, Sampling, sample


class Server(ThreadingHTTPServer):
    """`fails`: how many requests get `failure` (a status; None: the connection is dropped). `gone`: after so many answers, all do."""

    def __init__(self, model, folder=None, dev=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.folder, self.dev = model, folder, dev
        self.asked, self.calls, self.fails, self.failure, self.gone, self.let = [], [], 0, 503, None, 0
        self.page = None  # what is shown instead of the list of models
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def broken(self):
        with self.lock:
            self.fails -= 1
            if self.fails >= 0 or (self.gone is not None and self.let >= self.gone):
                return True
            self.let += 1
            return False


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.server.page is not None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.page)))
            self.end_headers()
            return self.wfile.write(self.server.page)
        self.answer(200, {"object": "list", "data": [{"id": "policy"}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            server.calls.append((self.path, body))
            if not server.dev:
                return self.answer(404, {"detail": "Not Found"})
            if self.path == "/collective_rpc":
                server.model = AutoModelForCausalLM.from_pretrained(server.folder)
            return self.answer(200, {"results": [None]})
        if server.broken():
            if server.failure is None:
                return self.connection.close()
            return self.answer(server.failure, {"error": {"message": "engine\nis dead"}})
        with server.lock:  # one model, one thread
            server.asked.append(body)
            sampling = Sampling(temperature=body["temperature"], max_new=body["max_tokens"])
            ((one,),) = sample(
                server.model, Request([body["prompt"]], sampling=sampling, stop=body["stop_token_ids"], seed=(body["seed"],))
            )
        choice = {"index": 0, "text": "", "token_ids": one.tokens, "finish_reason": one.finish, "stop_reason": one.stop_reason}
        self.answer(200, {"choices": [choice | {"logprobs": {"token_logprobs": one.logp}}]})
