"""`sgopd serve-teacher MODEL`: last hidden states of a model, for trainers on other machines.

    SGOPD_TEACHER_KEY=… sgopd serve-teacher MODEL --host 0.0.0.0 --port 8000 --dtype bfloat16

What it takes and gives is in `sgopd.teachers.served`. One request at a time goes through the model; others wait their
turn. Whoever has the key can read the model's head and its hidden states.
"""

from __future__ import annotations

import hmac
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from sgopd.config import Config, UserError
from sgopd.models import head_of, hidden_states, load_frozen

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise UserError(f"serve-teacher needs starlette and uvicorn ({error}): pip install starlette uvicorn") from error


@dataclass(frozen=True)
class Options:
    """Of the command."""

    model: str
    name: str
    host: str
    port: int
    dtype: str
    max_tokens: int  # of a text
    max_body: int  # bytes of a request
    use_cpu: bool


def application(model: PreTrainedModel, options: Options, key: str | None) -> Starlette:
    """The server. Without a key it answers everybody, which `serve` allows on this machine alone."""
    head = head_of(model)
    vocabulary = head.weight.shape[0]
    one_at_a_time = threading.Lock()

    def allow(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise HTTPException(401, "the key is missing or wrong")

    async def body_of(request: Request) -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > options.max_body:
                raise HTTPException(413, f"the request has more than {options.max_body} bytes (--max_body)")
        return bytes(body)

    async def models(request: Request) -> Response:
        allow(request)
        facts = {"logit_scale": head.logit_scale, "softcap": head.softcap, "max_model_len": options.max_tokens}
        return JSONResponse({"object": "list", "data": [{"id": options.name, "owned_by": "sgopd", **facts}]})

    async def give_head(request: Request) -> Response:
        allow(request)
        tensors = {"weight": head.weight, "bias": head.bias}
        return packed({name: one.cpu() for name, one in tensors.items() if one is not None})

    async def hidden(request: Request) -> Response:
        allow(request)
        texts, starts = read(await body_of(request), vocabulary, options.max_tokens)

        def work() -> bytes:
            with one_at_a_time:
                return save({"hidden": hidden_of(model, texts, starts)})

        return Response(await run_in_threadpool(work), media_type="application/octet-stream")

    routes = [
        Route("/v1/models", models),
        Route("/v1/head", give_head),
        Route("/v1/hidden", hidden, methods=["POST"]),
    ]
    return Starlette(routes=routes)


def packed(tensors: dict[str, Tensor]) -> Response:
    return Response(save(tensors), media_type="application/octet-stream")


def read(body: bytes, vocabulary: int, room: int) -> tuple[list[list[int]], list[int]]:
    """The texts of a request, and where scoring begins in each; HTTPException 400 where it is none."""
    try:
        given = load(body)
        ids, lengths, starts = (given[name].flatten().long() for name in ("ids", "lengths", "starts"))
    except Exception as error:  # safetensors has its own
        raise HTTPException(400, f"not a request of this program: {type(error).__name__}: {error}") from error
    if not (len(lengths) == len(starts) > 0 and int(lengths.sum()) == len(ids) and bool((lengths >= 2).all())):
        raise HTTPException(400, "lengths and starts do not belong to ids: every text has two tokens or more")
    if int(lengths.max()) > room:
        raise HTTPException(400, f"a text has {int(lengths.max())} tokens, more than {room} (--max_tokens)")
    if not bool(((starts >= 1) & (starts < lengths)).all()):
        raise HTTPException(400, "a text is scored from its second token on at the earliest, and has one to score")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise HTTPException(400, f"token ids from {int(ids.min())} to {int(ids.max())}: the head has {vocabulary} rows")
    return [part.tolist() for part in ids.split(lengths.tolist())], starts.tolist()


@torch.no_grad()
def hidden_of(model: PreTrainedModel, texts: list[list[int]], starts: list[int]) -> Tensor:
    """[N, H]: of the positions that predict each text's tokens from its start on."""
    B, T = len(texts), max(map(len, texts))
    ids_BT, mask_BT = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.long)
    for row, text in enumerate(texts):
        ids_BT[row, : len(text)], mask_BT[row, : len(text)] = torch.tensor(text), 1
    hidden_BTH = hidden_states(model, ids_BT.to(model.device), mask_BT.to(model.device))
    parts = [hidden_BTH[row, start - 1 : len(text) - 1] for row, (text, start) in enumerate(zip(texts, starts))]
    return torch.cat(parts).cpu()


def serve(options: Options) -> int:
    """Loads the model and serves it until a signal."""
    key = os.environ.get("SGOPD_TEACHER_KEY")
    if key is None and options.host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(
            f"--host: got {options.host!r} without a key, so that everybody on the network could read the model. Put a "
            "secret into the environment, as SGOPD_TEACHER_KEY, here and where the trainer runs"
        )
    config = Config(options.model, options.model, "", "", teacher_dtype=options.dtype)  # type: ignore[arg-type]
    device = torch.device("cpu" if options.use_cpu or not torch.cuda.is_available() else "cuda")
    model, said = load_frozen(options.model, config, "serve-teacher", device)
    for line in said:
        print(line, file=sys.stderr)
    settings: dict[str, Any] = {"host": options.host, "port": options.port, "log_level": "warning"}
    print(f"{options.name} at http://{options.host}:{options.port}", flush=True)
    uvicorn.run(application(model, options, key), **settings)
    return 0
