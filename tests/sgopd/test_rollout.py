from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    MistralConfig,
    Qwen3Config,
)

from sgopd.config import UserError
from sgopd.grading import THOUGHT_TAGS
from sgopd.model_checks import check_sampling
from sgopd.models import head_of, hidden_states
from sgopd.rollout import Rollout, Sampling, collate, filtered, generate, in_parts, parts_by_tokens, sample, texts_of

PROMPTS = ["1+2=", "12345+6=", "7", "0+0+0+0+0="]


@pytest.fixture
def model(tiny):
    return tiny.make_model(seed=5, width=16, layers=2)


@pytest.fixture
def tokenizer(tiny):
    return tiny.make_tokenizer()


@pytest.fixture
def prompts(tokenizer):
    return tokenizer(PROMPTS)["input_ids"]


GREEDY = Sampling(max_completion_length=12, eos_ids=(1,), vocabulary=32, temperature=0)
RANDOM = dataclasses.replace(GREEDY, temperature=1.0)


def ids_of(completions):
    return [completion.ids.tolist() for completion in completions]


def test_greedy_equals_transformers_generate_on_each_prompt_alone(model, tokenizer, prompts):
    ours = generate(model, tokenizer, prompts, GREEDY, seed=0)
    for prompt, completion in zip(prompts, ours):
        alone = torch.tensor([prompt])
        theirs = model.generate(
            alone, attention_mask=torch.ones_like(alone), do_sample=False, max_new_tokens=12, pad_token_id=0
        )
        assert completion.ids.tolist() == theirs[0, len(prompt) :].tolist()


def test_batch_composition_does_not_change_greedy_outputs(model, tokenizer, prompts):
    together = ids_of(generate(model, tokenizer, prompts, GREEDY, seed=0))
    for size in (1, 2, 3):
        assert ids_of(generate(model, tokenizer, prompts, dataclasses.replace(GREEDY, batch_size=size), 0)) == together
    assert ids_of(generate(model, tokenizer, prompts[::-1], GREEDY, seed=0)) == together[::-1]


def test_a_prompt_is_read_once(model, tokenizer, prompts):
    """And its completions are those that it has alone, in whatever order prompts come."""
    alone, read = ids_of(generate(model, tokenizer, prompts, GREEDY, seed=0)), []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, ids, output: read.append(ids[0].shape))
    order = [2, 0, 0, 3, 2, 1, 0]
    together = ids_of(generate(model, tokenizer, [prompts[i] for i in order], GREEDY, seed=0))
    hook.remove()
    assert together == [alone[i] for i in order]
    assert read[0] == (4, max(map(len, prompts))) and read[1] == (7, 1)
    drawn = generate(model, tokenizer, [prompts[0]] * 8, RANDOM, seed=0)
    assert len({tuple(ids) for ids in ids_of(drawn)}) > 1, "copies are drawn apart"


def test_weights_are_rounded_to_bfloat16_once(model, tokenizer, prompts):
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            dtype = (kwargs or {}).get("dtype")
            if func is torch.ops.aten._to_copy.default and dtype == torch.bfloat16:
                Copies.count += any(args[0] is one for one in model.parameters())
            return func(*args, **(kwargs or {}))

    with Copies():
        generate(model, tokenizer, prompts, dataclasses.replace(GREEDY, bf16=True), seed=0)
    matrices = sum(one.ndim == 2 for one in model.parameters()) - 1  # the embedding is looked up
    assert Copies.count == matrices


SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SMALL, head_dim=8),
        MistralConfig(**SMALL, sliding_window=4),
        Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
        Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    ],
    ids=lambda config: config.model_type,
)
def test_caches_of_every_kind_survive_padding_and_rows_that_leave(tokenizer, prompts, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    try:
        check_sampling(model, "model")
    except UserError as error:
        pytest.skip(str(error))  # refused at the start: an older transformers
    endless = generate(model, tokenizer, prompts, dataclasses.replace(GREEDY, eos_ids=()), seed=0)
    ends = (endless[0].ids[2].item(), endless[1].ids[5].item())
    sampling = dataclasses.replace(GREEDY, eos_ids=ends)  # rows end at different times
    together = generate(model, tokenizer, prompts, sampling, seed=0)
    assert len({len(completion.ids) for completion in together}) > 1
    alone = [generate(model, tokenizer, [prompt], sampling, seed=0)[0] for prompt in prompts]
    assert ids_of(together) == ids_of(alone)


def test_left_padding_moves_no_position(tokenizer, prompts):
    """Rotary positions are relative and would not tell; GPT-2's are absolute."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    together = generate(model, tokenizer, prompts, GREEDY, seed=0)
    for prompt, completion in zip(prompts, together):
        [alone] = generate(model, tokenizer, [prompt], GREEDY, seed=0)
        assert completion.ids.tolist() == alone.ids.tolist()
        torch.testing.assert_close(completion.logprobs, alone.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_teacher_forced_forward(model, tokenizer, prompts, temperature):
    sampling = dataclasses.replace(RANDOM, temperature=temperature, vocabulary=25)
    completions = generate(model, tokenizer, prompts * 8, sampling, seed=3)
    assert len({len(c.ids) for c in completions}) > 2, "ragged lengths are the point"
    rollouts = [Rollout(0, p, c, "student", False, 0, "") for p, c in zip(prompts * 8, completions)]
    ids, mask, predicts = collate(rollouts)
    with torch.no_grad():
        hidden = hidden_states(model, ids, mask)[:, :-1][predicts]
    logits = head_of(model).logits(hidden)[:, :25] / temperature
    expected = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:][predicts][:, None]).squeeze(-1)
    torch.testing.assert_close(torch.cat([c.logprobs for c in completions]), expected, atol=2e-5, rtol=0)


def test_completions_end_at_eos_or_are_truncated(model, tokenizer, prompts):
    completions = generate(model, tokenizer, prompts * 16, RANDOM, seed=1)
    assert {c.truncated for c in completions} == {True, False}
    for completion in completions:
        ids = completion.ids.tolist()
        assert len(ids) == len(completion.logprobs) <= 12
        assert 1 not in ids[:-1]
        assert completion.truncated == (ids[-1] != 1)
        assert len(ids) == 12 or not completion.truncated
        assert "<eos>" not in completion.text
        assert completion.text == tokenizer.decode([i for i in ids if i > 2])


def test_every_eos_id_ends(model, tokenizer, prompts):
    completions = generate(model, tokenizer, prompts * 8, dataclasses.replace(RANDOM, eos_ids=(1, 5, 6)), seed=1)
    ends = {c.ids[-1].item() for c in completions if not c.truncated}
    assert len(ends) > 1 and ends <= {1, 5, 6}


def test_the_seed_decides(model, tokenizer, prompts):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = generate(model, tokenizer, prompts, RANDOM, seed=1)
    assert torch.equal(torch.get_rng_state(), state), "sampling must not touch the global generator"
    torch.manual_seed(9)
    again = generate(model, tokenizer, prompts, RANDOM, seed=1)
    assert ids_of(first) == ids_of(again)
    assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(first, again))
    assert ids_of(first) != ids_of(generate(model, tokenizer, prompts, RANDOM, seed=2))


def test_training_mode_is_left_as_it_was(model, tokenizer, prompts):
    for mode in (True, False):
        model.train(mode)
        generate(model, tokenizer, prompts, RANDOM, seed=1)
        assert model.training is mode


def test_no_prompts(model, tokenizer):
    assert generate(model, tokenizer, [], RANDOM, seed=0) == []


def test_sampled_frequencies_are_the_softmax_of_the_tempered_logits():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 5.0]])  # the last is outside the vocabulary
    sampling = dataclasses.replace(RANDOM, temperature=2.0)
    expected = torch.softmax(logits[0, :4] / 2.0, -1)
    draws, generator = 20_000, torch.Generator().manual_seed(0)
    tokens, logprobs = sample(logits[:, :4].expand(draws, -1), sampling, generator)
    share = torch.bincount(tokens, minlength=4) / draws
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / draws).sqrt()).all()
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_ids_outside_the_shared_vocabulary_are_never_sampled(model, tokenizer, prompts):
    completions = generate(model, tokenizer, prompts * 16, dataclasses.replace(RANDOM, vocabulary=6), seed=0)
    assert max(c.ids.max().item() for c in completions) < 6


def test_filters():
    probs = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    assert filtered(probs, 0, 1.0).tolist() == probs.tolist()
    torch.testing.assert_close(filtered(probs, 1, 1.0), torch.tensor([[0.5, 0, 0, 0]]))
    torch.testing.assert_close(filtered(probs, 9, 1.0), probs)
    for top_p, kept in ((0.1, 1), (0.5, 1), (0.6, 2), (0.71, 3), (0.95, 4)):
        assert int((filtered(probs, 0, top_p) > 0).sum()) == kept, top_p
    # top-p counts the mass that top-k left
    assert int((filtered(probs, 2, 0.75) > 0).sum()) == 2


def test_texts_are_divided_by_tokens():
    assert parts_by_tokens([2, 2, 3, 5, 5, 9], 10) == [slice(0, 3), slice(3, 5), slice(5, 6)]
    assert parts_by_tokens([2, 2, 3, 5, 5, 9], 54) == [slice(0, 6)]
    assert parts_by_tokens([11, 11], 10) == [slice(0, 1), slice(1, 2)], "more than the limit goes alone"
    for count in range(1, 7):
        parts = in_parts([slice(0, 1), slice(1, 7)], count)
        assert len(parts) == max(2, count)
        assert [index for part in parts for index in range(7)[part]] == list(range(7)) and all(
            range(7)[p] for p in parts
        )


def test_collate_marks_what_predicts_the_completion(model, tokenizer):
    [completion] = generate(model, tokenizer, [[3, 4, 5]], dataclasses.replace(GREEDY, max_completion_length=2), 0)
    short = Rollout(0, [3, 4, 5], completion, "student", False, 0, "")
    long = dataclasses.replace(short, prompt_ids=[3, 4, 5, 6, 7])
    ids, mask, predicts = collate([short, long])
    n = len(completion.ids)
    assert ids[0].tolist() == [3, 4, 5, *completion.ids.tolist(), 0, 0]
    assert mask.sum(1).tolist() == [3 + n, 5 + n]
    assert predicts[0].nonzero().squeeze(-1).tolist() == list(range(2, 2 + n))
    assert predicts[1].nonzero().squeeze(-1).tolist() == list(range(4, 4 + n))
    assert ids[:, 1:][predicts].tolist() == completion.ids.tolist() * 2


def test_the_tags_of_thoughts_stay_in_the_text_where_they_are_special_tokens(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<tool>"]})
    thought, end, tool = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<tool>"])
    eight, nine = tokenizer("8")["input_ids"][-1], tokenizer("9")["input_ids"][-1]
    completions = [
        torch.tensor(ids)
        for ids in ([thought, eight, end, nine, tokenizer.eos_token_id], [eight, tool, end, nine], [eight])
    ]
    prompts = [[eight, nine], [nine, thought], [nine, thought]]
    texts = [text.replace(" ", "") for text in texts_of(tokenizer, prompts, completions, THOUGHT_TAGS)]
    assert texts == ["<think>8</think>9", "<think>8</think>9", "<think>8"]
    texts = [text.replace(" ", "") for text in texts_of(tokenizer, prompts, completions, [])]
    assert texts == ["89", "89", "8"]
