"""Every causal language model that this transformers has, in small and with random weights: can it be rolled out?

    python tests/architectures.py [NAME …]      (minutes)

Each is put through the checks of a run's start (sgopd.model_checks.check_head and check_sampling), which say that it is
exact or refuse it; an exact one through that of `padding_free` as well. Configs are the classes' own with their sizes
made small; where that makes no valid one, the architecture is listed as not tried. Ends with 1 if a check raised
anything but a UserError.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import sys
import warnings
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from sgopd.config import UserError  # noqa: E402
from sgopd.model_checks import check_head, check_packing, check_sampling  # noqa: E402

SECONDS = 20  # that making or checking one may take
# Sizes by the names that configs give them.
SIZES = {
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_experts_per_tok moe_k moe_topk "
    "n_mamba_heads linear_num_key_heads linear_num_value_heads index_n_heads",
    4: "num_attention_heads num_key_value_heads num_heads n_head n_heads encoder_attention_heads num_local_experts "
    "decoder_attention_heads num_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads laurel_rank "
    "mamba_dt_rank time_step_rank",
    8: "head_dim state_size sliding_window attention_window_size qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "rotary_dim mamba_d_state ssm_state_size mamba_chunk_size chunk_size linear_key_head_dim linear_value_head_dim "
    "block_size hidden_size_per_layer_input d_kv dim_head index_head_dim index_topk",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim",
    17: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size n_embd d_model lru_width word_embed_proj_dim embed_dim embedding_size attention_hidden_size",
    48: "intermediate_size ffn_dim ffn_hidden_size d_ff d_inner n_inner encoder_ffn_dim decoder_ffn_dim "
    "intermediate_size_mlp",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions attention_chunk_size mamba_d_ssm",
    1: "n_group topk_group n_groups mamba_n_groups bos_token_id moe_num_shared_experts num_shared_experts "
    "n_shared_experts first_k_dense_replace",
    0: "pad_token_id num_nextn_predict_layers num_kv_shared_layers",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | {"eos_token_id": 2}
OTHERWISE: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "zaya": {"num_experts_per_tok": 1},
}
KINDS_OF_LAYERS = ("layer_types", "layers_block_type")


def small_config(kind: str) -> Any:
    cls = CONFIG_MAPPING[kind]
    own = cls()
    aliases = getattr(cls, "attribute_map", {})
    known = {*vars(own), *aliases, *inspect.signature(cls.__init__).parameters}
    wanted = {
        name: size for name, size in SMALL.items() if name in known and aliases.get(name) not in known & set(SMALL)
    }
    for name in KINDS_OF_LAYERS:  # one layer of each kind
        if isinstance(kinds := vars(own).get(name), list) and kinds:  # elsewhere it is a property
            each = list(dict.fromkeys(kinds))
            wanted[name] = each if len(each) > 1 else each * 2
            wanted |= {n: len(wanted[name]) for n in ("num_hidden_layers", "num_layers", "n_layer") if n in wanted}
    if hasattr(text := getattr(own, "text_config", None), "model_type"):
        wanted["text_config"] = small_config(text.model_type).to_dict()
    return cls(**wanted | OTHERWISE.get(kind, {}))


def small_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(kind))
    with torch.no_grad():  # so far from uniform that a lost token shows
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def verdict(kind: str) -> tuple[str, str]:
    """("exact", "refused", "not tried" or "FAULT", why)."""
    try:
        signal.alarm(SECONDS)
        model = small_model(kind)
        with torch.no_grad():
            model(input_ids=torch.randint(3, 17, (1, 6)))
    except (Exception, TimeoutError) as error:
        return "not tried", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    try:
        tokens = range(3, 17)
        check_head(model, "model", tokens)
        check_sampling(model, "model", tokens)
    except UserError as error:
        return "refused", str(error).removeprefix("model: ")
    except Exception as error:
        return "FAULT", f"{type(error).__name__}: {error}"
    try:
        check_packing(model, "model", tokens)
    except UserError:
        return "exact", "not in one row with others (padding_free)"
    return "exact", ""


def ring(*_: Any) -> None:
    raise TimeoutError(f"took over {SECONDS} s")


def main() -> int:
    logging.disable(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, ring)
    torch.set_num_threads(1)
    found: dict[str, list[str]] = {}
    for kind in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        word, why = verdict(kind)
        found.setdefault(word, []).append(kind)
        if word == "exact" and not why:
            found.setdefault("exact, also with padding_free", []).append(kind)
        print(f"{word:9} {kind:24} {' '.join(why.split())[:200]}".rstrip(), flush=True)
    for word, kinds in sorted(found.items()):
        print(f"\n{word}: {len(kinds)} of transformers {transformers.__version__}\n{' '.join(kinds)}")
    return int("FAULT" in found)


if __name__ == "__main__":
    sys.exit(main())
