from __future__ import annotations

import dataclasses
import datetime
import gzip

import pytest
import yaml

from sgopd.config import Config, UserError, parse_flag

REQUIRED = {
    "model_name_or_path": "s",
    "teacher_model_name_or_path": "t",
    "dataset_name": "d.jsonl",
    "output_dir": "o",
}


def load(**changes):
    return Config.load(None, {**REQUIRED, **changes})


def test_flags_override_yaml_overrides_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({**REQUIRED, "max_steps": 7, "seed": 5}))
    config = Config.load(path, {"seed": 6})
    assert (config.max_steps, config.seed, config.num_generations) == (7, 6, 1)


def test_resolved_yaml_gives_the_same_config_back(tmp_path):
    config = load(gate_conflict=[0, 1], chat_template_kwargs={"enable_thinking": False}, precision=1e-3)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert Config.load(path) == config


def test_numbers_that_yaml_reads_as_text(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(REQUIRED) + "learning_rate: 1e-5\nprecision: 1e-3\ntemperature: 1\n")
    config = Config.load(path)
    assert config.learning_rate == 1e-5 and config.precision == 1e-3
    assert isinstance(config.temperature, float)
    assert load(precision="exact").precision == "exact"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rte": 1}, "did you mean 'learning_rate'"),
        ({"zzz": 1}, "unknown setting 'zzz'"),
        ({"lr": 1}, "did you mean 'learning_rate'"),
        ({"max_new_tokens": 1}, "did you mean 'max_completion_length'"),
        ({"importance_clip": 2, "top_k": 9}, "top_k: got 9, expected 0 with importance_clip: the sampler's"),
        ({"importance_clip": 2, "top_p": 0.9}, "top_p: got 0.9, expected 1 with importance_clip"),
        ({"max_steps": "many"}, "max_steps: got 'many' (str), expected a whole number"),
        ({"max_steps": 1.5}, "expected a whole number"),
        ({"max_steps": True}, "expected a whole number"),
        ({"learning_rate": "fast"}, "expected a number"),
        ({"learning_rate": None}, "expected a number"),
        ({"bf16": "yes"}, "expected true or false"),
        ({"estimator": "half"}, "expected one of full, sampled"),
        ({"gate_conflict": [1, "x"]}, "expected a number"),
        ({"chat_template_kwargs": "x"}, "expected a mapping"),
        ({"chat_template_kwargs": {"tokenize": False}}, "got 'tokenize', which is no argument here"),
        ({"chat_template_kwargs": {"messages": []}}, "got 'messages', which is no argument here"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "(chat_template.jinja)"),
        ({"chat_template_kwargs": {1: 2}}, "the key 1 is no text"),
        ({"chat_template_kwargs": {"day": datetime.date(2026, 1, 2)}}, "chat_template_kwargs: day: got datetime.date"),
        ({"dataset_kwargs": {"a": [{"b": float("nan")}]}}, "dataset_kwargs: a: b: got nan (float)"),
        ({"dataset_kwargs": {"split": "train"}}, "use dataset_train_split and dataset_test_split"),
        ({"system_prompt": "\udcff"}, "got '\\udcff', which UTF-8 cannot write"),
        ({"chat_template_kwargs": {"a": ["\ud800"]}}, "chat_template_kwargs: a: got '\\ud800'"),
        ({"learning_rate": 10**400}, "expected a number"),
        ({"dataset_kwargs": {"a": 10**400, "size": 1}}, "use dataset_size"),
        ({"model_name_or_path": 3}, "expected text"),
        ({"max_steps": 0}, "max_steps: got 0, expected >= 1"),
        ({"temperature": 0}, "temperature: got 0.0, expected > 0"),
        ({"teacher_share": 1.5}, "expected in [0, 1]"),
        ({"per_device_train_batch_size": 6, "num_generations": 4}, "a divisor of"),
        ({"num_iterations": 2, "save_steps": 3, "max_steps": 4}, "a multiple of num_iterations"),
        ({"num_iterations": 2, "estimator": "sampled", "max_steps": 4}, "num_iterations: got 2"),
        ({"divergence": "jsd", "estimator": "sampled"}, "divergence: got 'jsd'"),
        ({"eval_k": 17}, "<= num_generations_eval (16)"),
    ],
)
def test_refusals_name_the_setting_and_what_was_expected(changes, message):
    with pytest.raises(UserError) as error:
        load(**changes)
    assert message in str(error.value)


def test_missing_settings_are_named():
    with pytest.raises(UserError, match="dataset_name, output_dir"):
        Config.load(None, {"model_name_or_path": "a", "teacher_model_name_or_path": "b"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "`key: value` lines"),
        ("seed: 1\nmax_steps: 2\nseed: 3\n", "the key 'seed' is there twice, in line 1 and line 3"),
        ("dataset_kwargs:\n  a: 1\n  'a': 2\n", "the key 'a' is there twice, in line 2 and line 3"),
        ("dataset_kwargs: {a: 1, a: 2}\n", "the key 'a' is there twice, in line 1 and line 1"),
        ("a: " + 20_000 * "[", "nested more than 64 deep"),
        ("a: " + 70 * "[" + 70 * "]", "nested more than 64 deep"),
        ("a: &a [*a]", "nested more than 64 deep"),
        ("seed: 2026-99-99", "not valid YAML: month must be in 1..12"),
        ("seed: " + 5000 * "9", "not valid YAML: Exceeds the limit"),
        ("system_prompt: Résumé: 5 €".encode("cp1252"), "line 1: not UTF-8. As cp1252 'em_prompt: R"),
        (
            "a: 1\nsystem_prompt: 用中文回答。".encode("gb18030"),
            "line 2: not UTF-8. .*as gb18030 'tem_prompt: 用中文回答",
        ),
        ("a: 1\n".encode("utf-16"), "line 1: not UTF-8. As utf-16 'a: 1"),
        ("a: 1\n".encode("utf-16-be"), "line 1: not UTF-8. As utf-16-be 'a: 1"),
        (gzip.compress(b"a: 1\n", mtime=0), "line 1: not UTF-8, nor text in another encoding that was tried"),
    ],
)
def test_unusable_files(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as error:
        Config.load(path)
    assert str(path) in str(error.value)
    with pytest.raises(UserError, match="cannot read"):
        Config.load(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_steps", "3", 3),
        ("learning_rate", "1e-3", "1e-3"),
        ("dataset_name", "1", "1"),  # a text field stays text
        ("gate_conflict", "[0, 1]", [0, 1]),
        ("dataset_kwargs", "{operations: '+-'}", {"operations": "+-"}),
        ("dataset_test_split", "null", None),
        ("output_dir", "null", "null"),
        ("save_steps", "null", None),
        ("bf16", "true", True),
        ("max_steps", "2026-99-99", "2026-99-99"),
        ("max_steps", 5000 * "9", 5000 * "9"),
    ],
)
def test_flags_are_read_as_yaml_but_text_stays_text(name, text, value):
    assert parse_flag(name, text) == value


@pytest.mark.parametrize(("text", "said"), [("{a: 1, a: 2}", "'a' is there twice"), (2_000 * "[", "nested more than")])
def test_flags_that_say_two_things_or_have_no_end(text, said):
    with pytest.raises(UserError, match=f"--dataset_kwargs: .*{said}"):
        parse_flag("dataset_kwargs", text)


def test_a_byte_order_mark_is_no_part_of_a_setting(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("\ufeff" + yaml.safe_dump(REQUIRED))
    assert Config.load(path) == load()


def test_every_setting_has_help_and_a_valid_default():
    for field in dataclasses.fields(Config):
        assert len(field.metadata["help"]) > 5, field.name
    config = load()
    assert Config.load(None, dataclasses.asdict(config)) == config
