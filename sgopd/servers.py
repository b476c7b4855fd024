"""Requests to a server on which a run depends: the teacher's, or the sampler's.

What fails for a moment is tried again by httpx-retries; what fails for good ends the run, which can be resumed.
"""

from __future__ import annotations

import os
from typing import Any

from sgopd.config import UserError

try:
    import httpx
    from httpx_retries import Retry, RetryTransport
except ImportError as error:
    raise UserError(f"a server needs httpx and httpx-retries ({error}): pip install httpx httpx-retries") from error

TRIES = 6  # of a request: half a minute of waiting in all


class Server:
    """Requests to one address, and what is said when they fail.

    Args:
        whose: "teacher" or "sampler": the settings that errors name begin with it. The secret is in the environment, as
            SGOPD_TEACHER_KEY or SGOPD_SAMPLER_KEY: a setting would be written to config.yaml.
    """

    def __init__(self, whose: str, url: str, timeout: float, connections: int) -> None:
        self.whose, self.url = whose, url.rstrip("/").removesuffix("/v1")
        self.key = f"SGOPD_{whose.upper()}_KEY"
        retry = Retry(
            total=TRIES - 1,
            backoff_factor=0.5,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=["GET", "POST"],
            max_backoff_wait=10.0,
        )
        limits = httpx.Limits(max_connections=connections)
        key = os.environ.get(self.key)
        self.client = httpx.Client(
            transport=RetryTransport(transport=httpx.HTTPTransport(limits=limits), retry=retry),
            timeout=timeout,
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )

    def error(self, said: str) -> UserError:
        return UserError(f"{self.whose}_url: {said}")

    def ask(self, path: str, **content: Any) -> httpx.Response:
        """GET, or POST with `json` or `content`."""
        try:
            reply = self.client.request("POST" if content else "GET", self.url + path, **content)
        except httpx.InvalidURL as error:
            raise self.error(f"got {self.url!r}: {error}. Expected http://HOST:PORT") from error
        except httpx.HTTPError as error:
            raise self.error(
                f"no answer from {self.url}{path} in {TRIES} tries: {type(error).__name__}: {error}. See that the "
                f"server runs and can be reached from here, or raise {self.whose}_timeout; then start again with "
                "--resume_from_checkpoint auto"
            ) from error
        if reply.is_success:
            return reply
        said = f"{self.url}{path} answers {reply.status_code}: {reply.text[:300]}"
        if reply.status_code in (401, 403):
            raise self.error(f"{said}. Put the server's key into the environment, as {self.key}")
        if reply.status_code < 500:
            raise self.error(f"{said}. The server refuses the request as it is: correct what it names")
        raise self.error(
            f"{said}, in {TRIES} tries. See the server's log; then start again with --resume_from_checkpoint auto"
        )

    def models(self) -> list[dict[str, Any]]:
        """What it has, each with its "id"."""
        try:
            models = self.ask("/v1/models").json()["data"]
            return [{**model, "id": str(model["id"])} for model in models]
        except (ValueError, LookupError, TypeError) as error:
            expected = "vLLM's server" + (", or `sgopd serve-teacher`" if self.whose == "teacher" else "")
            raise self.error(f"{self.url}/v1/models is no list of models. Expected {expected}") from error
