"""What a run takes in is data: no answer of a model and no file of a user's is executed in the trainer's process."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import sgopd
from sgopd import checkpoint
from sgopd.config import Config, UserError
from sgopd.data import load_prompts
from sgopd.models import load_model, load_tokenizer
from sgopd.trainer import Trainer
from sgopd.verifier import VerifierPool

PACKAGE = Path(sgopd.__file__).parent
# Where a call stands in a file of its own process: the worker unpickles what the trainer, and nobody else, sends it.
ALLOWED = {("verifier_worker.py", "pickle.loads"), ("verifier_worker.py", "importlib.import_module")}
EVALUATING = {
    *("eval", "exec", "compile", "__import__", "breakpoint", "input"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open", "dill.loads"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "numpy.load", "np.load", "pandas.read_pickle"),
    *("sympify", "parse_expr", "parse_latex", "sympy.sympify", "sympy.S", "lambdify", "os.system", "os.popen"),
    *("importlib.import_module", "runpy.run_path", "pydoc.locate"),
}
THEIRS = ast.parse("config.trust_remote_code", mode="eval").body
PARSERS = ("sympy", "math_verify", "latex2sympy2_extended", "antlr4", "sgopd.math_equality", "sgopd.verifier_worker")


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call by its written name."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def offences(source: str, file: str) -> list[str]:
    """Calls that could run what they read.

    torch.load and a model's from_pretrained pass with weights_only=True (transformers 5.24 does not hand it down to
    every load, so no planted pickle can tell), subprocess without a shell, trust_remote_code with the config's word.
    """
    found = []
    for name, call in calls(ast.parse(source)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        if name == "torch.load" or re.fullmatch(r"AutoModel\w*\.from_pretrained", name):
            wanted = keywords.get("weights_only")
            if not (isinstance(wanted, ast.Constant) and wanted.value is True):
                found.append(f"{file}:{call.lineno} {name} without weights_only=True")
        elif name in EVALUATING and (file, name) not in ALLOWED:
            found.append(f"{file}:{call.lineno} {name}")
        if "shell" in keywords or ast.unparse(keywords.get("trust_remote_code", THEIRS)) != ast.unparse(THEIRS):
            found.append(f"{file}:{call.lineno} {ast.unparse(call)[:80]}")
    return found


def test_no_module_of_the_loop_evaluates_what_it_reads() -> None:
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "math_equality.py")
    assert len(files) > 20
    assert [line for path in files for line in offences(path.read_text(), path.relative_to(PACKAGE).as_posix())] == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(answer)",
        "pickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(answer, shell=True)",
        "yaml.load(text)",
        "from_pretrained(path, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(path, weights_only=True, dtype=config.dtype, trust_remote_code=True)",
        "AutoModelForCausalLM.from_pretrained(path, weights_only=False)",
    ],
)
def test_the_check_of_the_sources_can_fail(source: str) -> None:
    assert len(offences(source, "trainer.py")) == 1


def planting(trace: Path) -> object:
    """An object whose unpickling makes the file `trace`."""

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {trace}",)

    return Bomb()


def test_the_planted_pickle_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(planting(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


# --- answers ---

RUN = """
import json, sys
from pathlib import Path
from sgopd.config import Config
from sgopd.trainer import Trainer
import sgopd.rollout, sgopd.samplers.plain

answers = json.loads(Path(sys.argv[2]).read_text())
generate = sgopd.rollout.generate

def hostile(model, tokenizer, prompts, sampling, seed):
    completions = generate(model, tokenizer, prompts, sampling, seed)
    for number, completion in enumerate(completions):
        completion.text, completion.truncated = answers[number % len(answers)], False
    return completions

sgopd.samplers.plain.generate = hostile
trainer = Trainer(Config.load(sys.argv[1]))
trainer.train()
print(json.dumps(sorted(sys.modules)))
"""


def test_a_run_on_hostile_answers_executes_none_and_never_imports_a_parser(settings, tiny, tmp_path: Path) -> None:
    """In a process of its own, since this one has imported everything: sympy stays with the workers."""
    trace = tmp_path / "trace"
    touch = f"__import__('os').system('touch {trace}')"
    texts = [
        touch,
        f"S({touch!r})",
        f"eval({touch!r})",
        f"open('{trace}','w')",
        f"\\input|touch {trace}",
        f"$(touch {trace})",
    ]
    answers = [rf"\boxed{{{text}}}" for text in texts] + [rf"\boxed{{x+{touch}}}", r"\boxed{10^{10^{10}}}"]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    data = tmp_path / "formulas.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n}=", "answer": rf"x+\sqrt{{{n}}}"}) + "\n" for n in range(8)))
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings(dataset_name=str(data), verifier="math", max_steps=1)))
    script = tmp_path / "run.py"
    script.write_text(RUN)
    result = subprocess.run(
        [sys.executable, str(script), str(config), str(tmp_path / "answers.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    modules = json.loads(result.stdout.splitlines()[-1])
    assert "sgopd.trainer" in modules and "sgopd.verifier" in modules
    # torch has sympy for its shapes; what reads LaTeX or answers is not there
    assert [name for name in modules if name in PARSERS[1:]] == []
    assert not trace.exists()
    (record,) = [r for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if r["kind"] == "train"]
    assert record["rollout/correct"] == 0 and record["rollout/incorrect"] + record["rollout/unknown"] == 8


def test_a_worker_has_no_way_to_make_the_pool_unpickle() -> None:
    """What comes back from a worker is text: its process has seen the answer."""
    source = (PACKAGE / "verifier.py").read_text()
    assert {name for name, _ in calls(ast.parse(source)) if name.startswith("pickle.")} == {"pickle.dumps"}


# --- files ---


def resign(path: Path) -> None:
    """Makes the manifest fit what now lies in a checkpoint, as whoever planted it could."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != checkpoint.MANIFEST]
    sums = {
        str(file.relative_to(path)): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    }
    (path / checkpoint.MANIFEST).write_text(json.dumps(sums))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> Path:
    """A run directory with a checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    config = {
        "model_name_or_path": str(tiny.student),
        "teacher_model_name_or_path": str(tiny.teacher),
        "dataset_name": str(tiny.data),
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "num_threads": 1,
        "verifier": "exact",
        "max_completion_length": 6,
        "max_steps": 1,
        "save_steps": 1,
    }
    return Trainer(Config.load(None, config), say=lambda line: None).train()


def test_weights_are_written_as_safetensors_alone(saved: Path) -> None:
    (newest,) = (saved / "checkpoints").iterdir()
    for folder in (newest, saved / "final"):
        names = {path.name for path in folder.iterdir()}
        assert "model.safetensors" in names
        assert not [name for name in names if name.endswith((".bin", ".pkl", ".pickle", ".pth"))]
    pickles = {path.name for path in newest.iterdir() if path.suffix == ".pt"}
    assert pickles == {checkpoint.OPTIMIZER, checkpoint.RANDOM}
    for name in pickles:
        torch.load(newest / name, weights_only=True)  # tensors and plain values, nothing else


@pytest.mark.parametrize("name", [checkpoint.OPTIMIZER, checkpoint.RANDOM])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_planted_in_a_checkpoint_is_not_executed(
    saved: Path, settings, tmp_path: Path, name: str, form: str
) -> None:
    run, trace = tmp_path / "run", tmp_path / "trace"
    shutil.copytree(saved, run)
    (newest,) = (run / "checkpoints").iterdir()
    if form == "pickle":
        (newest / name).write_bytes(pickle.dumps(planting(trace)))
    else:
        torch.save({"optimizer": planting(trace)}, newest / name)
    resume = settings(max_completion_length=6, max_steps=2, resume_from_checkpoint="auto", output_dir=str(run), seed=0)
    assert checkpoint.fault(newest), "the manifest tells"
    resign(newest)
    assert checkpoint.fault(newest) is None
    with pytest.raises(UserError, match=r"was not written by this program.*Nothing in it was executed"):
        Trainer(Config.load(None, resume), say=lambda line: None)
    assert not trace.exists()


@pytest.mark.parametrize(
    "setting", ["model_name_or_path", "teacher_model_name_or_path", "reference_model_name_or_path"]
)
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_as_a_model_is_not_executed(settings, tiny, tmp_path: Path, setting: str, form: str) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "model"
    shutil.copytree(tiny.student, folder)
    (folder / "model.safetensors").unlink()
    if form == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(planting(trace)))
    else:
        torch.save({"lm_head.weight": planting(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"{setting}: cannot load"):
        Trainer(Config.load(None, settings(**{setting: str(folder)})), say=lambda line: None)
    assert not trace.exists()


def test_code_beside_a_model_does_not_run_unasked(settings, tiny, tmp_path: Path) -> None:
    trace, folder = tmp_path / "trace", tmp_path / "model"
    shutil.copytree(tiny.student, folder)
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    (folder / "config.json").write_text(json.dumps(config))
    # The architecture is one that transformers has: the model is loaded, and the code beside it is not looked at.
    load_model(str(folder), Config.load(None, settings()), "model_name_or_path", "float32")
    assert not trace.exists()
    template = "{{ ().__class__.__mro__[1].__subclasses__() }}"
    for text in (template, "{{ cycler.__init__.__globals__.os.system('touch " + str(trace) + "') }}"):
        (folder / "chat_template.jinja").write_text(text)
        one = Config.load(None, settings(model_name_or_path=str(folder), apply_chat_template=True))
        with pytest.raises(Exception, match=r"unsafe|undefined|no attribute|trust_remote_code"):
            load_prompts(one, load_tokenizer(str(folder), one, "model_name_or_path"), "train")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["pandas", "data.pkl"])
def test_a_pickle_as_a_data_set_is_not_executed(settings, tmp_path: Path, name: str, monkeypatch) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "data.pkl").write_bytes(pickle.dumps(planting(trace)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    options = {"dataset_kwargs": {"data_files": str(tmp_path / "data.pkl")}} if name == "pandas" else {}
    one = Config.load(None, settings(dataset_name=name, **options))
    with pytest.raises(UserError):
        load_prompts(one, None, "train")
    assert not trace.exists()


def test_yaml_tags_are_refused(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "config.yaml"
    path.write_text(f"model_name_or_path: !!python/object/apply:os.system ['touch {trace}']\n")
    with pytest.raises(UserError):
        Config.load(path)
    assert not trace.exists()


def test_a_custom_verifier_is_imported_by_workers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "theirs.py").write_text(
        textwrap.dedent(
            """
            import os

            def pid(response, example):
                return os.getpid() != int(response)
            """
        )
    )
    with VerifierPool("theirs:pid", workers=1) as pool:
        assert pool.verify([str(os.getpid())], [{"answer": ""}])[0].reason == "correct"
    assert "theirs" not in sys.modules
