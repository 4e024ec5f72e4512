"""OpenAI-compatible endpoints over HTTP: chat completions, asked again while a server is busy or away. Floor 0.

The key comes from an environment variable; it stands in no setting, no message and no file.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from temper.config import UserError

BUSY = (408, 409, 425, 429)  # and 5xx: worth asking again


class Endpoint:
    """A server of chat completions and the model to ask there; safe to use from several threads.

    Args:
        url: with or without /v1, such as http://localhost:8000.
        model: its name on the server.
        key_env: the environment variable that holds the key; one that is not set means that none is needed.
        patience: seconds for which a server that does not answer is asked again.
    """

    def __init__(self, url: str, model: str, *, key_env: str = "OPENAI_API_KEY", patience: float = 120.0, timeout: float = 600.0) -> None:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--endpoint {url}: give http://... or https://...")
        if "@" in url.split("/")[2]:
            raise UserError(f"--endpoint: a name and password stand in the address; put the key into the environment variable {key_env}")
        self.url, self.model, self.key_env, self.patience = url.rstrip("/").removesuffix("/v1"), model, key_env, patience
        key = os.environ.get(key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key = key
        self._client = httpx.Client(timeout=httpx.Timeout(timeout, connect=10.0), headers=headers)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> tuple[str, str]:
        """(the answer's text, why it ended: "stop" or "length"). options: temperature, max_tokens, seed, stop, ...

        Raises UserError where the server refuses, does not answer within `patience`, or answers with something else.
        """
        answer = self._post("/v1/chat/completions", {"model": self.model, "messages": list(messages), **options})
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.url}: an answer without choices[0].message.content; is it an OpenAI-compatible endpoint?") from None
        return text or "", choice.get("finish_reason") or "stop"

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        until, wait = time.monotonic() + self.patience, 0.25
        while True:
            asked = wait
            try:
                response = self._client.post(self.url + path, json=body)
                if response.is_success:
                    return response.json()
                said = " ".join(response.text.split())[:200]
                why = f"status {response.status_code}: {said.replace(self._key, '***') if self._key else said}"
                if response.status_code not in BUSY and response.status_code < 500:
                    hint = f"; is the key in {self.key_env} right?" if response.status_code in (401, 403) else ""
                    raise UserError(f"{self.url}{path}: {why}{hint}")
                after = response.headers.get("retry-after", "")
                asked = max(wait, float(after)) if after.isdigit() else wait
            except httpx.HTTPError as error:
                why = str(error) or type(error).__name__
            except ValueError:
                raise UserError(f"{self.url}{path}: answers with something that is not JSON") from None
            if time.monotonic() + asked > until:
                raise UserError(f"{self.url}: does not answer ({' '.join(why.split())}), asked for {self.patience:.0f} s")
            time.sleep(asked * random.uniform(0.75, 1.25))  # so that many threads do not come back at one moment
            wait = min(2 * wait, 10.0)
