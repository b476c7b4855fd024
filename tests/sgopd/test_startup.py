from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

from sgopd.config import Config, UserError
from sgopd.model_checks import check_head
from sgopd.models import eos_ids_of, head_of, hidden_states, load_model, load_tokenizer
from sgopd.startup import check_golds, check_pair, check_prompts
from sgopd.verifier import VerifierPool

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "initializer_range": 0.5,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "tied": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "cohere": CohereConfig(**SIZE, logit_scale=0.3),
    "granite": GraniteConfig(**SIZE, logits_scaling=5.0),
    "gemma2": Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=2.0),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_head_is_what_the_model_computes(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    check_head(model, "model_name_or_path")
    head = head_of(model)
    if name == "cohere":
        assert head.logit_scale == pytest.approx(0.3)
    if name == "granite":
        assert head.logit_scale == pytest.approx(0.2)
    assert head.softcap == (2.0 if name == "gemma2" else None)
    # right padding behind a sequence leaves its hidden states alone
    ids = torch.randint(3, 40, (1, 7), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = (padded > 0).long()
    with torch.no_grad():
        alone, among = hidden_states(model, ids, torch.ones_like(ids)), hidden_states(model, padded, mask)
    torch.testing.assert_close(among[:, :7], alone, atol=1e-5, rtol=1e-4)


def test_a_model_that_does_something_unknown_to_its_logits_is_refused(tiny):
    class Odd(type(tiny.make_model(0))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.1
            return output

    with pytest.raises(UserError, match=r"teacher_model_name_or_path: the logits of Odd differ .* by 0\.091"):
        check_head(Odd(tiny.make_model(0).config).eval(), "teacher_model_name_or_path")


def config_of(settings, **changes):
    return Config.load(None, settings(**changes))


def test_models_that_cannot_be_loaded(settings, tiny, tmp_path):
    config = config_of(settings)
    with pytest.raises(UserError, match=r"model_name_or_path: cannot load a model .*taken for a hub name"):
        load_model("no--hub..name", config, "model_name_or_path", "float32")
    with pytest.raises(UserError, match=r"cannot load a model .*there is no such folder in .* is OWNER/NAME$"):
        load_model("path/to/student", config, "model_name_or_path", "float32")
    with pytest.raises(UserError, match=r"cannot load a tokenizer .*there is no such folder in .* is OWNER/NAME$"):
        load_tokenizer(str(tmp_path / "none"), config, "model_name_or_path")
    model = tiny.make_model(0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 2] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match=r"1 weights of model\.layers\.0\.mlp\.up_proj\.weight .* not finite"):
        load_model(str(tmp_path / "nan"), config, "model_name_or_path", "float32")
    weights = tmp_path / "nan" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model_name_or_path: cannot load"):
        load_model(str(tmp_path / "nan"), config, "model_name_or_path", "float32")


def test_a_matching_pair_gives_no_warning(tiny):
    tokenizer = tiny.make_tokenizer()
    findings = check_pair(tiny.make_model(0), tiny.make_model(1), tokenizer, tiny.make_tokenizer(), ["1+1="])
    assert not [line for line in findings if line.startswith("warning")]
    assert any("<eos>, the same in both" in line for line in findings)
    assert any("25 tokens, 32 rows in both" in line for line in findings)


def test_padded_vocabularies_are_compared_on_the_shared_prefix(tiny):
    tokenizer = tiny.make_tokenizer()
    findings = check_pair(tiny.make_model(0), tiny.make_model(1, vocab_size=48), tokenizer, tokenizer)
    assert "heads of 32 (student) and 48 (teacher) rows, compared on the first 32" in findings[0]
    assert not [line for line in findings if line.startswith("warning")]


def test_a_token_id_beyond_a_head_is_refused(tiny):
    tokenizer = tiny.make_tokenizer()
    with pytest.raises(UserError, match=r"token ids up to 24, but the heads have 32 \(student\) and 24 \(teacher\)"):
        check_pair(tiny.make_model(0), tiny.make_model(1, vocab_size=24), tokenizer, tokenizer)


def test_conflicting_vocabularies_are_refused(tiny):
    models = tiny.make_model(0), tiny.make_model(1)
    ours = tiny.make_tokenizer("0123456789")
    with pytest.raises(UserError, match=r"disagree on 2 tokens.* '0' is id 3; for the teacher id 3 is '1'"):
        check_pair(*models, ours, tiny.make_tokenizer("1023456789"))
    with pytest.raises(UserError, match="disagree on 1 tokens"):  # another token in the place of the last
        check_pair(*models, ours, tiny.make_tokenizer("012345678x"))
    findings = check_pair(*models, ours, tiny.make_tokenizer("0123456789+"))  # one more is only worth a word
    assert "warning: 1 tokens are known to one of the two tokenizers" in findings[1]


def test_what_may_go_wrong_is_said(tiny):
    tokenizer, other = tiny.make_tokenizer(), tiny.make_tokenizer(eos_token="}")
    other.chat_template = "{{ messages }}"
    teacher = tiny.make_model(1, eos_token_id=None)
    warnings = [line for line in check_pair(tiny.make_model(0), teacher, tokenizer, other) if "warning" in line]
    assert len(warnings) == 2
    assert "sequences end with [1] (<eos>) for the student and [22] for the teacher" in warnings[0]
    assert "grow without end" in warnings[0] and "eos_token_id" in warnings[0]
    assert "chat templates differ" in warnings[1]
    [_, missing] = check_pair(tiny.make_model(0), teacher, tokenizer, None, whose="reference")
    assert missing.startswith("warning: there is no tokenizer beside the reference")
    endless = tiny.make_tokenizer()
    endless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        check_pair(tiny.make_model(0, eos_token_id=None), teacher, endless, tokenizer)


def test_end_of_sequence_ids_come_from_both_places(tiny):
    model = tiny.make_model(0)
    model.generation_config.eos_token_id = [5, 4]
    assert eos_ids_of(model, tiny.make_tokenizer()) == (1, 4, 5)


def test_prompts_without_room_are_warned_of(settings, tiny):
    from sgopd.data import load_prompts

    tokenizer = tiny.make_tokenizer()
    config = config_of(settings, max_completion_length=300)
    prompts = load_prompts(config, tokenizer, "train")
    findings = check_prompts(config, prompts, None, tokenizer, {"student": tiny.make_model(0)})
    assert findings[0] == "data: 48 prompts, no evaluation questions"
    assert any("can have 305 tokens, the student was made for 256" in line for line in findings)
    assert any("chat template is not used" in line for line in findings)


def test_reference_answers_that_nothing_can_equal(settings, tiny, tmp_path):
    from sgopd.data import Prompts

    good, bad = {"prompt": "1", "answer": "1"}, {"prompt": "1", "answer": " "}
    with VerifierPool("exact") as pool:
        assert check_golds(pool, Prompts([good], [[3]]), None) == []
        [line] = check_golds(pool, Prompts([good, bad], [[3], [3]]), None)
        assert "cannot use 1 of 2 training answers" in line
        with pytest.raises(UserError, match=r"cannot use 1 of 1 evaluation answers.*answer_column"):
            check_golds(pool, Prompts([good], [[3]]), Prompts([bad], [[3]]))
