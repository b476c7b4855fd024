"""A teacher on a server: what a run makes of one that is right, slow, broken, or another than it was."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, load_file, save

pytest.importorskip("httpx_retries", reason="the extra `server` is not installed")
pytest.importorskip("starlette", reason="the extra `server` is not installed")
import httpx
import uvicorn

from sgopd import servers
from sgopd.cli import main
from sgopd.config import Config, UserError
from sgopd.teachers.serve import Options, application
from sgopd.teachers.served import request
from sgopd.trainer import Trainer

sys.path.append(str(Path(__file__).resolve().parent.parent))
import vllm_stub


class Stub(vllm_stub.Server):
    """vLLM's prompt_logprobs, from a model in this process."""

    def __init__(self, model, tokenizer) -> None:
        super().__init__(Handler)
        self.model, self.tokenizer = model, tokenizer
        self.requests, self.busy, self.most = 0, 0, 0


class Handler(vllm_stub.Answers):
    server: Stub
    DEAD, SLOW = "out of memory", 1.0

    def do_GET(self) -> None:
        self.models("big")

    def do_POST(self) -> None:
        stub, body = self.server, self.asked()
        stub.requests += 1
        if self.fails():
            return None
        assert self.path == "/v1/completions" and body["temperature"] == 1 and body["max_tokens"] == 1
        if max(map(max, body["prompt"])) >= stub.model.config.vocab_size:
            return self.reply(400, {"error": "Token id 40 is out of vocabulary"})
        stub.busy += 1
        stub.most = max(stub.most, stub.busy)
        choices = [self.choice(index, ids, body["prompt_logprobs"]) for index, ids in enumerate(body["prompt"])]
        stub.busy -= 1
        self.reply(200, {"choices": stub.spoil(choices[::-1])})

    def choice(self, index: int, ids: list[int], k: int) -> dict:
        with torch.no_grad():
            logprobs = self.server.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        entries: list[dict | None] = [None]
        for id, row in zip(ids[1:], logprobs):
            order = row.argsort(descending=True).tolist()
            chosen = dict.fromkeys([id, *order[:k]])
            words = {one: self.server.tokenizer.decode([one]) for one in chosen}
            entries.append(
                {
                    str(one): {"logprob": row[one].item(), "rank": order.index(one) + 1, "decoded_token": words[one]}
                    for one in chosen
                }
            )
        return {"index": index, "prompt_logprobs": entries}


@pytest.fixture(scope="module")
def tiny(tiny, tmp_path_factory):
    """The same with heads that have no row beyond the tokenizer: a server says nothing of its own rows."""
    folder = tmp_path_factory.mktemp("models")
    rows = len(tiny.make_tokenizer())
    for name, seed, width, layers in (("student", 1, 16, 1), ("teacher", 2, 24, 2)):
        tiny.make_model(seed, width, layers, rows).save_pretrained(folder / name)
        tiny.make_tokenizer().save_pretrained(folder / name)
    return SimpleNamespace(**{**vars(tiny), "student": folder / "student", "teacher": folder / "teacher", "rows": rows})


@pytest.fixture
def settings(settings, tiny):
    paths = {"model_name_or_path": str(tiny.student), "teacher_model_name_or_path": str(tiny.teacher)}
    return lambda **changes: settings(**{**paths, **changes})


@pytest.fixture
def stub(tiny):
    from transformers import AutoModelForCausalLM

    with Stub(AutoModelForCausalLM.from_pretrained(tiny.teacher), tiny.make_tokenizer()).serving() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No waiting between tries."""
    monkeypatch.setattr(servers.Retry, "_calculate_backoff", lambda self: 0.0, raising=False)
    monkeypatch.setattr(servers, "TRIES", 3)


@pytest.fixture
def served(settings, tiny, stub, tmp_path):
    """A trainer whose teacher is the stub."""

    def make(name="served", **changes):
        values = {"teacher_url": stub.url, "teacher_model_name_or_path": "big", "teacher_top_k": 32, **changes}
        values["output_dir"] = str(tmp_path / name)
        said = []
        trainer = Trainer(Config.load(None, settings(**values)), say=said.append)
        trainer.said = said
        return trainer

    return make


def updates(trainer):
    records = []
    trainer.on_record = records.append
    trainer.train()
    weights = load_file(trainer.run_dir / "final" / "model.safetensors")
    return [record for record in records if record["kind"] == "train"], weights


@pytest.mark.parametrize(
    ("estimator", "k", "gate"),
    [("full", 32, "sg-opd"), ("sampled", 5, "sg-opd"), ("full", 32, "r2-opd"), ("sampled", 5, "rg-opd")],
)
def test_a_served_teacher_trains_as_the_one_in_the_process(served, trainer, tiny, stub, estimator, k, gate):
    """With all of the vocabulary for its top k, the loss is the exact one; requests fail and are slow on the way."""
    changes = {"estimator": estimator, "precision": "exact", "num_iterations": 2 if estimator == "full" else 1}
    changes |= {"gate": gate, "gate_sharpness": 0.3}
    expected, weights = updates(trainer(**changes))
    one = served(
        teacher_top_k=k,
        teacher_copy=str(tiny.teacher),
        per_device_train_batch_size=4,
        **changes,
        gradient_accumulation_steps=2,
        teacher_connections=2,
    )
    assert any(
        re.search(r"the local copy's log-probabilities differ by \d\S* nats at most", line) for line in one.findings
    )
    stub.faults = ["500", "", "cut", "", "slow", "500"]
    found, ours = updates(one)
    assert stub.most <= 2 and not stub.faults
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert [name in a for name in ("kl", "entropy/teacher")] == [estimator == "full"] * 2
        assert a["gate/agree_fraction"] == pytest.approx(b["gate/agree_fraction"])
    for name, weight in weights.items():
        assert (ours[name] - weight).abs().max() < 1e-4, name


def test_few_columns_are_a_lower_bound_with_the_own_token_among_them(served, trainer):
    whole = updates(trainer(max_steps=1, gate="opd", precision="exact"))[0][0]
    few = updates(served(teacher_top_k=4, max_steps=1, gate="opd", precision="exact"))[0][0]
    assert 0.3 * whole["kl"] < few["kl"] < whole["kl"]
    assert few["logratio/mean"] == pytest.approx(whole["logratio/mean"], rel=1e-4)


def nan(choices):
    next(iter(choices[0]["prompt_logprobs"][-1].values()))["logprob"] = math.nan
    return choices


def other_token(choices):
    entry = choices[0]["prompt_logprobs"][-1]
    choices[0]["prompt_logprobs"][-1] = {
        next(str(n) for n in range(9) if str(n) not in entry): {"logprob": -1.0, "rank": 1}
    }
    return choices


SPOILT = {
    "truncated": (
        lambda choices: [{**c, "prompt_logprobs": c["prompt_logprobs"][:-1]} for c in choices],
        "positions for",
    ),
    "lost": (lambda choices: choices[1:], "choices for"),
    "not echoed": (other_token, "is not in its own position"),
    "NaN": (nan, "log-probabilities that are not finite"),
    "no list": (lambda choices: None, "TypeError"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_an_answer_that_is_none_is_refused(served, stub, name):
    stub.spoil, said = SPOILT[name]
    with pytest.raises(UserError, match=rf"did not answer as vLLM does: .*{said}"):
        served(teacher_top_k=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 0.7}, "temperature: got 0.7, expected 1: .*at temperature 1 alone"),
        ({"divergence": "forward-kl"}, "divergence: got 'forward-kl', expected reverse-kl"),
        ({"cold_start_steps": 3}, "cold_start_steps: got 3, expected 0 with teacher_url: a served teacher scores"),
        ({"teacher_model_name_or_path": "bigger"}, r"has no model 'bigger'. With teacher_url it is the name .*: big$"),
        ({"max_completion_length": 260}, "can have 26. tokens, and .* takes 256, .*--max-model-len"),
        ({"teacher_url": "ftp://x"}, "expected http://HOST:PORT"),
        ({"teacher_url": "http://127.0.0.1:9"}, "no answer from http://127.0.0.1:9/v1/models in 3 tries: ConnectError"),
    ],
)
def test_what_cannot_work_is_refused_with_the_remedy(served, changes, said):
    with pytest.raises(UserError, match=said):
        served(**changes)


def test_the_self_test_finds_another_tokenizer_vocabulary_and_wrong_numbers(served, stub, tiny, monkeypatch):
    stub.tokenizer = SimpleNamespace(decode=lambda ids: "abcdefghijklmnopqrstuvwxyzABCDEF"[ids[0]])
    with pytest.raises(UserError, match=r"reads \d+ of \d+ tokens otherwise than the student's tokenizer: id"):
        served()
    stub.tokenizer = tiny.make_tokenizer()
    with pytest.raises(UserError, match=r"gives other log-probabilities than teacher_copy .*nats at the median"):
        served(teacher_copy=str(tiny.student))
    stub.spoil = lambda choices: [noisy(choice, stub.requests) for choice in choices]
    with pytest.raises(UserError, match=r"for the same tokens asked twice \(by up to"):
        served()


def noisy(choice, number):
    for entry in choice["prompt_logprobs"][1:]:
        for one in entry.values():
            one["logprob"] -= number
    return choice


def test_a_server_with_other_weights_ends_the_run_and_its_own_go_on(served, stub, tiny):
    from transformers import AutoModelForCausalLM

    right, wrong = stub.model, AutoModelForCausalLM.from_pretrained(tiny.student)
    whole = updates(served("whole"))[1]
    one = served(save_steps=2)

    def swap(record):
        if record["kind"] == "train" and record["step"] == 2:
            stub.model = wrong

    one.on_record = swap
    with pytest.raises(UserError, match=r"for the same tokens in the middle of the run .*it has other weights now"):
        one.train()
    with pytest.raises(UserError, match="resume_from_checkpoint: the weights of teacher_model_name_or_path"):
        served(save_steps=2, resume_from_checkpoint="auto")
    stub.model = right
    resumed = updates(served(save_steps=2, resume_from_checkpoint="auto"))[1]
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_a_server_that_dies_ends_the_run_in_words_and_it_goes_on(served, stub):
    one = served(save_steps=1, max_steps=3)

    def die(record):
        stub.faults += ["500"] * 50 * (record["kind"] == "train" and record["step"] == 1)

    one.on_record = die
    with pytest.raises(
        UserError, match=r"answers 500: .*out of memory.*, in 3 tries. See the server's log; then start"
    ):
        one.train()
    stub.faults = []
    assert [
        record["step"] for record in updates(served(save_steps=1, max_steps=3, resume_from_checkpoint="auto"))[0]
    ] == [2, 3]


# --- sgopd serve-teacher ---


@pytest.fixture
def hidden_server(tiny):
    """Serves the tiny teacher in a dtype, with a key."""
    from transformers import AutoModelForCausalLM

    started = []

    def start(dtype=torch.float32, key="secret"):
        model = AutoModelForCausalLM.from_pretrained(tiny.teacher, dtype=dtype).eval()
        options = Options("m", "big", "127.0.0.1", 0, str(dtype), max_tokens=64, max_body=4096, use_cpu=True)
        server = uvicorn.Server(uvicorn.Config(application(model, options, key), port=0, log_level="warning"))
        threading.Thread(target=server.run, daemon=True).start()
        while not server.started:
            time.sleep(0.01)
        started.append(server)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server in started:
        server.should_exit = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_from_elsewhere_give_the_exact_loss(served, trainer, hidden_server, monkeypatch, dtype):
    monkeypatch.setenv("SGOPD_TEACHER_KEY", "secret")
    changes = {"temperature": 0.7, "max_steps": 2, "precision": "exact", "teacher_dtype": str(dtype).split(".")[1]}
    expected, weights = updates(trainer(**changes))
    found, ours = updates(served(teacher_url=hidden_server(dtype), **changes))
    close = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(found, expected, strict=True):
        for name in ("loss", "kl", "entropy/teacher"):
            assert a[name] == pytest.approx(b[name], rel=close), name
    assert all((ours[name] - weight).abs().max() < close for name, weight in weights.items())


def test_several_teachers_in_the_process_and_on_servers_of_both_kinds(
    served, trainer, tiny, stub, hidden_server, tmp_path, monkeypatch
):
    """Each prompt's from where its teacher is: the update of all three in the process, and they prefetch."""
    monkeypatch.setenv("SGOPD_TEACHER_KEY", "secret")
    rows = [json.loads(line) for line in tiny.data.read_text().splitlines()]
    data = tmp_path / "routed.jsonl"
    data.write_text("".join(json.dumps(row | {"who": "abc"[n % 3]}) + "\n" for n, row in enumerate(rows)))
    changes = {"dataset_name": str(data), "teacher_column": "who", "precision": "exact", "max_steps": 3}
    paths = {name: str(tiny.teacher) for name in "abc"}
    expected, weights = updates(trainer(**changes, teacher_model_name_or_path=paths))
    urls = {"b": stub.url, "c": hidden_server()}
    elsewhere = {"teacher_model_name_or_path": {**paths, "b": "big", "c": "big"}, "teacher_url": urls}
    one = served(**changes, **elsewhere, teacher_copy={"b": str(tiny.teacher)})
    said = " ".join(one.findings)
    assert said.count("asked twice, its log-probabilities differ") == 2 and said.count("warning: teacher_copy") == 1
    found, ours = updates(one)
    for a, b in zip(found, expected, strict=True):
        names = [
            "loss",
            "gate/agree_fraction",
            *(f"teacher/{name}/{what}" for name in "abc" for what in ("kl", "share")),
        ]
        assert all(a[name] == pytest.approx(b[name], rel=1e-4) for name in names)
    assert all((ours[name] - weight).abs().max() < 1e-4 for name, weight in weights.items())
    sampled = updates(served("sampled", **changes, **elsewhere, estimator="sampled"))[0]
    assert all("teacher/a/kl" in one and "teacher/b/kl" not in one and "kl" not in one for one in sampled)
    with pytest.raises(UserError, match="no model 'bigger'"):
        served("bigger", **changes, **{**elsewhere, "teacher_model_name_or_path": {**paths, "b": "bigger", "c": "big"}})


def test_the_server_of_hidden_states_refuses(served, hidden_server, monkeypatch, capsys):
    url = hidden_server()
    monkeypatch.setenv("SGOPD_TEACHER_KEY", "guess")
    with pytest.raises(
        UserError, match=r"answers 401: .*Put the server's key into the environment, as SGOPD_TEACHER_KEY"
    ):
        served(teacher_url=url)
    right = {"Authorization": "Bearer secret"}

    def post(content, headers=right):
        return httpx.post(f"{url}/v1/hidden", content=content, headers=headers)

    good = save(request([[1, 2, 3], [4, 5]], [1, 1]))
    assert load(post(good).content)["hidden"].shape == (3, 24)
    assert post(good, {}).status_code == post(good, {"Authorization": "Bearer secre"}).status_code == 401
    assert post(b"x" * 5000).status_code == 413
    assert post(b"x" * 100 for _ in range(50)).status_code == 413, "whatever it says of its length"
    for texts, starts in (
        ([[1, 99]], [1]),
        ([[1, -1]], [1]),
        ([[1] * 65], [1]),
        ([[1, 2]], [2]),
        ([[1, 2]], [0]),
        ([[1]], [1]),
    ):
        assert post(save(request(texts, starts))).status_code == 400, (texts, starts)
    assert post(b"{}").status_code == 400
    monkeypatch.delenv("SGOPD_TEACHER_KEY")
    assert main(["serve-teacher", "m", "--host", "0.0.0.0"]) == 1
    assert "--host: got '0.0.0.0' without a key" in capsys.readouterr().err
