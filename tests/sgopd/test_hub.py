"""`push_to_hub`, to a server in this process that speaks the hub's protocol as huggingface_hub does."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import time
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from safetensors.torch import load

from sgopd.config import Config, UserError
from sgopd.trainer import Trainer

sys.path.append(str(Path(__file__).resolve().parent.parent))
import http_stub


class Repository(http_stub.Server):
    """One repository: its files by name, what was committed, and who may."""

    TOKEN = "hf_right"

    def __init__(self) -> None:
        super().__init__(Answers)
        self.name, self.made = "", {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.commits: list[tuple[str, set[str]]] = []
        self.broken = False  # after it was opened
        self.slow: Path | None = None  # while this is there, an upload does not go on


class Answers(http_stub.Answers):
    server: Repository

    def do_GET(self) -> None:
        self.reply(404, {"error": "no such file"})

    def do_PUT(self) -> None:
        data = self.body()
        self.server.large[hashlib.sha256(data).hexdigest()] = data
        self.reply(200, {})

    def do_POST(self) -> None:
        repository, path, body = self.server, self.path.partition("?")[0], self.body()
        if self.headers["Authorization"] != f"Bearer {repository.TOKEN}" and "/lfs/" not in path:
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            repository.made = json.loads(body)
            repository.name = f"{repository.made['organization'] or 'someone'}/{repository.made['name']}"
            return self.reply(200, {"url": f"{repository.url}/{repository.name}"})
        if repository.broken:
            return self.reply(507, {"error": "the disk is full"})
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self.reply(200, {"errors": [], "warnings": []})
        if path == f"/api/models/{repository.name}/preupload/main":
            latest = time.monotonic() + 60
            while repository.slow is not None and repository.slow.exists() and time.monotonic() < latest:
                time.sleep(0.01)
            return self.reply(
                200,
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                },
            )
        if path == f"/{repository.name}.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            actions = {"upload": {"href": f"{repository.url}/storage"}}
            return self.reply(200, {"transfer": "basic", "objects": [{**one, "actions": actions} for one in objects]})
        assert path == f"/api/models/{repository.name}/commit/main", path
        lines = [json.loads(line) for line in body.splitlines()]
        summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        names = set()
        for line in lines:
            if line["key"] == "file":
                repository.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "lfsFile":
                repository.files[line["value"]["path"]] = repository.large[line["value"]["oid"]]
            names |= {line["value"]["path"]} if line["key"] != "header" else set()
        repository.commits.append((summary, names))
        return self.reply(
            200,
            {
                "success": True,
                "commitOid": "0" * 40,
                "commitUrl": f"{repository.url}/{repository.name}/commit/{'0' * 40}",
            },
        )


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", Repository.TOKEN)
    for name, value in (("HF_HUB_DISABLE_XET", True), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("sgopd.trainer.write_report", lambda run_dir: None)
    with Repository().serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def run(settings):
    def run(**changes):
        said: list[str] = []
        config = Config.load(None, settings(push_to_hub=True, max_steps=2, **changes))
        return Trainer(config, say=said.append).train(), said

    return run


def test_the_model_is_pushed_with_its_card(hub, run, tiny):
    folder, said = run(
        hub_model_id="a-team/student",
        hub_private_repo=True,
        hub_strategy="every_save",
        save_steps=1,
        eval_dataset_name=str(tiny.data),
        eval_dataset_size=4,
    )
    assert hub.made["visibility"] == "private" and hub.name == "a-team/student"
    model, final = {"config.json", "model.safetensors"}, {path.name for path in (folder / "final").iterdir()}
    (first, began), *_, (last, ended) = hub.commits
    assert (first, last) == ("step 1", "step 2, the last")
    assert model <= began <= final and "README.md" not in began and ended == final
    assert hub.files == {path.name: path.read_bytes() for path in (folder / "final").iterdir()}
    assert len(load(hub.files["model.safetensors"])) > 10
    _, facts, text = hub.files["README.md"].decode().split("---\n")
    assert yaml.safe_load(facts) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sgopd", "on-policy-distillation"],
    }
    assert "gate: sg-opd" in text and "| after | 4 |" in text
    assert str(tiny.folder) not in text, "no paths of this machine"
    assert said[-1] == f"pushed to {hub.url}/a-team/student"


def test_a_push_that_fails_loses_nothing_and_can_be_made_up_for(hub, run):
    hub.broken = True
    folder, said = run(hub_strategy="every_save", save_steps=1)
    assert (folder / "final" / "model.safetensors").is_file() and not hub.commits
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "end"
    assert f"It is whole in {folder}/final. By hand: hf upload someone/run {folder}/final" in said[-1]
    assert "warning: push_to_hub: a checkpoint did not reach someone/run: HfHubHTTPError: " in said[-2]
    hub.broken = False
    _, said = run(resume_from_checkpoint="auto")
    assert "pushed to" in said[-1] and "model.safetensors" in hub.files


def test_a_checkpoint_that_is_pruned_while_it_is_uploaded_arrives(hub, run, tmp_path):
    hub.slow = tmp_path / "run" / "checkpoints" / "step-000001"
    folder, said = run(hub_strategy="every_save", save_steps=1, save_total_limit=1)
    assert not hub.slow.exists() and not [line for line in said if "push_to_hub" in line]
    (message, names), *_ = hub.commits
    assert message == "step 1" and {"config.json", "model.safetensors"} <= names
    assert not list(folder.glob(".push*"))


def test_what_cannot_be_pushed_to_is_refused_at_the_start(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"push_to_hub: cannot open the repository 'run' at .*401.* Set HF_TOKEN"):
        run()
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"hf upload run .*final"):
        run()
    assert not hub.made
