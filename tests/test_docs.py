"""The pages are true: their code runs as it stands, their commands exist, and so do the files they name."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(language: str) -> list[Any]:
    """(page, line, code) of the fenced blocks in a language."""
    found = []
    for page in PAGES:
        text = text_of(page)
        for block in FENCE.finditer(text):
            if block[1] == language:
                line = text[: block.start()].count("\n") + 2
                found.append(pytest.param(page, line, block[2], id=f"{page}:{line}"))
    return found


# --- Python ---


def quickstart(name: str) -> Any:
    import sgopd

    return Path(str(sgopd.__file__)).parent / "assets" / "quickstart" / name


def own_models() -> dict[str, Any]:
    """What a reader of docs/integrations/ brings along: two models, their tokenizer, prompts, judged completions."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student, teacher = (AutoModelForCausalLM.from_pretrained(quickstart(name)) for name in ("student", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(quickstart("student"), padding_side="left")
    prompts = [{"prompt": [{"role": "user", "content": f"{a}+34+56"}], "answer": str(a + 90)} for a in range(10, 26)]
    ids = torch.arange(3, 13)
    rows = [{"input_ids": ids, "labels": ids, "verdict": torch.tensor(1 - 2 * (i % 2))} for i in range(8)]
    return {
        "student": student,
        "teacher": teacher,
        "tokenizer": tokenizer,
        "data": Dataset.from_list(prompts),
        "rows": rows,
    }


def own_loop() -> dict[str, Any]:
    from accelerate import Accelerator

    head = torch.nn.Parameter(torch.randn(32, 8))
    tensors = {"hidden": torch.randn(2, 5, 8), "student_head": head, "teacher_hidden": torch.randn(2, 5, 8)}
    labels, verdict = torch.randint(32, (2, 6)), torch.tensor([1, -1])
    return {
        **tensors,
        "teacher_head": torch.randn(32, 8),
        "labels": labels,
        "verdict": verdict,
        "accelerator": Accelerator(),
    }


@pytest.fixture
def skyrl(monkeypatch: pytest.MonkeyPatch) -> None:
    """SkyRL's names, which its adapter and a user's entry point import; SkyRL itself needs Ray and GPUs."""
    contents: dict[str, dict[str, Any]] = {
        "skyrl.train.entrypoints.main_base": {"BasePPOExp": object},
        "skyrl.train.trainer": {"RayPPOTrainer": object},
        "skyrl.backends.skyrl_train.utils.ppo_utils": {"register_advantage_estimator": lambda name: lambda f: f},
    }
    for path, names in contents.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[path]).update(names)
    monkeypatch.delitem(sys.modules, "sgopd.integrations.skyrl", raising=False)


NEEDS: dict[str, Callable[[], dict[str, Any]]] = {"student,": own_models, "accelerator": own_loop}


@pytest.mark.parametrize(("page", "line", "code"), blocks("python"))
def test_python_runs_as_it_stands(
    page: str, line: int, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    if "import trl" in code or "from trl" in code:
        pytest.importorskip("trl", reason="TRL is not installed (extra: trl)")
    if "skyrl" in code:
        request.getfixturevalue("skyrl")
    names: dict[str, Any] = {"__name__": "page"}
    for sign, prepare in NEEDS.items():
        if sign in code and page != "README.md":
            names |= prepare()
    exec(compile(ast.parse("\n" * (line - 1) + code), page, "exec"), names)
    if "loss" in names:
        assert torch.isfinite(names["loss"])
    if "trainer" in names:
        assert names["trainer"].state.global_step == 1


# --- commands ---


def spans(start: str) -> Iterator[tuple[str, str]]:
    """Commands within a sentence."""
    for page in PAGES:
        for span in SPAN.findall(FENCE.sub("", text_of(page))):
            if re.match(start, span):
                yield page, span


def commands() -> list[Any]:
    """Every command on a page, without comments, loops and line ends that go on."""
    found = []
    for page, _, code in (parameter.values for parameter in blocks("bash")):
        for command in re.sub(r"\\\n", " ", code).splitlines():
            command = re.sub(r"\s#.*", "", command).strip()
            for one in re.split(r";\s*(?:do\s+)?", command):
                found.append((page, one.strip()))
    found += spans(r"(?:python|pytest|make|sgopd|accelerate|torchrun|pip) \S")
    return [pytest.param(page, one, id=f"{page}:{one}") for page, one in dict.fromkeys(found) if one]


@pytest.fixture(scope="module")
def makefile() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", text_of("Makefile"), re.MULTILINE))


@pytest.mark.parametrize(("page", "command"), commands())
def test_the_command_exists(
    page: str, command: str, makefile: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = re.sub(r"\[[^\]]*…\]|…|\.\.\.", "", command) if command.split()[0] != "pip" else command
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # the environment's
        words = words[1:]
    match words:
        case ["for", *_] | ["do"] | ["done"] | ["pip", "check"]:
            return
        case ["source", ".venv/bin/activate"]:
            return
        case ["sgopd", "train", "my_run.yaml"]:  # the page has it
            [written] = [one.values[2] for one in blocks("yaml") if one.values[0] == page]
            (tmp_path / "my_run.yaml").write_text(written)
            check_sgopd(["train", str(tmp_path / "my_run.yaml")])
        case ["make", *targets]:
            long = {f"long-{name}" for word in targets if word.startswith("ONLY=") for name in word[5:].split()}
            assert {target for target in targets if "=" not in target} | long <= makefile
        case ["pip", "install", *packages] | ["pip-audit", *packages]:
            extras = {extra for package in packages for extra in re.findall(r"\[([\w,-]+)\]", package)}
            offered = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", text_of("pyproject.toml"), re.DOTALL)
            assert offered
            for extra in ",".join(extras).split(",") if extras else ():
                assert re.search(rf"^{extra} = ", offered[1], re.MULTILINE), f"there is no extra {extra!r}"
        case ["accelerate", "launch", *rest] | ["torchrun", *rest]:
            check_sgopd(rest[rest.index("sgopd") + 1 :] if "sgopd" in rest else ["--help"])
        case ["sgopd", *rest] | ["python", "-m", "sgopd", *rest]:
            check_sgopd(rest)
        case ["python", "-c", code]:
            compile(code, page, "exec")
        case ["python", script, *rest]:
            check_script(ROOT / script, rest)
        case ["pytest", *rest]:
            for path in (word for word in rest if "/" in word and not word.startswith("runs/")):
                assert (ROOT / path.split("::")[0]).exists(), f"there is no {path}"
            offered = text_of("bench/conftest.py")
            for flag in (word.split("=")[0] for word in rest if re.match("--(?!benchmark-)", word)):
                assert f'"{flag}"' in offered, f"bench/conftest.py has no {flag}"
        case _:
            pytest.fail(f"{page} has a command that this test does not know: {command}")


def check_sgopd(words: list[str]) -> None:
    """The command and its flags are known; a configuration that is named loads."""
    from sgopd.cli import parse
    from sgopd.config import Config

    if "--help" in words:
        with pytest.raises(SystemExit) as stopped:
            parse(words)
        assert stopped.value.code == 0
        return
    words = [re.sub(r"\$\w+", "0", word) if word.startswith("runs/") else word for word in words]
    words = ["sg-opd" if word == "$gate" else "0" if word == "$seed" else word for word in words]
    _, path, settings = parse(words)
    if path is not None and path.suffix == ".yaml" and path.name != "config.yaml":
        Config.load(path, settings)


def check_script(script: Path, words: list[str]) -> None:
    assert script.is_file(), f"there is no {script}"
    source = script.read_text(encoding="utf-8")
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        name = flag.removeprefix("--")
        known = flag in source or f'"{name}"' in source or script.name == "setup.py"
        assert known, f"{script.name} has no {flag}"


# --- names ---


def test_pages_have_no_unnamed_blocks() -> None:
    """A block is Python (it runs), bash (its commands exist), or says that it is neither."""
    for page in PAGES:
        text = text_of(page)
        assert {block[1] for block in FENCE.finditer(text)} <= {"python", "bash", "ini", "text", "yaml", "json"}, page
        assert not re.search(r"\n\n {4,}\S", FENCE.sub("", text)), f"{page} has an indented block"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = FENCE.sub("", text_of(page))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
    for span in SPAN.findall(text):
        for name in re.findall(
            r"(?:bench|csrc|docs|examples|requirements|sgopd|sgopd_kernels|tests|tools)/[\w./-]*\w(?![\w<])", span
        ):
            if f"`{span}` at commit" in text:
                continue
            assert (ROOT / name).exists(), f"{page} names {name}"


def test_the_tree_on_the_page_is_the_tree() -> None:
    tree = re.search(r"## The tree\n\n```text\n(.*?)```", text_of("docs/house.md"), re.DOTALL)
    assert tree
    room, listed = ROOT, set()
    for line in tree[1].splitlines():
        indented = line.startswith("  ")
        names = re.split(r"\s{2,}", line.strip())[0].split()
        for name in names:
            path = (room if indented else ROOT) / name
            assert path.exists(), f"docs/house.md has {path}"
            listed.add(path)
        if not indented:
            room = ROOT / names[0]
    for package in ("sgopd", "sgopd_kernels"):
        modules = {path for path in (ROOT / package).glob("*.py") if not path.name.startswith("_")}
        assert modules <= listed, f"docs/house.md lacks {[str(one.relative_to(ROOT)) for one in modules - listed]}"
