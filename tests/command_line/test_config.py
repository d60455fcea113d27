"""Every wrong value is refused at the start, all at once, with its value, the rule and the fix."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from longctx import train
from longctx.command_line import help_of_keys
from longctx.config import Config, Recompute, attention_span, keys, micro_batch, recompute_by_layer
from longctx.config_checks import check
from longctx.errors import ConfigError
from longctx.suggest import explain_unknown_key
from runs import ROOT, composed

RECIPES = {
    "gpt_tiny": 2, "gpt_32k": 1, "gpt_128k": 8, "llama3_8b_128k": 8, "llama3_8b_1m": 8, "extend_qwen3_0_6b_128k": 1,
    "extend_llama3_8b_512k": 8, "finetune_qwen3_0_6b_32k": 1, "llama3_8b_256k_1gpu": 1, "llama3_8b_512k_2gpu": 2,
    "llama3_8b_1m_2gpu": 2, "gpt_2k": 1, "extend_gpt_16k": 1, "llama3_8b_512k_1gpu": 1, "extend_qwen3_0_6b_1m": 1,
}  # fmt: skip


def test_every_recipe_is_known_here():
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_fit_their_hardware(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(RECIPES[recipe]))
    check(composed(f"recipe={recipe}"), RECIPES[recipe])


@pytest.mark.parametrize("group", ["model", "data", "parallel", "optim", "precision", "checkpoint", "logging"])
def test_every_option_composes(group):
    for option in (ROOT / "configs" / group).glob("*.yaml"):
        composed("recipe=gpt_tiny", f"{group}={option.stem}")


def test_all_problems_at_once():
    config = composed("recipe=gpt_tiny")
    config.parallel.context, config.parallel.shard = 6, -1
    config.optim.steps, config.model.kv_heads, config.optim.beta2 = 0, 3, 1.5
    with pytest.raises(ConfigError) as caught:
        check(config, 8)
    assert set(caught.value.problems) == {
        "parallel.context=6 does not divide the 8 ranks of this run; use 1, 2, 4 or 8",
        "optim.steps=0 is less than 1; give 1 or more",
        "model.kv_heads=3 does not divide model.heads=2; use 1 or 2",
        "optim.beta2=1.5 must be at least 0 and below 1",
    }


def test_a_rank_without_rows_of_the_vocabulary_is_refused():
    config = composed(
        "recipe=gpt_tiny", "data=recall", "model.vocab_size=9", "data.recall.keys=2", "data.recall.values=2"
    )
    config.parallel.tensor, config.model.heads, config.model.kv_heads = 4, 4, 4
    with pytest.raises(ConfigError) as caught:
        check(config, 4)
    assert "model.vocab_size=9 leaves a rank of parallel.tensor=4 without rows; lower that" in caught.value.problems


def test_a_key_that_may_be_null_says_what_null_means():
    config = composed("recipe=gpt_tiny")
    config.optim.warmup_steps, config.model.logit_softcap, config.logging.peak_tflops = -1, 0, -2
    with pytest.raises(ConfigError) as caught:
        check(config, 1)
    assert set(caught.value.problems) == {
        "optim.warmup_steps=-1 is less than 0; give 0 or more, or null: a twentieth of the steps, at most 100",
        "model.logit_softcap=0 must be above 0, or null: no limit",
        "logging.peak_tflops=-2 must be above 0, or null: known for common GPUs",
    }


def test_problems_of_different_parts_at_once():
    config = composed(
        "recipe=gpt_tiny", "model.heads=3", "data.sequence_length=7", "parallel=auto", "parallel.tensor=2"
    )
    with pytest.raises(ConfigError) as caught:
        check(config, 2)
    assert caught.value.problems == [
        "model.kv_heads=2 does not divide model.heads=3; use 1 or 3",
        "data.sequence_length=7 is no multiple of 2 (tensor 2); use 8",
    ]


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        ({"shard": 1}, 4, "context 1 x tensor 1 x shard 1 = 1, but the run has 4 ranks; start 1"),
        ({"shard": 1, "context": 2}, 1, "parallel.context=2 does not divide the 1 ranks"),
        ({"context": 4, "tensor": 4}, 8, "= 16 does not divide the 8 ranks"),
        ({"context": 4, "tensor": 2}, 8, None),
        ({"context": 8, "strategy": "ulysses"}, 8, "does not divide the 2 query heads"),
        ({"context": 2, "strategy": "ulysses", "head_groups": 2, "recompute": "full"}, 2, "divide the 1 query heads"),
    ],
)
def test_layouts(changes, ranks, words):
    config = composed("recipe=gpt_tiny", "parallel=auto")
    config.data.sequences_per_step = 64
    for key, value in changes.items():
        setattr(config.parallel, key, value)
    if words is None:
        check(config, ranks)
    else:
        with pytest.raises(ConfigError, match=words):
            check(config, ranks)


def test_sequence_must_divide():
    config = composed("recipe=gpt_tiny", "parallel=auto", "parallel.context=4", "data.sequence_length=2044")
    with pytest.raises(ConfigError, match=r"sequence_length=2044 is no multiple of 8 .* use 2048"):
        check(config, 4)


@pytest.mark.parametrize("number", [-1, 8192])
def test_documents_end_with_an_id_of_the_vocabulary(number):
    config = composed("recipe=gpt_tiny", f"data.end_of_document={number}", "model.vocab_size=8192")
    with pytest.raises(ConfigError, match=rf"end_of_document={number} is no id of model.vocab_size=8192; .* to 8191"):
        check(config, 1)
    config.data.end_of_document = 8191
    check(config, 1)


def test_batch_must_divide():
    config = composed("recipe=gpt_tiny", "parallel=auto", "data.sequences_per_step=6")
    with pytest.raises(
        ConfigError, match=r"sequences_per_step=6 is no multiple of the 4 ranks .* use 8, or .*context=2"
    ):
        check(config, 4)
    config.parallel.shard = 4
    with pytest.raises(ConfigError, match=r"; use 8$"):  # shard leaves no ranks to share a sequence
        check(config, 4)
    config.parallel.context, config.parallel.shard = 2, -1
    check(config, 4)
    config.data.sequences_per_micro_batch = 4
    assert [micro_batch(config.data, readers) for readers in (1, 2, 3, 6)] == [3, 3, 2, 1]


def test_near_misses():
    assert explain_unknown_key("optim.lrr") == "optim.lrr is no key of the configuration; did you mean optim.lr?"
    assert "data.sequence_length" in explain_unknown_key("data.seq_length")
    assert "data.sequence_length" in explain_unknown_key("sequence_length")


# as a user types it --------------------------------------------------------------------------------------------------


def run_train(*words: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "You must specify 'recipe'"),
        pytest.param(["recipe=gpt_33k"], "Could not find 'recipe/gpt_33k'", marks=pytest.mark.slow),
        (["recipe=gpt_tiny", "optim.lrr=1"], "did you mean optim.lr?"),
        pytest.param(["recipe=gpt_tiny", "+optim.lrr=1"], "did you mean optim.lr?", marks=pytest.mark.slow),
        (["recipe=gpt_tiny", "optim.lr=fast"], "Value 'fast' of type 'str' could not be converted to Float"),
        pytest.param(
            ["recipe=gpt_tiny", "optim.schedule=linear"],
            "expected one of [cosine, wsd, constant]",
            marks=pytest.mark.slow,
        ),
        (["recipe=gpt_tiny", "parallel.context=3"], "parallel.context=3 does not divide the 1 ranks"),
    ],
)
def test_errors_on_the_command_line(words, message):
    result = run_train(*words)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_every_recipe_is_listed():
    said = run_train().stderr
    assert all(recipe in said for recipe in RECIPES)


def test_cfg_job_does_not_import_torch():
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", "recipe=gpt_32k", "--cfg", "job"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "sequence_length: 32768" in result.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "hydra" in imported
    assert "torch" not in imported


def test_completion_of_recipes():
    result = run_train("-sc", "query=bash", COMP_LINE="train.py recipe=gpt_", COMP_POINT="20")
    assert {"recipe=gpt_tiny", "recipe=gpt_32k", "recipe=gpt_128k"} <= set(result.stdout.split())


@pytest.mark.slow
def test_multirun_over_a_glob_composes_each_recipe():
    result = run_train("-m", "recipe=glob(llama*)", "optim.steps=0")
    assert "optim.steps=0 is less than 1" in result.stderr


def test_help_names_the_groups():
    result = run_train("recipe=gpt_tiny", "--help")
    assert result.returncode == 0
    assert f"recipe: {', '.join(sorted(RECIPES))}" in result.stdout


def test_mixtures_and_curricula():
    config = composed(
        "recipe=gpt_tiny", "data=prepared", "data.mixture={corpus/code-1.0: 0.7, /data/books: 3}",
        "data.curriculum={0: 512, 100: 1024}",
    )  # fmt: skip
    assert config.data.mixture == {"corpus/code-1.0": 0.7, "/data/books": 3.0}
    assert [attention_span(config, step) for step in (0, 99, 100, 5000)] == [512, 512, 1024, 1024]
    assert attention_span(composed("recipe=gpt_tiny"), 0) is None
    shares = composed("recipe=gpt_tiny", "data.curriculum={0: 256, 0.5: 512, 0.75: 0}", "optim.steps=40")
    check(shares, 1)
    assert [attention_span(shares, step) for step in (0, 19, 20, 29, 30)] == [256, 256, 512, 512, None]
    exact = composed("recipe=gpt_tiny", "data.curriculum={0: 256, 0.07: 0}", "optim.steps=100")  # 0.07 * 100 > 7
    assert [attention_span(exact, step) for step in (6, 7)] == [256, None]
    shares.data.curriculum["a"] = 1
    with pytest.raises(ConfigError, match=r"data.curriculum: a: 1; give steps from 0 on"):
        check(shares, 1)
    check(config, 1)
    config.data.folder, config.data.mixture["/data/books"] = "a", 0.0
    config.data.curriculum[-1] = 4096
    with pytest.raises(ConfigError) as caught:
        check(config, 1)
    assert set(caught.value.problems) == {
        "data.folder=a and data.mixture are both given; put the folder into the mixture",
        "data.mixture: /data/books has the weight 0.0; give one above 0, or leave it out",
        "data.curriculum: -1: 4096; give steps from 0 on, or shares of optim.steps below 1, and tokens, 0 for "
        "attention that is not cut",
    }
    train.refuse_unknown_keys(OmegaConf.structured(config))
    with pytest.raises(ConfigError, match=r"are of data=prepared, data.source is builtin; add data=prepared"):
        check(composed("recipe=gpt_tiny", "data.mixture={a: 1}"), 1)
    with pytest.raises(ConfigError, match=r"data.copies=0.5 is of text.*; set data.copies=0"):
        check(composed("recipe=gpt_tiny", "data=recall", "data.copies=0.5"), 1)
    with pytest.raises(ConfigError, match="data.copies=0.1: in spans of 64 tokens .* give 128 or more"):
        check(composed("recipe=gpt_tiny", "data.copies=0.1", "data.curriculum={0: 64, 0.5: 0}"), 1)
    other_text = composed("recipe=gpt_32k", "data=prepared", "data.folder=a")
    check(other_text, 1)  # what the recipe says of its own is no matter


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("recompute_less_layers=2", "recompute_less_layers=2: with parallel.recompute=none no layer recomputes"),
        ("recompute_less_layers=40 recompute=full", "recompute_less_layers=40: the model has 4 layers"),
        ("recompute_less_layers=1 recompute=attention_saved tile=64", "with parallel.tile=64: .*recompute=full"),
    ],
)  # fmt: skip
def test_wrong_numbers_of_layers_that_recompute_less(words, said):
    with pytest.raises(ConfigError, match=said):
        check(composed("recipe=gpt_tiny", *(f"parallel.{word}" for word in words.split())), 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("scaling=yarn beta_fast=0", "model.rotary.beta_fast=0.0 must be above 0"),
        ("scaling=yarn beta_slow=40", "beta_slow=40 must be below beta_fast=32"),
        ("scaling=yarn theta=1", "theta=1 above 1"),
        ("scaling=llama3 low_frequency_factor=8", "low_frequency_factor=8 is not less than .*=4"),
        ("low_frequency_factor=nan", "low_frequency_factor=nan must be above 0"),
        ("attention_factor=-1", "attention_factor=-1.0 must be above 0, or null: by the paper's rule"),
    ],
)
def test_wrong_numbers_of_rotary_positions(words, said):
    with pytest.raises(ConfigError, match=said):
        check(composed("recipe=gpt_tiny", *(f"model.rotary.{word}" for word in words.split())), 1)
    head = "model.head_dim=2", "model.rotary.scaling=ntk", "model.rotary.factor=2"
    with pytest.raises(ConfigError, match="model.head_dim=2: model.rotary.scaling=ntk needs 4 or more"):
        check(composed("recipe=gpt_tiny", *head), 1)


def test_a_fix_that_is_named_is_one():
    """Three ranks do not share 2048 tokens in six chunks, and Ulysses does not share six heads over four."""
    for words, ranks in (([], 3), (["data.sequences_per_step=1", "parallel.strategy=ulysses"], 4)):
        with pytest.raises(ConfigError) as caught:
            check(composed("recipe=gpt_2k", *words), ranks)
        assert "is no multiple of" in str(caught.value)
        assert "or parallel.context" not in str(caught.value)
    with pytest.raises(ConfigError, match="use 4, or parallel.context=4, so that more ranks share each sequence"):
        check(composed("recipe=gpt_2k", "data.sequences_per_step=1"), 4)


def test_copies_need_room_in_a_sequence():
    with pytest.raises(ConfigError, match=r"spans of 64 tokens \(data.sequence_length\) hardly a copy finds room"):
        check(composed("recipe=gpt_tiny", "data.copies=0.5", "data.sequence_length=64"), 1)


def test_a_group_of_keys_is_not_null():
    with pytest.raises(ConfigError, match="optim=null: optim is a group of keys; give one of adamw, muon"):
        train.typed(["recipe=gpt_tiny", "optim=null"])


def test_layers_that_recompute_less():
    def policies(recompute: str) -> list[Recompute]:
        words = f"parallel.recompute={recompute}", "parallel.recompute_less_layers=3"
        config = composed("recipe=gpt_tiny", *words)
        check(config, 1)
        return recompute_by_layer(config)

    assert policies("full") == [Recompute.full, *[Recompute.attention_saved] * 3]
    assert policies("attention_saved") == [Recompute.attention_saved, *[Recompute.none] * 3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.tile=4096"], r"parallel.tile=4096: such blocks compute all but attention again.*recompute=none"),
        (["parallel.head_groups=2"], r"parallel.head_groups=2: such blocks compute all but attention again"),
        (["parallel.head_groups=3", "parallel.recompute=full"], r"head_groups=3 does not divide the 2 .*; use 1 or 2"),
        (["parallel.offload=2", "parallel.recompute=full", "parallel.tensor=2"], r"tensor=2: not served yet"),
        (["parallel.offload=4", "parallel.recompute=full"], r"the last of the 4 layers keeps .* give at most 3"),
        (["parallel.offload=-2", "parallel.recompute=full"], r"parallel.offload=-2 is less than -1"),
        (["parallel.offload_optimizer=true"], r"of AdamW's moments, optim.optimizer is muon"),
    ],
    ids=str,
)
def test_what_cannot_be_offloaded_or_tiled(words, said):
    with pytest.raises(ConfigError, match=said):
        check(composed("recipe=gpt_tiny", "parallel.context=1", *words), 1 + ("parallel.tensor=2" in words))
    for some in (["parallel.offload=3", "parallel.recompute=full"], ["parallel.offload_optimizer=true", "optim=adamw"]):
        check(composed("recipe=gpt_tiny", *some), 1)


def test_help_tells_every_key_with_its_limits():
    said = help_of_keys(Config())
    for key in keys(Config()):
        assert f"\n  {key.path}=" in said
        assert key.help, key.path
    assert "  optim.beta2=0.95\n      AdamW's decay of the squared gradient's mean (at least 0, below 1)\n" in said
    assert "(auto, ring, gather, ulysses, ulysses_ring)" in said.replace("\n      ", " ")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("data.validation_sequences", "validation.sequences"),
        ("data.recall_sequences", "validation.recall_sequences"),
        ("logging.validate_every_steps", "validation.every_steps"),
        ("logging.sample_prompts", "validation.sample_prompts"),
        ("logging.sample_tokens", "validation.sample_tokens"),
    ],
)
def test_keys_that_have_moved_are_refused_with_their_new_name(old, new):
    assert explain_unknown_key(old) == f"{old} is no key of the configuration; here it is {new}"
