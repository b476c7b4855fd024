"""Several teachers, one a prompt: each rollout's loss is from its own, and what cannot be routed is refused."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sgopd.config import Config, UserError, parse_flag


@pytest.fixture
def data(tiny, tmp_path):
    """The sums, with their teachers by turns in the column `who`, and the other way round in `swapped`."""
    rows = [json.loads(line) for line in tiny.data.read_text().splitlines()]
    path = tmp_path / "routed.jsonl"

    def write(names=("odd", "even")):
        named = [{"who": names[n % len(names)], "swapped": names[(n + 1) % len(names)]} for n in range(len(rows))]
        path.write_text("".join(json.dumps(row | columns) + "\n" for row, columns in zip(rows, named)))
        return str(path)

    write.path = write()
    return write


@pytest.fixture
def folders(tiny, tmp_path):
    """Of two teachers of different widths; and a copy of the first."""
    tiny.make_model(5, 32, 1).save_pretrained(tmp_path / "other")
    tiny.make_tokenizer().save_pretrained(tmp_path / "other")
    shutil.copytree(tiny.teacher, tmp_path / "copy")
    return {"first": str(tiny.teacher), "other": str(tmp_path / "other"), "copy": str(tmp_path / "copy")}


@pytest.fixture
def routed(trainer, data, tmp_path):
    def make(odd, even, name="routed", **changes):
        paths = {"teacher_model_name_or_path": {"odd": odd, "even": even}, "teacher_column": "who"}
        return trainer(**{"dataset_name": data.path, **paths, "output_dir": str(tmp_path / name), **changes})

    return make


def gradients(trainer, rollouts):
    found = {}
    trainer.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in trainer.student.named_parameters()})
    record = trainer.update(rollouts, fresh=True)
    return found, record


def assert_close(found, expected, error):
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= error * gradient.norm(), name


def trained(trainer):
    records = []
    trainer.on_record = records.append
    trainer.train()
    measured = [
        {name: value for name, value in record.items() if not name.startswith(("time/", "tokens_", "teacher"))}
        for record in records
        if record["kind"] == "train"
    ]
    return measured, load_file(trainer.run_dir / "final" / "model.safetensors")


def test_two_names_of_one_teacher_are_the_run_with_it_alone(routed, trainer, data, folders):
    """To the bit, with the teacher's own rollouts and evaluations."""
    changes = {
        "cold_start_steps": 3,
        "teacher_share": 0.6,
        "teacher_probes": 1,
        "teacher_reliability": "all",
        "dataset_name": data.path,
        "verifier": "math",
    }
    expected, weights = trained(trainer(**changes))
    one = routed(folders["first"], folders["first"], **changes)
    assert len(one.teacher.teachers) == 1
    found, ours = trained(one)
    assert found == expected and ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "r2-opd", "gate_sharpness": 0.3, "reference_model_name_or_path": "student", "temperature": 0.7},
        {"estimator": "sampled", "gate": "rg-opd", "position_half_life": 5.0},
        {
            "cold_start_steps": 4,
            "teacher_share": 0.9,
            "teacher_rollout_loss": "forward-kl",
            "teacher_reliability": "all",
        },
        {"padding_free": True, "importance_clip": 2.0, "divergence": "jsd", "per_device_train_batch_size": 4},
    ],
)
def test_one_teacher_loaded_twice_gives_the_update_of_it_alone(routed, trainer, data, folders, tiny, changes):
    """The loss is called for each, and their sum, statistics and gradient are those of one call, to rounding."""
    changes = {**changes, "precision": "exact", "max_grad_norm": 0.0, "seed": 1}
    if "reference_model_name_or_path" in changes:
        changes["reference_model_name_or_path"] = str(tiny.student)
    alone = trainer(**{"dataset_name": data.path, **changes})
    rollouts, _ = alone.make_batch()
    expected, record = gradients(alone, rollouts)
    both = routed(folders["first"], folders["copy"], **changes)
    assert len({both.teacher.numbers[one.example] for one in rollouts}) == 2
    found, again = gradients(both, rollouts)
    assert_close(found, expected, 1e-5)
    for name, value in record.items():
        if not name.startswith("time/"):
            assert again[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert sum(again[f"teacher/{name}/share"] for name in ("odd", "even")) == pytest.approx(1)


def test_each_rollout_is_taught_by_its_own_teacher(routed, folders):
    """Against full logits, one rollout at a time, of two teachers with different heads."""
    paths = {"unused": folders["copy"], "odd": folders["first"], "even": folders["other"]}
    changes = {"teacher_model_name_or_path": paths, "gate": "opd", "precision": "exact", "max_grad_norm": 0.0}
    one = routed("", "", **changes)
    rollouts, _ = one.make_batch()
    student, total, tokens = copy.deepcopy(one.student), 0.0, 0
    divergence = {"odd": [], "even": []}
    for rollout in rollouts:
        who = one.prompts.examples[rollout.example]["who"]
        teacher = one.models[f"teacher {who}"]
        ids = torch.tensor([rollout.prompt_ids + rollout.completion.ids.tolist()])
        start = len(rollout.prompt_ids) - 1
        log_p = torch.log_softmax(student(ids).logits[0, start:-1], -1)
        with torch.no_grad():
            log_q = torch.log_softmax(teacher(ids).logits[0, start:-1], -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        divergence[who] += kl.tolist()
        total, tokens = total + kl.sum(), tokens + len(kl)
    (total / tokens).backward()
    found, record = gradients(one, rollouts)
    assert record["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)
    assert_close(found, {name: p.grad for name, p in student.named_parameters()}, 1e-5)
    for name, values in divergence.items():
        assert record[f"teacher/{name}/kl"] == pytest.approx(sum(values) / len(values), rel=1e-5)
        assert record[f"teacher/{name}/share"] == pytest.approx(len(values) / tokens)


def test_each_teacher_writes_for_its_own_prompts(routed, folders):
    changes = {"cold_start_steps": 2, "teacher_share": 1.0, "num_generations": 2, "max_completion_length": 5}
    one = routed(folders["first"], folders["other"], **changes)
    examples = [0, 1, 2, 5, 4, 3]
    prompts = [one.prompts.ids[example] for example in examples]
    from sgopd.rollout import sampling_of

    sampling = sampling_of(one.config, one.eos_ids, one.vocabulary)
    for example, ids, completion in zip(
        examples, prompts, one.teacher.sampler_of(examples).sample(prompts, sampling, 7), strict=True
    ):
        teacher = one.models[f"teacher {one.prompts.examples[example]['who']}"]
        with torch.no_grad():
            logits = teacher(torch.tensor([ids + completion.ids.tolist()])).logits[0, len(ids) - 1 : -1]
        own = torch.log_softmax(logits, -1).gather(-1, completion.ids[:, None]).squeeze(-1)
        assert torch.allclose(own, completion.logprobs, atol=1e-5)


def test_it_resumes_to_the_bit_and_other_routes_are_refused(routed, data, folders):
    settings = {"save_steps": 2, "gate": "opd"}
    _, weights = trained(routed(folders["first"], folders["other"], "whole", **settings))
    one = routed(folders["first"], folders["other"], **settings)
    one.on_record = lambda record: (record["kind"], record["step"]) != ("train", 3) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        one.train()
    resuming = {**settings, "resume_from_checkpoint": "auto"}
    refused = r": the weights of teacher_model_name_or_path \(of several, each one's and which"
    for paths, changes in (
        ((folders["other"], folders["first"]), {}),
        ((folders["first"], folders["other"]), {"teacher_column": "swapped"}),
    ):
        with pytest.raises(UserError, match=refused):
            routed(*paths, **resuming, **changes)
    with pytest.raises(UserError, match="the prompts"):
        routed(folders["first"], folders["other"], **{**resuming, "dataset_name": data(["even", "odd"])})
    data()
    one = routed(folders["copy"], folders["other"], **resuming)
    ours = trained(one)[1]
    assert all(torch.equal(ours[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["odd", "evne"],
            r"line 2, column 'who': \"evne\" is no teacher's name; those in .* are odd, even. Correct the",
        ),
        (["odd", None], r"line 2, column 'who': null is no teacher's name"),
        ([["odd"]], r"line 1, column 'who': \[\"odd\"\] is no teacher's name"),
    ],
)
def test_a_row_without_a_teacher_is_refused(routed, data, folders, names, said):
    with pytest.raises(UserError, match=said):
        routed(folders["first"], folders["other"], dataset_name=data(names))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"teacher_column": "domain"},
            r"has no column 'domain'; its columns are prompt, .*, who, .*. Name the one with",
        ),
        ({"teacher_column": None}, r"teacher_column: got None, expected the column with .*teacher \(odd, even\)"),
        ({"teacher_model_name_or_path": "t"}, r"teacher_column: got 'who', expected null without several teachers"),
        ({"teacher_model_name_or_path": {}}, r"teacher_model_name_or_path: got {}, expected a text for each name"),
        ({"teacher_model_name_or_path": {"odd": 1}}, r"teacher_model_name_or_path: .*expected a text for each name"),
        (
            {"teacher_url": {"evne": "http://x"}},
            r"teacher_url: got .* expected names of teacher_model_name_or_path: odd",
        ),
        ({"teacher_url": {"odd": "ftp://x"}}, r"teacher_url: got 'ftp://x', expected http://HOST:PORT"),
        ({"teacher_copy": "x"}, "teacher_copy: got 'x', expected a path for each name with several teachers"),
        ({"teacher_copy": {"odd": "x"}}, "teacher_copy: got 'x', expected null without teacher_url"),
        ({"teacher_url": {"odd": "http://x"}, "cold_start_steps": 2}, "cold_start_steps: got 2, expected 0 with teach"),
        ({"eval_teacher": True}, "eval_teacher: got True, expected false with several teachers: evaluate each"),
        ({"fsdp": True, "fsdp_teacher": True}, "fsdp_teacher: got True, expected false with several teachers"),
    ],
)
def test_what_cannot_be_routed_is_refused(routed, folders, changes, said):
    with pytest.raises(UserError, match=said):
        routed(folders["first"], folders["other"], **changes)


def test_a_teacher_that_no_prompt_names_and_another_tokenizer(routed, tiny, data, folders, tmp_path):
    one = routed(folders["first"], folders["other"], dataset_name=data(["odd"]))
    assert "teachers: odd for 48 prompts, even for 0 prompts" in one.findings
    assert "warning: no prompt names the teacher 'even'" in one.findings
    tiny.make_tokenizer("=+9876543210").save_pretrained(folders["other"])
    with pytest.raises(UserError, match="student and teacher even disagree on"):
        routed(folders["first"], folders["other"], "again")


def test_on_the_command_line_a_path_is_text_and_a_mapping_has_braces():
    assert parse_flag("teacher_model_name_or_path", "runs/2026 #1/final: a") == "runs/2026 #1/final: a"
    assert parse_flag("teacher_model_name_or_path", "{math: a, code: b}") == {"math": "a", "code": "b"}
    assert parse_flag("teacher_url", "null") is None and parse_flag("teacher_column", "null") is None
    one = Config("s", {"a": "x", "b": "y"}, "d", "o", teacher_column="c", teacher_url="http://h")
    assert [(own.teacher_model_name_or_path, own.teacher_url) for own in one.teachers.values()] == [
        ("x", "http://h"),
        ("y", "http://h"),
    ]
