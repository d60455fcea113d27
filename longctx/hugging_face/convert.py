"""GPT-2 and Llama's kin (Qwen 2.5 and 3, Mistral, Ministral, SmolLM3) as Hugging Face names them.

`config.json`, and the tensors of its safetensors files. Pure functions of a `ModelConfig`; reading and writing files is
in `load.py` and `export.py`. Llama's tensors keep the halves of a rotary pair apart, as our kernels do, so nothing is
permuted; GPT-2 stores matrices transposed, and query, key and value as one.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any, NamedTuple

from longctx.config import (
    Activation,
    ModelConfig,
    Norm,
    Positions,
    RotaryConfig,
    RotaryScaling,
    layer_windows,
    layers_with_rotary,
)
from longctx.errors import UserError
from longctx.model.rotary import attention_factor, stretched_theta

# buffers that some files hold beside the weights
IGNORED = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


class PretrainedError(UserError):
    """Weights that cannot be used: the message names the file and what is wrong with it."""


class Stored(NamedTuple):
    """One tensor of Hugging Face's: our parameters one below the other, transposed or not."""

    name: str
    parts: tuple[str, ...]
    is_transposed: bool = False


CLASSES = {  # families as `model_type` names them, and their classes in transformers
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM", "smollm3": "SmolLM3ForCausalLM",
}  # fmt: skip
OF_MISTRAL = ("mistral", "ministral")  # with the same window in all layers, and in some
FULL, SLIDING = "full_attention", "sliding_attention"  # of `layer_types`


def family(config: ModelConfig) -> str:
    """The key of `CLASSES` that computes this model. Raises `PretrainedError` if none does."""
    shape = config.norm, config.activation, config.positions
    if shape == (Norm.layer_norm, Activation.gelu, Positions.learned):
        kind, problems = "gpt2", _not_gpt2(config)
    elif shape == (Norm.rms_norm, Activation.swiglu, Positions.rotary):
        kind = _kind_of_llama(config)
        problems = _not_llama(config, kind)
    else:
        kind = ""
        problems = [f"no family has {config.norm}, {config.activation} and {config.positions} positions together"]
    if config.logit_softcap:
        problems.append("model.logit_softcap is in none of them")
    if problems:
        raise PretrainedError(f"this model is neither GPT-2 nor one of Llama's kin: {'; '.join(problems)}")
    return kind


def _not_gpt2(config: ModelConfig) -> list[str]:
    problems = []
    if not (config.qkv_bias and config.projection_bias and config.tied_embeddings) or config.qk_norm or config.window:
        problems.append("GPT-2 has all biases, tied embeddings, no norm of queries and keys, and no window")
    if config.heads * config.head_dim != config.width or config.kv_heads != config.heads:
        problems.append("GPT-2's heads are all of its width, with a key and value head each")
    return problems


def _kind_of_llama(config: ModelConfig) -> str:
    """The family that has what sets this model apart from Llama."""
    if config.qk_norm:
        return "qwen3"
    if config.no_rotary_every:
        return "smollm3"
    if config.window:
        return "ministral" if config.full_attention_every else "mistral"
    if config.qkv_bias and not config.projection_bias:
        return "qwen2"
    # transformers' Llama has heads that are a part of its width each; Mistral without a window is the same model
    return "llama" if config.width % config.heads == 0 or config.qkv_bias else "mistral"


def _not_llama(config: ModelConfig, kind: str) -> list[str]:
    problems = []
    if config.qk_norm and (config.qkv_bias or config.projection_bias or config.no_rotary_every):
        problems.append("with qk_norm (Qwen 3) there are no biases, and all layers have rotary positions")
    elif config.projection_bias and (not config.qkv_bias or kind in OF_MISTRAL):
        problems.append("biases are everywhere (Llama, SmolLM3), of queries, keys and values (Qwen 2.5), or nowhere")
    elif config.qkv_bias != config.projection_bias and kind != "qwen2":
        problems.append(f"biases of queries, keys and values alone are Qwen 2.5's, which this is not ({kind})")
    if config.window and kind not in OF_MISTRAL:
        problems.append("model.window is Mistral's and Ministral's alone")
    if kind == "llama" and config.width % config.heads:
        problems.append(f"biases are of models whose width ({config.width}) is a multiple of its {config.heads} heads")
    return problems


def stored_tensors(config: ModelConfig) -> list[Stored]:
    """Every tensor of a model's files. Raises `PretrainedError` if no family fits."""
    return _gpt2_tensors(config) if family(config) == "gpt2" else _llama_tensors(config)


def _gpt2_tensors(config: ModelConfig) -> list[Stored]:
    found = [
        Stored("transformer.wte.weight", ("embedding.weight",)),
        Stored("transformer.wpe.weight", ("position_embedding.weight",)),
    ]
    for i in range(config.layers):
        theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            is_matrix = kind == "weight"
            found += [
                Stored(f"{theirs}.ln_1.{kind}", (f"{ours}.attention_norm.{kind}",)),
                Stored(
                    f"{theirs}.attn.c_attn.{kind}",
                    tuple(f"{ours}.attention.{name}.{kind}" for name in ("query", "key", "value")),
                    is_matrix,
                ),
                Stored(f"{theirs}.attn.c_proj.{kind}", (f"{ours}.attention.output.{kind}",), is_matrix),
                Stored(f"{theirs}.ln_2.{kind}", (f"{ours}.mlp_norm.{kind}",)),
                Stored(f"{theirs}.mlp.c_fc.{kind}", (f"{ours}.mlp.up.{kind}",), is_matrix),
                Stored(f"{theirs}.mlp.c_proj.{kind}", (f"{ours}.mlp.down.{kind}",), is_matrix),
            ]
    return [*found, *(Stored(f"transformer.ln_f.{kind}", (f"final_norm.{kind}",)) for kind in ("weight", "bias"))]


def _llama_tensors(config: ModelConfig) -> list[Stored]:
    found = [Stored("model.embed_tokens.weight", ("embedding.weight",))]
    layers = {
        "self_attn.q_proj": "attention.query", "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value", "self_attn.o_proj": "attention.output", "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down",
    }  # fmt: skip
    vectors = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
    if config.qk_norm:
        vectors |= {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}
    has_bias = dict.fromkeys(layers.values(), config.projection_bias)
    has_bias |= dict.fromkeys(("attention.query", "attention.key", "attention.value"), config.qkv_bias)
    for i in range(config.layers):
        names = [
            (name, ours, kind)
            for name, ours in layers.items()
            for kind in (("weight", "bias") if has_bias[ours] else ("weight",))
        ]
        names += [(name, ours, "weight") for name, ours in vectors.items()]
        found += [
            Stored(f"model.layers.{i}.{name}.{kind}", (f"blocks.{i}.{ours}.{kind}",)) for name, ours, kind in names
        ]
    found.append(Stored("model.norm.weight", ("final_norm.weight",)))
    if not config.tied_embeddings:
        found.append(Stored("lm_head.weight", ("head.weight",)))
    return found


# config.json ---------------------------------------------------------------------------------------------------------


def to_config_json(config: ModelConfig, context: int) -> dict[str, Any]:
    """What transformers needs to build this model, for sequences of up to `context` tokens."""
    kind = family(config)
    shared = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tied_embeddings}
    shared |= {"bos_token_id": None, "eos_token_id": None}  # transformers' defaults are those of other tokenizers
    if kind == "gpt2":
        return shared | {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": config.width,
            "n_layer": config.layers, "n_head": config.heads, "n_inner": config.mlp_width,
            "n_positions": config.max_positions, "layer_norm_epsilon": config.norm_eps,
            "activation_function": "gelu_new", "initializer_range": config.init_std, "attn_pdrop": 0.0,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        }  # fmt: skip
    rope = _to_rope_parameters(config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    fields = shared | {
        "model_type": kind, "architectures": [CLASSES[kind]], "pad_token_id": None,
        "hidden_size": config.width, "intermediate_size": config.mlp_width, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim,
        "hidden_act": "silu", "rms_norm_eps": config.norm_eps, "initializer_range": config.init_std,
        "attention_bias": config.qkv_bias, "max_position_embeddings": context,
        "rope_parameters": rope,
        # for versions of transformers before 5
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }  # fmt: skip
    if config.rotary.scaling == RotaryScaling.dynamic:
        fields["max_position_embeddings"] = config.rotary.longest
    if config.rotary.scaling == RotaryScaling.yarn:  # transformers before 4.56 takes the factor from this
        fields["max_position_embeddings"] = round(config.rotary.factor * config.rotary.original_length)
    own = {
        "llama": {"mlp_bias": config.projection_bias},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False},
        "mistral": {"sliding_window": config.window or None},
        "ministral": {
            "sliding_window": config.window,
            "layer_types": [SLIDING if window else FULL for window in layer_windows(config)],
        },
        "smollm3": {
            "mlp_bias": config.projection_bias, "use_sliding_window": False,
            "no_rope_layer_interval": config.no_rotary_every,
            "no_rope_layers": [int(rotates) for rotates in layers_with_rotary(config)],
        },
    }  # fmt: skip
    return fields | own[kind]


def _to_rope_parameters(config: ModelConfig) -> dict[str, Any]:
    rotary = config.rotary
    # transformers' own dynamic scaling changes frequencies with the length of a text, and it has no ntk
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": stretched_theta(rotary, config.head_dim)}
    if rotary.scaling in (RotaryScaling.none, RotaryScaling.ntk, RotaryScaling.dynamic):
        return found
    found |= {"rope_type": str(rotary.scaling), "factor": rotary.factor}
    if rotary.scaling == RotaryScaling.llama3:
        found |= {
            "low_freq_factor": rotary.low_frequency_factor, "high_freq_factor": rotary.high_frequency_factor,
            "original_max_position_embeddings": rotary.original_length,
        }  # fmt: skip
    if rotary.scaling == RotaryScaling.yarn:
        found |= {
            "beta_fast": rotary.beta_fast, "beta_slow": rotary.beta_slow,
            "original_max_position_embeddings": rotary.original_length, "attention_factor": attention_factor(rotary),
        }  # fmt: skip
    return found


def from_config_json(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The keys of `ModelConfig` that a `config.json` decides, `rotary` as a dict. Raises `PretrainedError`.

    `where` names the file. Keys of rotary scaling are read in transformers' new form (`rope_parameters`) and in the one
    before (`rope_theta`, `rope_scaling`).
    """
    if quantized := fields.get("quantization_config"):
        method = quantized.get("quant_method", "") if isinstance(quantized, dict) else ""
        raise PretrainedError(f"{where}: the weights are quantized ({method}); take the bfloat16 weights of the model")
    kind = fields.get("model_type")
    try:
        if kind == "gpt2":
            return _from_gpt2(fields, where)
        if kind in CLASSES:
            return _from_llama(fields, where)
    except KeyError as error:
        raise PretrainedError(f"{where}: has no key {error}") from None
    raise PretrainedError(f"{where}: model_type {kind!r}; {', '.join(CLASSES)} can be read")


def _refuse(fields: dict[str, Any], where: str, **expected: Any) -> None:
    """Raises `PretrainedError` if a key is there with a value that our model does not compute."""
    for key, value in expected.items():
        if fields.get(key, value) != value and fields[key] is not None:
            raise PretrainedError(f"{where}: {key}={fields[key]!r}, only {value!r} is supported")


def _from_gpt2(fields: dict[str, Any], where: str) -> dict[str, Any]:
    _refuse(
        fields, where, activation_function="gelu_new", scale_attn_weights=True, tie_word_embeddings=True,
        scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    )  # fmt: skip
    width, heads = fields["n_embd"], fields["n_head"]
    return {
        "vocab_size": fields["vocab_size"], "layers": fields["n_layer"], "width": width, "heads": heads,
        "kv_heads": heads, "head_dim": width // heads, "mlp_width": fields.get("n_inner") or 4 * width,
        "norm": Norm.layer_norm, "norm_eps": fields.get("layer_norm_epsilon", 1e-5), "activation": Activation.gelu,
        "positions": Positions.learned, "max_positions": fields["n_positions"], "qk_norm": False, "qkv_bias": True,
        "projection_bias": True, "tied_embeddings": True,
    }  # fmt: skip


def _from_llama(fields: dict[str, Any], where: str) -> dict[str, Any]:
    _refuse(fields, where, hidden_act="silu", use_sliding_window=False, pretraining_tp=1)
    kind = fields["model_type"]
    of_mlp = bool(fields.get("mlp_bias", False))
    bias = bool(fields.get("attention_bias", False)) and kind in ("llama", "smollm3", "qwen3")
    if (bias and kind == "qwen3") or of_mlp != (bias and kind in ("llama", "smollm3")):
        raise PretrainedError(f"{where}: biases of attention or of the MLP alone are not supported")
    own = _windows(fields, where)
    if kind == "smollm3":
        own |= {"no_rotary_every": _no_rotary_every(fields, where)}
    heads = fields["num_attention_heads"]
    return {
        "vocab_size": fields["vocab_size"], "layers": fields["num_hidden_layers"], "width": fields["hidden_size"],
        "heads": heads, "kv_heads": fields.get("num_key_value_heads") or heads,
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
        "mlp_width": fields["intermediate_size"], "norm": Norm.rms_norm, "norm_eps": fields["rms_norm_eps"],
        "activation": Activation.swiglu, "positions": Positions.rotary, "qk_norm": kind == "qwen3",
        "qkv_bias": bias or kind == "qwen2", "projection_bias": bias,
        "tied_embeddings": bool(fields.get("tie_word_embeddings", False)),
        "rotary": _from_rope_parameters(fields, where), **own,
    }  # fmt: skip


def _windows(fields: dict[str, Any], where: str) -> dict[str, int]:
    """The keys of a window, of models that have one. transformers takes a Mistral with `layer_types` for Ministral."""
    types, can_slide = fields.get("layer_types") or [], fields["model_type"] in OF_MISTRAL
    window, every = (fields.get("sliding_window", 4096) or 0) if can_slide else 0, 0
    if types and set(types) == {FULL}:
        window = 0
    elif FULL in types and window:
        every = types.index(FULL) + 1
    expected = layer_windows(ModelConfig(layers=len(types), window=window, full_attention_every=every))
    if types != [SLIDING if size else FULL for size in expected]:
        every_nth = ": of so many layers the last sees all keys, the others a window" if can_slide else ""
        raise PretrainedError(f"{where}: layer_types={types} are not supported{every_nth}")
    return {"window": window, "full_attention_every": every} if can_slide else {}


def _no_rotary_every(fields: dict[str, Any], where: str) -> int:
    """Of how many layers the last has no rotary positions; 0: all have them."""
    turned = fields.get("no_rope_layers")
    if turned is None:
        return fields.get("no_rope_layer_interval", 4)
    every = next((number for number, rotates in enumerate(turned, 1) if not rotates), 0)
    expected = layers_with_rotary(ModelConfig(layers=len(turned), no_rotary_every=every))
    if [bool(rotates) for rotates in turned] != expected:
        raise PretrainedError(
            f"{where}: no_rope_layers={turned}: only every n-th layer can be without rotary positions"
        )
    return every


def _from_rope_parameters(fields: dict[str, Any], where: str) -> dict[str, Any]:
    theta = 2e6 if fields["model_type"] == "smollm3" else 1e4  # transformers' own where a file names none
    given = {"rope_theta": fields.get("rope_theta", theta), **_one_scaling(fields, where)}
    kind = given.get("rope_type", given.get("type", "default"))
    _refuse(given, where, partial_rotary_factor=1.0, truncate=True)
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise PretrainedError(f"{where}: rope_type {kind!r}; default, linear, dynamic, yarn and llama3 can be read")
    found: dict[str, Any] = {"theta": float(given["rope_theta"]), "scaling": RotaryScaling.none}
    if kind == "default":
        return found
    factor = given.get("factor")
    if kind == "dynamic":
        found["original_length"] = fields["max_position_embeddings"]
    if kind in ("yarn", "llama3"):
        longest, key = fields["max_position_embeddings"], "original_max_position_embeddings"
        found["original_length"] = fields.get(key) or given.get(key) or longest  # as transformers
        factor = longest / found["original_length"] if kind == "yarn" and factor is None else factor
    if factor is None:
        raise PretrainedError(f"{where}: rope_type {kind!r} has no factor")
    found |= {"scaling": RotaryScaling(kind), "factor": float(factor)}
    if kind == "llama3":
        found |= {
            "low_frequency_factor": given["low_freq_factor"], "high_frequency_factor": given["high_freq_factor"],
        }  # fmt: skip
    if kind == "yarn":
        found |= {"beta_fast": given.get("beta_fast") or 32.0, "beta_slow": given.get("beta_slow") or 1.0}
        found["attention_factor"] = given.get("attention_factor")
        over, under = given.get("mscale"), given.get("mscale_all_dim")
        if found["attention_factor"] is None and over and under and found["factor"] > 1:
            slope = 0.1 * math.log(found["factor"])
            found["attention_factor"] = (slope * over + 1) / (slope * under + 1)
        by_rule = attention_factor(RotaryConfig(scaling=RotaryScaling.yarn, factor=found["factor"]))
        if found["attention_factor"] is not None and math.isclose(found["attention_factor"], by_rule, rel_tol=1e-6):
            found["attention_factor"] = None  # which another factor has otherwise
    return found


def _one_scaling(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """`rope_parameters`, or `rope_scaling` of versions before 5; both if they agree, as where a file is for all."""
    new, old = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    old = {"rope_type" if key == "type" else key: value for key, value in old.items()}
    apart = sorted(key for key, value in old.items() if new and new.get(key) != value)
    if apart:
        raise PretrainedError(
            f"{where}: rope_parameters and rope_scaling differ in {', '.join(apart)}; write what the model is to have "
            "into rope_parameters, and drop rope_scaling"
        )
    return new or old


def differences(config: ModelConfig, found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What of `found` (as `from_config_json` gives it) the run's model has otherwise.

    First what the weights do not fit, as overrides that mend it, then what may be changed on purpose: rotary positions.
    A vocabulary may have more ids than the weights.
    """
    ours = asdict(config)
    wrong = [f"model.{key}={as_yaml(value)}" for key, value in found.items() if key != "rotary" and ours[key] != value]
    if config.vocab_size > found["vocab_size"]:
        wrong.remove(f"model.vocab_size={found['vocab_size']}")
    rotary = [f"model.rotary.{k}={as_yaml(v)}" for k, v in found.get("rotary", {}).items() if ours["rotary"][k] != v]
    return wrong, rotary


def as_yaml(value: object) -> str:
    """A value as the configuration spells it: `null`, `true`, `0.5`."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
