"""Servers in this process in place of vLLM's: what any of them does; and one of rollouts, with weights from a folder.

The one of a teacher's log-probabilities is in test_teachers.py.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import http_stub
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


class Server(http_stub.Server):
    """`faults` are taken one a request of completions; `spoil` changes every answer."""

    def __init__(self, handler: type[Answers]) -> None:
        super().__init__(handler)
        self.faults: list[str] = []
        self.spoil = lambda choices: choices
        self.room = 256
        self.url += "/v1"


class Answers(http_stub.Answers):
    server: Server
    DEAD, SLOW = "engine is dead", 0.5  # the text of a 500, seconds

    def models(self, name: str) -> None:
        self.reply(200, {"data": [{"id": name, "owned_by": "vllm", "max_model_len": self.server.room}]})

    def asked(self) -> dict:
        return json.loads(self.body() or "{}")

    def fails(self) -> bool:
        """Takes the next fault, if there is one; whether the request has had its end by that."""
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "500":
            self.reply(500, {"error": self.DEAD})
        elif fault == "cut":
            self.connection.close()
        elif fault == "slow":
            time.sleep(self.SLOW)
        return fault in ("500", "cut")


class Stub(Server):
    """vLLM's dialect, over a model in this process. The head is a packed copy, as on vLLM's CPUs.

    `spoil` changes every answer of rollouts.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(Handler)
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.head = self.model.lm_head.weight.detach().clone()
        self.generator = torch.Generator().manual_seed(0)
        self.mode = "processed"
        self.dev, self.paused, self.loaded = True, False, []
        self.lock = threading.Lock()


class Handler(Answers):
    server: Stub

    def do_GET(self) -> None:
        if self.path == "/is_paused":
            return self.reply(200 if self.server.dev else 404, {"is_paused": self.server.paused})
        self.models("small")

    def do_POST(self) -> None:
        stub, body = self.server, self.asked()
        match self.path:
            case "/pause?mode=wait":
                stub.paused = True
            case "/collective_rpc":
                assert stub.paused and body["method"] == "reload_weights"
                self.load(Path(body["kwargs"]["weights_path"]))
            case "/reset_prefix_cache":
                pass
            case "/resume":
                stub.paused = False
            case "/v1/completions":
                if self.fails():
                    return None
                with stub.lock:
                    choices = [self.choice(index, ids, body) for index, ids in enumerate(body["prompt"])]
                choices = choices if "prompt_logprobs" in body else stub.spoil(choices)
                return self.reply(200, {"choices": choices[::-1] if isinstance(choices, list) else choices})
        self.reply(200, {"results": [None]})

    def load(self, folder: Path) -> None:
        stub, weights = self.server, {}
        for file in folder.glob("*.safetensors"):
            weights |= load_file(file)
        stub.loaded.append(folder.name)
        assert not stub.model.load_state_dict(weights, strict=False).unexpected_keys
        if "lm_head.weight" in weights:
            stub.head = weights["lm_head.weight"]

    def logits(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.server.model.model(torch.tensor([ids])).last_hidden_state[0] @ self.server.head.T

    def choice(self, index: int, prompt: list[int], body: dict) -> dict:
        stub, entries = self.server, None
        assert body["repetition_penalty"] == 1 and body["top_p"] == 1 and body["top_k"] == 0
        if "prompt_logprobs" in body:
            rows = self.logits(prompt).log_softmax(-1)
            entries = [None, *({str(id): {"logprob": row[id].item()}} for id, row in zip(prompt[1:], rows))]
        ids, logprobs = [], []
        while len(ids) < body["max_tokens"]:
            logits = self.logits(prompt + ids)[-1]
            for id, bias in (body.get("logit_bias") or {}).items():
                logits[int(id)] += bias
            temperature = body["temperature"] or 1e-6
            tempered = (logits / temperature).log_softmax(-1)
            ids.append(int(torch.multinomial(tempered.exp(), 1, generator=stub.generator)))
            logprobs.append((tempered if stub.mode == "processed" else logits.log_softmax(-1))[ids[-1]].item())
            if ids[-1] in body.get("stop_token_ids", []):
                break
        done = "stop" if ids[-1] in body.get("stop_token_ids", []) else "length"
        found = {"index": index, "token_ids": ids, "finish_reason": done, "logprobs": {"token_logprobs": logprobs}}
        return found if entries is None else {**found, "prompt_logprobs": entries}
