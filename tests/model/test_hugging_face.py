"""Weights of Hugging Face in and out: the same logits as transformers', on any layout, and nothing executed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from corpora import byte_tokenizer, documents_of, prepared
from in_process import output_of
from longctx.config import ModelConfig, Norm, ParallelConfig, RotaryConfig, RotaryScaling
from longctx.data.prepare import BUILTIN_TOKENIZER
from longctx.data.tokenizer import check_same_ids
from longctx.errors import UserError
from longctx.hugging_face import export
from longctx.hugging_face.convert import PretrainedError, from_config_json, stored_tensors, to_config_json
from longctx.hugging_face.export import export_hugging_face
from longctx.hugging_face.load import PretrainedWeights
from longctx.kernels.attention.key_intervals import KeyIntervals
from longctx.model.rotary import attention_factor, frequencies
from longctx.model.transformer import build
from ranks import run_on_ranks
from runs import ROOT, small_config, train, trainer_of

CONVERT = ROOT / "tools" / "convert_hf.py"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SMALL = {
    "vocab_size": 8192, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "gpt2": GPT2Config(
        vocab_size=8192, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    ),
    "llama": LlamaConfig(**SMALL, rope_parameters=LLAMA3),
    "llama tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "llama yarn": LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        },
    ),
    "qwen3": Qwen3Config(**SMALL),
    "qwen2": Qwen2Config(**{k: v for k, v in SMALL.items() if k != "head_dim"}, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "mistral with a window": MistralConfig(**SMALL, sliding_window=11),
    "mistral, heads of another width": MistralConfig(**SMALL | {"hidden_size": 30}, sliding_window=None),
    "ministral": MinistralConfig(
        **SMALL | {"num_hidden_layers": 4}, sliding_window=11,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "smollm3": SmolLM3Config(**SMALL | {"num_hidden_layers": 4}, no_rope_layer_interval=2, pad_token_id=None),
}  # fmt: skip
TOKENS = torch.randint(8192, (2, 48), generator=torch.Generator().manual_seed(0))


def make(folder: Path, name: str, **how) -> torch.Tensor:
    """Saves a random model; returns its logits."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    model.save_pretrained(folder, **how)
    with torch.no_grad():
        return model(TOKENS).logits


def config_of(folder: Path) -> ModelConfig:
    fields = PretrainedWeights(folder).config
    return ModelConfig(**fields | {"rotary": RotaryConfig(**fields.get("rotary", {}))})


def our_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, torch.arange(48).expand(2, 48), KeyIntervals.causal(48))


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.1
    assert ((logits - expected).norm() / expected.norm()).item() < 1e-5
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name):
    expected = make(tmp_path / "hf", name)
    config = config_of(tmp_path / "hf")
    model = build(config, seed=0)
    PretrainedWeights(tmp_path / "hf").load(model, config)
    assert_close(our_logits(model), expected)


def load_and_save(_rank, config):
    with trainer_of(config) as trainer:
        trainer.config_yaml = yaml.safe_dump({"model": plain(config.model), "data": {"sequence_length": 64}})
        whole = {
            n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
            for n, p in trainer.parameters.items()
        }
        trainer.save()
    return whole


def plain(model: ModelConfig) -> dict:
    from dataclasses import asdict

    return json.loads(json.dumps(asdict(model)))


@pytest.mark.parametrize(
    ("name", "parallel", "ranks", "more_ids"),
    [
        ("qwen3", ParallelConfig(tensor=2), 4, 9),
        pytest.param("gpt2", ParallelConfig(), 3, 0, marks=pytest.mark.slow),
        pytest.param("llama", ParallelConfig(), 3, 0, marks=pytest.mark.slow),
        pytest.param("qwen3", ParallelConfig(), 3, 3000, marks=pytest.mark.slow),
        pytest.param("gpt2", ParallelConfig(tensor=2), 4, 9, marks=pytest.mark.slow),
        pytest.param("llama", ParallelConfig(tensor=2), 4, 0, marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_run_starts_with_them_on_any_layout_and_gives_them_back(tmp_path, corpus, name, parallel, ranks, more_ids):
    """With more ids than the weights have, as where tokens were added for conversations, their rows are the mean."""
    expected = make(tmp_path / "hf", name, max_shard_size="300KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    model = config_of(tmp_path / "hf")
    model.init_from = str(tmp_path / "hf")
    model.vocab_size += more_ids
    config = small_config(tmp_path, corpus, model=model, parallel=parallel, data__sequences_per_step=12)
    whole = run_on_ranks(ranks, load_and_save, config)[0]
    ours = build(model, seed=3)
    ours.load_state_dict(whole)
    assert_close(our_logits(ours)[..., :8192], expected)
    for matrix in (whole[name] for name in ("embedding.weight", "head.weight") if name in whole):
        assert len(matrix) == 8192 + more_ids
        torch.testing.assert_close(matrix[8192:], matrix[:8192].mean(dim=0).expand(more_ids, -1), rtol=1e-5, atol=1e-6)

    step = str(tmp_path / "test" / "checkpoints" / "step_0")
    output_of(CONVERT, "export", step, "--output", str(tmp_path / "back"), "--dtype", "float32")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(back).__name__ == {"gpt2": "GPT2", "llama": "Llama", "qwen3": "Qwen3"}[name] + (
        "LMHeadModel" if name == "gpt2" else "ForCausalLM"
    )
    with torch.no_grad():
        torch.testing.assert_close(back(TOKENS).logits[..., :8192], expected, rtol=1e-6, atol=1e-6)


def test_a_checkpoint_goes_before_the_weights(tmp_path, corpus, capsys):
    make(tmp_path / "hf", "qwen3")
    config = small_config(tmp_path, corpus, model=config_of(tmp_path / "hf"))
    config.model.init_from = str(tmp_path / "hf")
    config.model.rotary.theta = 5e5
    with trainer_of(config) as trainer:
        trainer.train_step()
        trainer.save()
        trained = trainer.parameters["final_norm.weight"].detach().clone()
    assert (
        f"the weights of {tmp_path}/hf; its rotary positions had model.rotary.theta=10000.0" in capsys.readouterr().out
    )
    with trainer_of(config) as trainer:
        assert torch.equal(trainer.parameters["final_norm.weight"].full_tensor(), trained.full_tensor())


def test_what_is_trained_on_short_sequences_keeps_its_context(tmp_path, corpus):
    """Weights made for 64 tokens, trained in sequences of 32 and resumed: exports are for 64."""
    make(tmp_path / "hf", "qwen3")
    config = small_config(tmp_path, corpus, model=config_of(tmp_path / "hf"), data__sequence_length=32)
    config.model.init_from, config.optim.steps = str(tmp_path / "hf"), 3
    train(config)
    config.optim.steps = 4
    train(config)
    export = "export", str(config.run_folder / "checkpoints" / "step_4"), "--output", str(tmp_path / "out")
    output_of(CONVERT, *export)
    fields = [json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("config", "tokenizer_config")]
    assert fields[0]["max_position_embeddings"] == fields[1]["model_max_length"] == 64
    larger = Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    larger.add_tokens(["<one more>"])
    larger.save(str(tmp_path / "larger.json"))
    with pytest.raises(PretrainedError, match=r"larger.json: its ids go to 8192, the model has 8192; give"):
        export_hugging_face(Path(export[1]), tmp_path / "other", torch.float32, tmp_path / "larger.json")
    assert not (tmp_path / "other").exists()
    shorter = {"name": "branch", "data__sequence_length": 16, "optim__steps": 5}
    start = str(config.run_folder / "checkpoints" / "step_4")
    branch = small_config(tmp_path, corpus, model=config.model, checkpoint__resume=start, **shorter)
    branch.model.init_from = ""
    with trainer_of(branch) as trainer:
        assert trainer.progress.context == 64


def test_a_scaling_is_told_by_the_context_of_the_weights(tmp_path):
    make(tmp_path, "qwen3")
    weights, config = PretrainedWeights(tmp_path), config_of(tmp_path)
    assert weights.check(config) == []
    config.rotary.scaling, config.rotary.original_length = RotaryScaling.yarn, 64
    assert weights.check(config) == ["model.rotary.scaling=none"]
    config.rotary.original_length = 8192
    told = "and a context of 64 tokens, where model.rotary.original_length=8192"
    assert weights.check(config) == ["model.rotary.scaling=none", told]


def test_the_preset_is_printed(tmp_path):
    make(tmp_path / "hf", "llama")
    printed = output_of(CONVERT, "config", str(tmp_path / "hf"))
    fields: Any = OmegaConf.to_container(OmegaConf.create(printed))
    assert ModelConfig(**fields | {"rotary": RotaryConfig(**fields["rotary"])}) == config_of(tmp_path / "hf")


# what is refused -----------------------------------------------------------------------------------------------------


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def drop_index_entry(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../hf/model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_index_entry, r"index.json: '../hf/model.*' is no file of this folder, and is not opened"),
        (
            lambda f: next(iter(sorted(f.glob("model-*")))).unlink(),
            r"model-00001-of-.*: missing; model.safetensors.index",
        ),
        (lambda f: cut(next(iter(sorted(f.glob("model-*"))))), r"model-00001-of-.*: no whole safetensors file"),
        (lambda f: (f / "config.json").unlink(), r"config.json: no such file; name a folder"),
        (lambda f: (f / "config.json").write_text("{"), r"config.json: not JSON"),
        (
            lambda f: edit(f / "config.json", model_type="mamba"),
            "model_type 'mamba'; gpt2, llama, qwen2, qwen3,",
        ),
        (lambda f: edit(f / "config.json", hidden_act="relu"), "hidden_act='relu', only 'silu' is supported"),
        (lambda f: edit(f / "config.json", rope_parameters={"rope_type": "longrope"}), "rope_type 'longrope'"),
        (lambda f: edit(f / "config.json", num_hidden_layers=3), r"set model.layers=3"),
    ],
)
def test_damage_is_named(tmp_path, corpus, damage, message):
    make(tmp_path / "hf", "llama", max_shard_size="300KB")
    config = small_config(tmp_path, corpus, model=config_of(tmp_path / "hf"))
    config.model.init_from = str(tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError, match=message), trainer_of(config):
        pass


def test_text_of_another_tokenizer_is_refused(tmp_path, corpus):
    """By the weights of `model.init_from`, and by a branch; tokens that one of them lacks are no difference."""
    make(tmp_path / "hf", "llama")
    config = small_config(tmp_path, corpus, model=config_of(tmp_path / "hf"))
    config.model.init_from = str(tmp_path / "hf")
    tokenizer = Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    with trainer_of(config) as trainer:
        trainer.save()
    renamed = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    renamed["added_tokens"][-1]["content"] = "<another name>"  # no text has it
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(renamed))
    check_same_ids(BUILTIN_TOKENIZER, tmp_path / "hf" / "tokenizer.json", [0])
    byte_tokenizer(tmp_path / "hf" / "tokenizer.json")
    message = (
        r"tokenizer.json: id \d+ is '.+', and '.+' in .*hf/tokenizer.json, the tokenizer of the weights .*--tokenizer"
    )
    with pytest.raises(UserError, match=message), trainer_of(config):
        pass
    prepared(tmp_path / "bytes", ["def f(x):\n    return x\n" * 40] * 8, tmp_path / "hf" / "tokenizer.json")
    start = str(tmp_path / "test" / "checkpoints" / "step_0")
    branch = small_config(tmp_path, tmp_path / "bytes", model=config.model, name="branch", checkpoint__resume=start)
    with pytest.raises(UserError, match=r"id \d+ is '.+', and '.+' in .*test/tokenizer.json"), trainer_of(branch):
        pass


def test_a_pickle_is_not_opened(tmp_path):
    make(tmp_path / "hf", "llama")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(PretrainedError, match="other formats execute code when they are read and are not supported"):
        PretrainedWeights(tmp_path / "hf")
    torch.save({"a": torch.ones(1)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(PretrainedError, match="model.safetensors: no whole safetensors file"):
        PretrainedWeights(tmp_path / "hf")


def test_other_tensors_are_refused(tmp_path):
    make(tmp_path / "hf", "llama")
    config = config_of(tmp_path / "hf")
    config.qk_norm = True
    with pytest.raises(PretrainedError, match=r"no tensor model.layers.0.self_attn.q_norm.weight \(4 are missing\)"):
        PretrainedWeights(tmp_path / "hf").names(config)
    config.qk_norm, config.layers = False, 1
    with pytest.raises(PretrainedError, match=r"tensor model.layers.1.* has no place in this model \(9 have none\)"):
        PretrainedWeights(tmp_path / "hf").names(config)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"logit_softcap": 5.0}, "model.logit_softcap is in none of them"),
        ({"window": 8, "qk_norm": True}, "model.window is Mistral's and Ministral's alone"),
        ({"width": 40, "heads": 6, "qkv_bias": True, "projection_bias": True}, r"width \(40\) is a multiple of its 6"),
        ({"window": 8, "qkv_bias": True}, r"alone are Qwen 2.5's, which this is not \(mistral\)"),
        ({"projection_bias": True}, r"biases are everywhere \(Llama, SmolLM3\)"),
        ({"qk_norm": True, "no_rotary_every": 4}, "all layers have rotary positions"),
        ({"norm": Norm.layer_norm}, "no family has layer_norm, swiglu and rotary positions together"),
    ],
    ids=str,
)
def test_what_no_family_computes_is_refused(fields, said):
    with pytest.raises(PretrainedError, match=said):
        stored_tensors(ModelConfig(**fields))


@pytest.mark.parametrize("name", MODELS)
def test_our_description_is_read_as_the_same_model(tmp_path, name):
    """By us, and by transformers, with the weights as they were."""
    expected = make(tmp_path / "hf", name)
    config = config_of(tmp_path / "hf")
    fields = to_config_json(config, 64)
    assert from_config_json(fields, "here") == from_config_json(json.loads(json.dumps(fields)), "here")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(fields))
    again = config_of(tmp_path / "hf")
    assert again == config
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        assert_close(model(TOKENS).logits, expected)


def test_layers_without_positions_are_every_nth():
    fields = to_config_json(ModelConfig(layers=6, no_rotary_every=3), 64)
    assert fields["no_rope_layers"] == [1, 1, 0, 1, 1, 0]
    with pytest.raises(PretrainedError, match=r"no_rope_layers=\[0, 1\].*: only every n-th layer"):
        from_config_json(fields | {"no_rope_layers": [0, 1]}, "here")


# rotary positions ----------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 1024},
    "yarn": YARN,
    "yarn, factor given": YARN | {"attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, scales": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, no factor": YARN | {"factor": None},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("is_old", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_rotary_scalings_are_those_of_transformers(name, is_old):
    given = {"rope_theta": 50000.0} | ROPES[name]
    theirs = LlamaConfig(**SMALL | {"head_dim": 64, "max_position_embeddings": 2048}, rope_parameters=dict(given))
    kind = given["rope_type"]
    fields = theirs.to_dict()
    if is_old:
        del fields["rope_parameters"]
        scaling = {k: v for k, v in given.items() if k not in ("rope_type", "rope_theta")} | {"type": kind}
        fields |= {"rope_theta": given["rope_theta"], "rope_scaling": None if kind == "default" else scaling}
    rotary = RotaryConfig(**from_config_json(fields, "config.json")["rotary"])
    rotary.longest = 8192
    if kind == "default":
        expected, factor = given["rope_theta"] ** -(torch.arange(0, 64, 2) / 64), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), seq_len=8192)
    torch.testing.assert_close(frequencies(rotary, 64).float(), expected.float(), rtol=2e-6, atol=0)
    assert attention_factor(rotary) == pytest.approx(factor, rel=1e-12)
    assert (rotary.scaling == RotaryScaling.none) == (kind == "default")


@pytest.mark.parametrize(
    ("kind", "key", "field", "expected"),
    [(MistralConfig, "sliding_window", "window", 4096), (SmolLM3Config, "rope_parameters", "rotary", 2e6)],
)
def test_a_key_that_a_file_lacks_has_transformers_value(kind, key, field, expected):
    fields = {name: value for name, value in kind(**SMALL).to_dict().items() if name != key}
    found = from_config_json(fields, "here")[field]
    assert (found["theta"] if field == "rotary" else found) == expected


@pytest.mark.parametrize("scaling", [RotaryScaling.dynamic, RotaryScaling.ntk])
def test_a_larger_theta_is_written_as_one(scaling):
    """Exact at every length; transformers' own dynamic scaling goes by the length of each text."""
    rotary = RotaryConfig(scaling=scaling, factor=4.0, original_length=2048, longest=16384)
    config = ModelConfig(rotary=rotary)
    fields = to_config_json(config, 8192)
    assert fields["max_position_embeddings"] == (16384 if scaling == RotaryScaling.dynamic else 8192)
    assert fields["rope_parameters"]["rope_type"] == "default"
    read = RotaryConfig(**from_config_json(fields, "here")["rotary"])
    assert torch.equal(frequencies(read, config.head_dim), frequencies(rotary, config.head_dim))


def open_in_run(folder: Path, model: ModelConfig) -> None:
    PretrainedWeights(folder).check(model)


def resave(folder: Path, change) -> None:
    """Changes the tensors of a saved model."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_whole_file_goes_before_an_index(tmp_path):
    """As transformers reads them, whose save_pretrained leaves the index of larger files before."""
    make(tmp_path, "llama", max_shard_size="300KB")
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    expected = make(tmp_path / "whole", "llama")
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "model.safetensors")
    config = config_of(tmp_path)
    model = build(config, seed=0)
    PretrainedWeights(tmp_path).load(model, config)
    assert_close(our_logits(model), expected)


def test_an_output_matrix_of_its_own_is_not_dropped(tmp_path):
    """config.json says tied, the file has another lm_head: transformers would use that of the file's."""
    make(tmp_path, "llama tied")
    model = config_of(tmp_path)
    resave(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    open_in_run(tmp_path, model)  # the same matrix, stored twice
    resave(tmp_path, lambda t: t["lm_head.weight"][8191].add_(1))
    with pytest.raises(
        PretrainedError, match=r"set model.tied_embeddings=false \(lm_head.weight is not the embedding\)"
    ):
        open_in_run(tmp_path, model)
    model.tied_embeddings = False
    open_in_run(tmp_path, model)


def test_a_config_without_the_tie_goes_by_the_file(tmp_path):
    make(tmp_path, "llama tied")
    fields = json.loads((tmp_path / "config.json").read_text())
    fields.pop("tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert PretrainedWeights(tmp_path).config["tied_embeddings"]


def test_quantized_weights_are_refused(tmp_path):
    make(tmp_path, "llama")
    model = config_of(tmp_path)
    resave(tmp_path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}))
    with pytest.raises(
        PretrainedError, match=r"model.norm.weight is F8_E4M3, which are numbers only together with scales"
    ):
        open_in_run(tmp_path, model)
    edit(tmp_path / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(PretrainedError, match=r"the weights are quantized \(fp8\); take the bfloat16 weights"):
        open_in_run(tmp_path, model)


def test_a_scaling_that_is_named_twice_is_one_or_refused():
    """A model card's `rope_scaling` beside what transformers 5 has saved; and the length that goes before."""
    saved = Qwen3Config(**SMALL).to_dict()
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(PretrainedError, match=r"differ in factor, original_max.*, rope_type; write .* rope_parameters"):
        from_config_json(saved | {"rope_scaling": yarn}, "here")
    both = {"rope_scaling": yarn, "rope_parameters": saved["rope_parameters"] | yarn}
    assert from_config_json(saved | both, "here")["rotary"]["factor"] == 4.0
    beside = saved | both | {"original_max_position_embeddings": 16}
    assert from_config_json(beside, "here")["rotary"]["original_length"] == 16


def test_a_second_extension_has_the_attention_factor_of_its_own_factor():
    fields = to_config_json(ModelConfig(rotary=RotaryConfig(scaling=RotaryScaling.yarn, factor=4.0)), 65536)
    read = RotaryConfig(**from_config_json(fields, "here")["rotary"])
    assert attention_factor(read) == pytest.approx(1.1386294361119891)
    read.factor = 16.0
    assert attention_factor(read) == pytest.approx(1.2772588722239782)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("types", "window", "every"),
    [
        (None, 11, 0),
        ([SLIDING] * 6, 11, 0),
        ([FULL] * 6, 0, 0),
        ([SLIDING, FULL] * 3, 11, 2),
        ([SLIDING, SLIDING, FULL] * 2, 11, 3),
        ([FULL, SLIDING] * 3, None, None),
        ([SLIDING, "chunked_attention"] * 3, None, None),
    ],
)
def test_windows_of_some_layers(types, window, every):
    fields = MistralConfig(**SMALL | {"num_hidden_layers": 6}, sliding_window=11).to_dict() | {"layer_types": types}
    if window is None:
        with pytest.raises(PretrainedError, match=r"layer_types=\[.*\] are not supported: of so many layers the last"):
            from_config_json(fields, "here")
        return
    found = from_config_json(fields, "here")
    assert (found["window"], found["full_attention_every"]) == (window, every)


def test_windows_of_families_without_are_refused():
    fields = SmolLM3Config(**SMALL, pad_token_id=None).to_dict() | {"layer_types": [SLIDING, FULL], "sliding_window": 4}
    with pytest.raises(PretrainedError, match=r"layer_types=\['sliding_attention', 'full_attention'\] are not supp"):
        from_config_json(fields, "here")


def test_yarn_is_written_so_that_every_version_reads_it_alike():
    """transformers before 4.56 takes the factor from max_position_embeddings over the original length."""
    rotary = RotaryConfig(scaling=RotaryScaling.yarn, factor=4.0, original_length=32768)
    fields = to_config_json(ModelConfig(rotary=rotary), 65536)
    assert fields["max_position_embeddings"] == 131072
    for written in (fields["rope_scaling"], fields["rope_parameters"]):
        assert written["attention_factor"] == pytest.approx(1.1386294361119891)
        assert written["factor"] == 4.0


@pytest.mark.parametrize(
    ("name", "begins"), [("llama", True), ("qwen3", False), pytest.param("gpt2", True, marks=pytest.mark.slow)]
)
def test_the_tokenizer_goes_along(tmp_path, name, begins):
    """AutoTokenizer gives the ids that were trained on, whatever the model; end of text is known; all may read it."""
    tokenizer = byte_tokenizer(tmp_path / "t.json", begin=True)
    texts = [f"text {i}: {'word ' * 30}" for i in range(20)]
    trained = prepared(tmp_path / "corpus", texts, tokenizer, add_special_tokens=begins)
    weights = tmp_path / "weights"
    make(weights, name)
    config = small_config(tmp_path, tmp_path / "corpus", model=config_of(weights), optim__steps=1)
    config.validation.sequences = config.validation.recall_sequences = 0
    train(config)
    out = tmp_path / "out"
    output_of(CONVERT, "export", str(config.run_folder / "checkpoints" / "latest"), "--output", str(out))
    read = AutoTokenizer.from_pretrained(out)
    assert [read(text)["input_ids"] for text in texts] == [d[:-1] for d in documents_of(trained)]
    assert (read.eos_token, read.eos_token_id, read.model_max_length) == ("<|endoftext|>", 256, 64)
    fields = [json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config")]
    assert [f["eos_token_id"] for f in fields] == [256, 256]
    assert [f.get("bos_token_id") for f in fields] == ([257, 257] if begins else [None, None])
    (tmp_path / "usual").touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def exported(tmp_path: Path, model: str, tokenizer: Tokenizer) -> Path:
    """A folder with no more than `tools/convert_hf.py` looks at, and its tokenizer."""
    folder = tmp_path / "out"
    folder.mkdir()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names, files = export._tokenizer_files(tmp_path / "tokenizer.json", [0], None, {}, 64, 9000)
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "config.json").write_text(json.dumps({"model_type": model, "vocab_size": 9000} | names))
    return folder


def test_a_tokenizer_that_transformers_replaces_is_told(tmp_path):
    """It has rules of its own for Qwen 2, whatever tokenizer.json says."""
    tokenizer = Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    assert export.reads_other_ids(exported(tmp_path, "qwen2", tokenizer))
    (tmp_path / "b").mkdir()
    assert not export.reads_other_ids(exported(tmp_path / "b", "llama", tokenizer))


def test_a_prefix_space_goes_along(tmp_path):
    """Versions of transformers before 5 go by the configuration alone."""
    tokenizer = Tokenizer.from_file(str(BUILTIN_TOKENIZER))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    config = json.loads((exported(tmp_path, "llama", tokenizer) / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is True
