from __future__ import annotations

import contextlib
import itertools
import json
import math
import statistics

import pytest

from sgopd.config import Config, UserError
from sgopd.data import load_prompts
from sgopd.evaluate import evaluate, evaluate_models
from sgopd.processes import Processes
from sgopd.samplers.plain import PlainSampler
from sgopd.scores import mean_and_se, pass_at_k, scores
from sgopd.verdicts import VerdictWatch
from sgopd.verifier import Verdict


@pytest.mark.parametrize(("samples", "k"), [(6, 1), (6, 2), (6, 5), (6, 6), (5, 3)])
def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_answer(samples, k):
    for correct in range(samples + 1):
        right = [True] * correct + [False] * (samples - correct)
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_standard_errors_are_over_questions():
    result = scores([0, 2, 4, 4], samples=4, k=2)
    averages = [0, 0.5, 1, 1]
    assert result["eval/avg_at_k"] == pytest.approx(0.625)
    assert result["eval/avg_at_k_se"] == pytest.approx(statistics.stdev(averages) / 2)
    assert result["eval/pass_at_k"] == pytest.approx((0 + 5 / 6 + 1 + 1) / 4)
    assert (result["eval/k"], result["eval/samples"], result["eval/questions"]) == (2, 4, 4)
    assert math.isnan(mean_and_se([1.0])[1])


class FirstDigit:
    """Calls a response right if it begins with an even digit; counts what it is asked."""

    def verify(self, responses, examples, truncated):
        self.asked = list(zip(responses, examples, truncated))
        return [Verdict(1 if text[:1] in "02468" else -1, "", 0.0) for text in responses]


def test_every_question_gets_its_rollouts(settings, tiny):
    config = Config.load(
        None, settings(eval_dataset_name=str(tiny.data), eval_dataset_size=5, num_generations_eval=6, eval_k=2)
    )
    tokenizer, model, pool = tiny.make_tokenizer(), tiny.make_model(3), FirstDigit()
    questions = load_prompts(config, tokenizer, "eval")
    sampler = PlainSampler(lambda: contextlib.nullcontext(model), tokenizer)

    def run(config=config):
        processes = Processes(config)
        watch = VerdictWatch(processes, print)
        return evaluate(sampler, questions, pool, config, processes, eos_ids=(1,), vocabulary=32, watch=watch)

    result = run()
    assert [example for _, example, _ in pool.asked] == [e for e in questions.examples for _ in range(6)]
    right = [[text[:1] in "02468" for text, _, _ in pool.asked[i * 6 : i * 6 + 6]] for i in range(5)]
    assert 0 < sum(map(sum, right)) < 30
    assert result["eval/avg_at_k"] == pytest.approx(sum(map(sum, right)) / 30)
    assert result["eval/pass_at_k"] == pytest.approx(sum(pass_at_k(6, sum(r), 2) for r in right) / 5)
    assert result["eval/length_clipped"] == pytest.approx(sum(cut for _, _, cut in pool.asked) / 30)
    again = run()
    assert {k: v for k, v in again.items() if k != "time/eval"} == {k: v for k, v in result.items() if k != "time/eval"}

    greedy = run(Config.load(None, settings(eval_dataset_name=str(tiny.data), eval_temperature=0)))
    assert greedy["eval/samples"] == 2
    assert all(a[0] == b[0] for a, b in zip(pool.asked[::2], pool.asked[1::2]))


def test_models_can_be_evaluated_without_training(settings, tiny):
    changes = {"eval_dataset_name": str(tiny.data), "eval_dataset_size": 3}
    [student] = evaluate_models(Config.load(None, settings(**changes)))
    assert student["model"] == "student" and student["eval/questions"] == 3
    both = evaluate_models(Config.load(None, settings(eval_teacher=True, **changes)))
    assert [record["model"] for record in both] == ["student", "teacher"]
    assert both[0]["eval/length_mean"] == student["eval/length_mean"]
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate_models(Config.load(None, settings()))


def test_what_is_wrong_with_the_questions_is_said(settings, tiny, tmp_path, capsys):
    """On standard error: standard output is for the records."""
    data = tmp_path / "q.jsonl"
    rows = [
        {"prompt": "1+2=", "answer": ["3", "4"]},
        {"prompt": "3+4=", "answer": r"\frac{"},
        {"prompt": "", "answer": 1},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"eval_dataset_name": str(data), "num_generations_eval": 2, "verifier": "math", "verifier_workers": 1}
    (record,) = evaluate_models(Config.load(None, settings(**changes)))
    assert record["eval/questions"] == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "prompts" in line or "answers" in line]
    assert said[0] == "warning: dropped 1 empty prompts, 2 are left"
    assert said[1].startswith("1 of 2 evaluation prompts have a list as answer")
    assert said[2].startswith("prompts are plain text: the chat template is not used")
    assert said[3].startswith("warning: the verifier cannot use 1 of 2 evaluation answers")


def test_what_training_refuses_or_says_of_its_prompts_is_said_of_questions(settings, tiny, tmp_path, capsys):
    config = Config.load(None, settings(eval_dataset_name=str(tiny.data), eval_teacher=True, system_prompt="1"))
    evaluate_models(config)
    said = [line for line in capsys.readouterr().err.splitlines() if "system_prompt" in line]
    assert said == ["warning: system_prompt changes nothing: the prompts are plain text (apply_chat_template)"]

    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1" * n + "=", "answer": "1"}) + "\n" for n in (3, 300)))
    with pytest.raises(UserError, match=r"1 of 2 prompts leave no room .* 301 tokens, the student was made for 256"):
        evaluate_models(Config.load(None, settings(eval_dataset_name=str(data))))
