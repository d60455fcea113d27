"""What a run may change when it goes on from a checkpoint."""

from __future__ import annotations

import pytest

from longctx import resume
from longctx.config import Optimizer, Schedule
from longctx.errors import UserError
from runs import run_info, small_config


def compared(folder, step, is_own, saved=None, **now):
    """What is said of a checkpoint of `step` and a configuration with 8 steps and a warm-up of 2, but for changes."""
    before, after = (run_info(small_config(folder, folder, **changes)) for changes in (saved or {}, now))
    manifest = {"step": step, "facts": {"configuration": before.config_yaml}}
    return resume.compare(folder, manifest, after.config, after.config_yaml, is_own)


def test_the_last_step_is_an_end_for_a_branch_alone(tmp_path):
    assert compared(tmp_path, 8, is_own=True) is None
    assert compared(tmp_path, 7, is_own=False) is None
    with pytest.raises(UserError, match="is of step 8, .*optim.steps=8 leaves it no step; give optim.steps=16"):
        compared(tmp_path, 8, is_own=False)
    with pytest.raises(UserError, match="is at step 9, after its last one, optim.steps=8; give optim.steps=9 or more"):
        compared(tmp_path, 9, is_own=True)


@pytest.mark.parametrize(("step", "is_said"), [(1, False), (2, True), (4, True), (5, False)])
def test_a_warm_up_comes_again_up_to_its_last_step(tmp_path, step, is_said):
    said = compared(tmp_path, step, True, saved={"optim__warmup_steps": 2}, optim__warmup_steps=5)
    assert ("in its warm-up of 5 steps again" in said) == is_said


@pytest.mark.parametrize(("saved_steps", "step", "is_said"), [(100, 3, False), (100, 5, True), (2000, 4, False)])
def test_a_warm_up_is_said_to_come_again_only_where_one_was_over(tmp_path, corpus, saved_steps, step, is_said):
    before = small_config(tmp_path, corpus, optim__steps=saved_steps, optim__warmup_steps=None)
    now = small_config(tmp_path, corpus, optim__steps=1000, optim__warmup_steps=None, optim__lr=1e-3)
    manifest = {"step": step, "facts": {"configuration": run_info(before).config_yaml}}
    said = resume.compare(tmp_path, manifest, now, run_info(now).config_yaml, is_own=True)
    assert said is not None
    assert "optim.lr 0.003 -> 0.001" in said
    assert ("in its warm-up of 50 steps again" in said) == is_said


def test_another_optimizer_is_another_run(tmp_path):
    changed = {"optim__optimizer": Optimizer.muon}
    with pytest.raises(UserError, match="with optim.optimizer adamw -> muon this would be another run"):
        compared(tmp_path, 4, is_own=True, **changed)
    assert "optim.optimizer adamw -> muon" in compared(tmp_path, 4, is_own=False, **changed)


@pytest.mark.parametrize(
    ("changed", "otherwise"),
    [
        ({"data__curriculum": {0: 16}}, True), ({"data__mixture": {"a": 1.0}}, True), ({"data__copies": 0.1}, True),
        ({"data__sequences_per_step": 8}, True), ({"optim__lr": 1.0}, True), ({"optim__warmup_steps": 1}, True),
        ({"optim__steps": 12}, False), ({"optim__max_skipped_steps": 9}, False), ({"validation__sequences": 1}, False),
        ({"data__sequences_per_micro_batch": 1}, False), ({"name": "other"}, False),
    ],
)  # fmt: skip
def test_what_the_weights_of_a_step_depend_on(tmp_path, changed, otherwise):
    before, now = (run_info(small_config(tmp_path, tmp_path, **c)).config_yaml for c in ({}, changed))
    assert resume.learns_otherwise(before, now) == otherwise


def test_checkpoints_of_versions_that_said_less(tmp_path):
    """Of how text was cut, and of the step from which on the rate had fallen."""
    with pytest.raises(UserError, match="another order of sequences: an earlier version of longctx cut text otherwise"):
        resume.is_same_order(tmp_path, {"seed": 0}, {"seed": 0, resume.WINDOWS: "packed"}, is_own=True)
    assert not resume.is_same_order(tmp_path, {"seed": 0}, {"seed": 0, resume.WINDOWS: "packed"}, is_own=False)
    for schedule, expected in ((Schedule.wsd, 50), (Schedule.cosine, None)):
        config = small_config(tmp_path, tmp_path, optim__steps=100, optim__decay_fraction=0.5, optim__schedule=schedule)
        manifest = {"facts": {"configuration": run_info(config).config_yaml}}
        assert resume.undecayed_until(manifest) == expected
        manifest["facts"]["undecayed_until"] = 7
        assert resume.undecayed_until(manifest) == 7


@pytest.mark.parametrize("key", ["window", "width", "logit_softcap", "attention", "fused_ops", "init_std"])
def test_a_model_that_computes_otherwise_is_another_run(key):
    changed = {f"model.{key}": (1, 2), "optim.lr": (1, 2)}
    assert (f"model.{key}" in resume.of_another_run(changed)) == (key not in ("attention", "fused_ops", "init_std"))
