"""Rollouts from a vLLM server, behind the interface of the native engine. Floor 3.

    server = VLLM("http://gpu-box:8000", policy)
    sample(server, Request(prompts, sampling=..., stop=...))    as with a model in the first place
    server.sync(tokenizer, folder)                              after an update: the server reads the policy's weights anew

Each answer is one request to /v1/completions, with the prompt as ids and a seed of its own (seed, prompt, sample), so that vLLM draws it
the same whatever it is batched with, up to rounding; vLLM's prefix cache computes a prompt once. Ids come back as ids (`return_token_ids`).

The weights and the arithmetic of a server are not the trainer's. So every call measures the gap: some of the answers are scored by the
policy here, and the mean |difference| of the log-probs must not exceed `tolerance`. Old weights, another model and log-probs that mean
something else are all found that way: vLLM gives log-probs before the temperature unless it runs with `--logprobs-mode
processed_logprobs`, and after top-k and its like if it does.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch

from temper.config import UserError
from temper.forest import Segment, plant
from temper.models import adapt, adapters
from temper.models.heads import token_logp
from temper.models.load import save
from temper.rollout.engine import Engine, Progress, Request, Rollout, Stop
from temper.rollout.sampling import Sampling, generator

log = logging.getLogger("temper")

CHECKED = 16  # answers of each call that the policy here scores too
AT_ONCE = 64  # requests in flight; vLLM queues what it cannot batch


class Gap(NamedTuple):
    """|log-prob by the server - by the policy here| over the tokens of the answers that were checked, in nats."""

    mean: float
    largest: float
    tokens: int


class VLLM(Engine):
    """A server, and the policy that it should be running.

    Args:
        url: of the server, such as http://localhost:8000.
        policy: the same model here, for the window and the gap.
        name: the model's name on the server; by default the only one it has.
        tolerance: most mean gap in nats; bfloat16 on the server costs about 0.01.
        patience: seconds for which a server that does not answer is asked again.
    """

    def __init__(self, url: str, policy: Any, *, name: str | None = None, tolerance: float = 0.1, patience: float = 120.0) -> None:
        self.url, self.policy, self.name, self.tolerance, self.patience = url.rstrip("/"), policy, name, tolerance, patience
        self.gap: Gap | None = None  # of the last call
        self.kept: dict[tuple[Any, ...], Rollout] = {}  # answers of a call that did not end; the same call goes on from them
        key = os.environ.get("VLLM_API_KEY")
        self.client = httpx.Client(
            base_url=self.url, timeout=httpx.Timeout(600.0, connect=10.0), headers={"Authorization": f"Bearer {key}"} if key else {}
        )

    def sample(self, request: Request, progress: Progress | None = None) -> list[list[Rollout]]:
        """As `temper.rollout.sample`. Raises UserError as well where the server goes away for good, refuses, or has other weights.

        What had come by then is kept, and the same request again asks only for the rest.
        """
        ends = request.check(self.policy)
        prompts, sampling, n, seed, keys = request.prompts, request.sampling, request.n, request.seed, request.keys
        wanted = {
            (i, k): (*seed, keys[i], k, sampling, tuple(request.stop), tuple(prompt)) for i, prompt in enumerate(prompts) for k in range(n)
        }
        missing = [at for at, key in wanted.items() if key not in self.kept]
        left = [sum(at[0] == i for at in missing) for i in range(len(prompts))] if progress else []
        name = self._model() if missing else ""
        with ThreadPoolExecutor(max(1, min(AT_ONCE, sampling.rows, len(missing)))) as pool:
            asked = {
                pool.submit(self._ask, name, prompts[i], sampling, ends, int(generator(*seed, keys[i], k).integers(1 << 31))): (i, k)
                for i, k in missing
            }
            try:
                for answer in as_completed(asked):
                    at = asked[answer]
                    self.kept[wanted[at]] = answer.result()
                    if progress:
                        left[at[0]] -= 1
                        if not left[at[0]]:
                            progress(1)
            except BaseException as error:  # Ctrl-C too
                pool.shutdown(cancel_futures=True)  # waits for those that are on their way
                for answer, at in asked.items():
                    if not answer.cancelled() and answer.exception() is None:
                        self.kept[wanted[at]] = answer.result()
                if not isinstance(error, UserError):
                    raise
                have = sum(key in self.kept for key in wanted.values())
                raise UserError(f"{error}; {have} of {len(wanted)} answers had come and are kept for another try") from None
        answers = [[self.kept[wanted[i, k]] for k in range(n)] for i in range(len(prompts))]
        self.kept = {}  # all of them were of this call, or of one that was given up
        self._measure(prompts, answers, sampling)
        return answers

    def sync(self, tokenizer: Any, folder: str | Path) -> None:
        """Give the server the policy's weights, an adapter merged in: written where the server's model lies, and read by it again.

        folder: what `vllm serve` was started with, on a file system that both see. Needs VLLM_SERVER_DEV_MODE=1 on the server, for
        /collective_rpc and /reset_prefix_cache. Raises UserError where the server will not.
        """
        save(adapt.merged(copy.deepcopy(self.policy)) if adapters.adapted(self.policy) else self.policy, tokenizer, folder)
        self.kept = {}  # answers of the old weights
        self._post("/collective_rpc", {"method": "reload_weights"}, dev=True)
        self._post("/reset_prefix_cache", {}, dev=True)  # the old weights' keys and values

    def _model(self) -> str:
        if self.name is None:
            try:
                have = [one["id"] for one in self._json(self._request("GET", "/v1/models"))["data"]]
            except (KeyError, TypeError):
                raise UserError(f"{self.url}/v1/models: lists no models; is that a vLLM server?") from None
            if len(have) != 1:
                raise UserError(f"{self.url}: serves {', '.join(have) or 'no model'}; say which by name")
            self.name = have[0]
        return self.name

    def _ask(self, name: str, prompt: Sequence[int], sampling: Sampling, stop: Stop, seed: int) -> Rollout:
        body = {
            "model": name,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or -1,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "seed": seed,
            "stop_token_ids": sorted(stop.ids),
            "stop": stop.strings,
            "ignore_eos": True,  # what ends an answer is `stop` alone; vLLM gives no reason for its own end
            "skip_special_tokens": False,  # or stop strings would not see them
            "logprobs": 0,
            "return_token_ids": True,
        }
        answer = self._post("/v1/completions", body)
        try:
            (choice,) = answer["choices"]
            tokens, logp = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            finish, reason = choice["finish_reason"], choice.get("stop_reason")
            if len(tokens) != len(logp) or finish not in ("stop", "length"):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.url}: an answer without token ids and log-probs; it needs vLLM 0.10.2 or newer") from None
        return Rollout(tokens, logp, finish, reason if finish == "stop" else None)

    def _post(self, path: str, body: Mapping[str, Any], dev: bool = False) -> Any:
        response = self._request("POST", path, body, "; start it with VLLM_SERVER_DEV_MODE=1" if dev else "")
        return self._json(response) if response.content.strip() else None

    def _json(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            raise UserError(f"{response.url}: answers, but not in JSON; is that a vLLM server?") from None

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None, hint: str = "") -> httpx.Response:
        """The server's answer, asked again while it does not answer, is too busy or has an error of its own."""
        until, wait = time.monotonic() + self.patience, 0.25
        while True:
            try:
                response = self.client.request(method, path, json=body)
                if response.is_success:
                    return response
                why = f"status {response.status_code}: {response.text.strip()[:200]}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    raise UserError(f"{self.url}{path}: {' '.join(why.split())}{hint if response.status_code == 404 else ''}")
            except httpx.HTTPError as error:
                why = str(error) or type(error).__name__
            if time.monotonic() + wait > until:
                raise UserError(f"{self.url}: the vLLM server does not answer ({' '.join(why.split())}); start it again")
            time.sleep(wait)
            wait = min(2 * wait, 10.0)

    @torch.no_grad()
    def _measure(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[Rollout]], sampling: Sampling) -> None:
        flat = [(prompt, one) for prompt, group in zip(prompts, answers, strict=True) for one in group]
        some = flat[:: max(1, len(flat) // CHECKED)][:CHECKED]
        if not some:
            return
        vocabulary = self.policy.config.get_text_config().vocab_size
        if (largest := max(max(a.tokens) for _, a in some)) >= vocabulary:
            raise UserError(f"{self.url}: answers with token {largest}, and the policy has {vocabulary} tokens: it serves another model")
        trees = [[Segment(p, [0.0] * len(p)), Segment(a.tokens, [1.0] * len(a.tokens), parent=0)] for p, a in some]
        here = token_logp(self.policy, plant(trees).to(self.policy.device), temperature=sampling.temperature or 1.0).cpu()
        off = (here - torch.tensor([x for _, one in some for x in one.logp])).abs()
        self.gap = Gap(float(off.mean()), float(off.max()), len(off))
        log.info("vLLM: log-probs differ from the policy's by %.2g nats on average, %.2g at most (%d tokens)", *self.gap)
        if not self.gap.mean <= self.tolerance:
            raise UserError(
                f"{self.url}: its log-probs differ from the policy's by {self.gap.mean:.2g} nats on average (tolerance {self.tolerance:g}):"
                " other weights (sync them), or a temperature without --logprobs-mode processed_logprobs on the server"
            )
