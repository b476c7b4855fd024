"""Conversations through chat templates, and plain text through tokenizers that add to it."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from pathlib import Path

import pyarrow.parquet
import pytest
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from sgopd import chat, cli
from sgopd.config import Config, UserError
from sgopd.data import MISSING, UNKNOWN, WRITTEN, load_prompts
from sgopd.startup import check_prompt_ends, check_prompts, unused_settings

TEXT = "{% for m in messages %}{{ m.content }}{% endfor %}="
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}="
FOREVER = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"


def user(content):
    return [{"role": "user", "content": content}]


def parts(*texts):
    return user([{"type": "text", "text": text, "image": None} for text in texts])


@pytest.fixture
def load(settings, tiny, tmp_path):
    """The prompts of a file with these rows' prompts, and what they are as text."""

    def make(*prompts, tokenizer: PreTrainedTokenizerBase | None = None, template=TEXT, **changes):
        data = tmp_path / "d.jsonl"
        data.write_text("".join(json.dumps({"prompt": prompt, "answer": "3"}) + "\n" for prompt in prompts))
        if tokenizer is None:
            tokenizer = tiny.make_tokenizer()
            tokenizer.chat_template = template
        loaded = load_prompts(Config.load(None, settings(**{"dataset_name": str(data), **changes})), tokenizer, "train")
        return loaded, [tokenizer.decode(ids) for ids in loaded.ids]

    return make


@pytest.mark.parametrize("template", [TEXT, PARTS], ids=["text", "parts"])
def test_content_as_text_and_as_parts(load, template):
    """Whatever the template takes; a system prompt and rows of both kinds are no reason to lose one."""
    prompts, texts = load(user("1+2"), parts("3+4"), template=template, system_prompt="0")
    assert texts == ["01+2=", "03+4="] and not prompts.remarks
    only = "{% for m in messages if m.role == 'user' %}" + template.partition("%}")[2]
    prompts, texts = load(user("1+2"), parts("3+4"), template=only, system_prompt="0")
    assert texts == ["1+2=", "3+4="] and chat.LOST in prompts.remarks[0]


@pytest.mark.parametrize("template", [TEXT, PARTS], ids=["text", "parts"])
def test_content_as_parts_in_the_command(settings, tiny, tmp_path, capsys, template):
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": parts("1+2"), "answer": "3"}))
    for name, seed in (("student", 1), ("teacher", 2)):
        tiny.make_model(seed).save_pretrained(tmp_path / name)
        tokenizer = tiny.make_tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    models = {"model_name_or_path": str(tmp_path / "student"), "teacher_model_name_or_path": str(tmp_path / "teacher")}
    (tmp_path / "c.yaml").write_text(
        json.dumps(settings(dataset_name=str(tmp_path / "d.jsonl"), max_steps=1, **models))
    )
    assert cli.main(["train", str(tmp_path / "c.yaml")]) == 0
    assert "warning" not in capsys.readouterr().out
    (completions,) = (tmp_path / "run/completions").glob("*.parquet")
    assert set(pyarrow.parquet.read_table(completions)["prompt"].to_pylist()) == {"1+2="}


def test_several_parts(load):
    assert load(parts("1+", "2"), template=PARTS)[1] == ["1+2="]
    adding = "{% for m in messages %}{{ m.content + '=' }}{% endfor %}"
    dropping = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}="  # Qwen 3
    for template in (TEXT, adding, dropping):
        with pytest.raises(UserError, match=r"line 1: a message has several parts, .* Join them"):
            load(parts("1+", "2"), template=template)


def test_templates_of_many_models(load):
    """Those that TRL brings along: nothing that they write is taken for a loss, and no role for unknown."""
    trl = importlib.util.find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("needs trl")
    found = sorted((Path(trl.origin).parent / "chat_templates").glob("*.jinja"))
    talk = [*user(" 1+2 "), {"role": "assistant", "content": "<think>4</think>3"}, *user("5")]
    assert len(found) > 20
    for path in found:
        template = path.read_text().replace("bos_token", "''")
        prompts, _ = load(user("1+2"), parts("1+2"), talk, template=template)
        assert [remark for remark in prompts.remarks if chat.LOST in remark] == [], path.name


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system role') }}", "refuses the conversation: no system role. Change"),
        ("{% if messages %}", "is not valid Jinja: .* In its line 1. Put right"),
        ("{{ messages | nothing }}", "is not valid Jinja: No filter named 'nothing'"),
        ("{{ messages.__class__.__mro__ }}", "the sandbox stopped the chat template: .*unsafe"),
        ("{{ messages.append(1) }}", "the sandbox stopped the chat template: "),
        ("{{ 1 / 0 }}", r"fails \(ZeroDivisionError: division by zero\)"),
        ("{{ messages[7].content }}", r"fails \(UndefinedError: .*has no element 7\)"),
        ("{{ range(10**9) | length }}", r"fails \(OverflowError: "),
        (FOREVER, "did not end in 0.3 s. Put right"),
        ("{% set a = 10**(10**10) %}", "did not end in 0.3 s. Put right"),
    ],
)
def test_templates_that_fail(load, monkeypatch, template, said):
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(UserError, match="line 2: .*" + said):
        load("1+2", user("1+2"), template=template)
    assert time.monotonic() - began < 20
    with pytest.raises(UserError, match="line 1: .*" + said):  # a plain prompt that a template is asked for
        load("1+2", template=template, apply_chat_template=True)


@pytest.mark.parametrize("template", [FOREVER, "{{ messages[0].content.nothing.at_all }}"])
def test_templates_that_fail_in_the_command(settings, tiny, tmp_path, capsys, monkeypatch, template):
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
    data = tmp_path / "d.jsonl"
    data.write_text(json.dumps({"prompt": user("1+2"), "answer": "3"}))
    student = tmp_path / "student"
    tiny.make_model(1).save_pretrained(student)
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(student)
    for command, path in (("train", None), ("evaluate", tmp_path / "c.yaml")):
        changes = settings(dataset_name=str(data), eval_dataset_name=str(data), model_name_or_path=str(student))
        (tmp_path / "c.yaml").write_text(json.dumps(changes))
        assert cli.main([command, str(path or tmp_path / "c.yaml")]) == 1
        assert "d.jsonl, line 1: the chat template" in capsys.readouterr().err


def test_the_clock_leaves_the_handlers_of_others_alone():
    import signal

    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[1]
    with pytest.raises(TimeoutError), chat.time_limit(0.1):
        while True:
            pass
    with chat.time_limit(0.1):
        pass
    time.sleep(0.2)
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[1]) == before

    def elsewhere():  # where Python handles no signals: no limit, and no error
        with chat.time_limit(0.1):
            done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done == [True]


def test_what_a_template_leaves_out_is_said(load):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content | trim }}{% endfor %}="
    prompts, texts = load(user(" 1+2 \n"), template=template)
    assert texts == ["1+2="] and not prompts.remarks
    prompts, texts = load(user("1+2"), template=template, system_prompt="0")
    assert texts == ["1+2="]
    (remark,) = prompts.remarks
    assert remark.startswith(f"warning: 1 of 1 training prompts {chat.LOST} (first: ")


def test_roles_that_a_template_names(load):
    talk = [{"role": "developer", "content": "0"}, *user("1")]
    assert load(talk, template="{% set known = ['developer'] %}" + TEXT)[1] == ["01="]
    with pytest.raises(UserError, match="line 1: the role 'developer' is unknown to the chat template"):
        load(talk)


def test_special_tokens_in_messages_are_said(load):
    prompts, _ = load(user("1+2"), user("1<eos>2"), parts("<eos>"))
    (remark,) = prompts.remarks
    assert remark.startswith("warning: 2 of 3 training prompts hold special tokens as text") and "line 2)" in remark
    assert load(user("1"), system_prompt="<eos>")[0].remarks
    assert not load("1<eos>2")[0].remarks  # plain text is written as the model is to read it


def test_plain_text_is_not_closed_and_begins_once(load, tiny):
    tokenizer = tiny.make_tokenizer(bos_token="=")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("=", "<eos>")}
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="= $A <eos> <eos>", special_tokens=[*ids.items()]
    )
    prompts, texts = load("1+2", "=3+4", "5", tokenizer=tokenizer)
    assert texts == ["=1+2", "=3+4", "=5"]
    assert [remark[:28] for remark in prompts.remarks] == [
        "3 of 3 training prompts are ",
        "1 of 3 training prompts have",
    ]
    assert not check_prompt_ends(prompts, tokenizer, [ids["<eos>"]])


@pytest.mark.parametrize("ending", ["<eos>", "<eos> "])
def test_prompts_that_end_with_an_end_of_sequence(load, tiny, ending):
    template = "{% for m in messages %}{{ m.content }}" + ending + "{% endfor %}"
    prompts, _ = load(user("1+2"), "1+2", template=template)
    (warning,) = check_prompt_ends(prompts, tiny.make_tokenizer(), [1])
    assert warning.startswith("warning: 1 of 2 prompts, such as '1+2<eos>") and "add_generation_prompt" in warning


def test_what_else_is_said_of_prompts(load, tiny, tmp_path):
    def said(*prompts, **changes):
        return [
            remark.partition(" prompts ")[2].partition(" (first")[0] for remark in load(*prompts, **changes)[0].remarks
        ]

    talk = [{"role": "system", "content": "0"}, *user("1")]
    assert said(talk) == [] and said(talk, system_prompt="0") == [chat.TWICE]
    assert said(json.dumps(talk)) == said(str(talk)) == [WRITTEN, UNKNOWN]
    assert said("1 é", user("é")) == [UNKNOWN]
    data = tmp_path / "e.jsonl"
    data.write_text(
        "".join(json.dumps({"prompt": "1", "answer": answer}) + "\n" for answer in ("None", "nan", "none of it"))
    )
    assert said("1", dataset_name=str(data)) == [MISSING] and said("NaN")[-1] == MISSING
    strict = tiny.make_tokenizer("1")
    strict.backend_tokenizer.model = WordLevel({"1": 0}, unk_token="none")
    with pytest.raises(UserError, match="line 2: the tokenizer cannot take the prompt: "):
        load("1", "2", tokenizer=strict)


def test_a_template_that_writes_the_date_is_said(load, settings, tiny):
    tokenizer = tiny.make_tokenizer()
    models = {"student": tiny.make_model(1)}

    def said(**changes):
        prompts, _ = load(user("1+2"), tokenizer=tokenizer, **changes)
        findings = check_prompts(Config.load(None, settings(**changes)), prompts, None, tokenizer, models)
        return [line for line in findings if "today's date" in line]

    tokenizer.chat_template = "{{ day or strftime_now('%Y-%m-%d') }}" + TEXT
    assert len(said()) == 1 and not said(chat_template_kwargs={"day": "1"})


def test_settings_that_change_nothing_are_said(load, settings, tiny):
    def unused(*prompts, **changes):
        config = Config.load(None, settings(**changes))
        return unused_settings(config, [load(*prompts, **changes)[0]], tiny.make_tokenizer())

    (warning,) = unused("1", system_prompt="0")
    assert warning.startswith("warning: system_prompt changes nothing: the prompts are plain text")
    assert not unused("1", system_prompt="0", apply_chat_template=True) and not unused(
        "1", user("1"), system_prompt="0"
    )
    assert [line.split()[1] for line in unused("1", dataset_config="x", dataset_kwargs={"a": 1})] == (
        ["dataset_kwargs", "dataset_config"]
    )
    (warning,) = unused(user("1"), chat_template_kwargs={"enable_thinkin": False, "tools": []})
    assert "'enable_thinkin' changes nothing: the chat template does not read it" in warning
