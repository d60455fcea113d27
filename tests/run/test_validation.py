"""What a validation looks at, and what it says of its ranks."""

from __future__ import annotations

from types import SimpleNamespace

from longctx import validation
from longctx.evaluate import StoppedError
from runs import small_config, trainer_of


def test_what_a_validation_looks_at(tmp_path, corpus, monkeypatch):
    """As many sequences as there are of text, and of probes as are asked for; one that is stopped has no numbers."""
    asked = []
    monkeypatch.setattr(validation, "validate", lambda _model, _source, n, *_: asked.append(n) or {"loss/val": 1.0})
    monkeypatch.setattr(validation, "recall", lambda _model, _probes, n, *_: asked.append(n) or {"recall/32": 0.5})
    config = small_config(tmp_path, corpus, validation__sequences=10**6, validation__recall_sequences=3)
    with trainer_of(config) as trainer:
        assert trainer.validation.run(trainer.stop) == {"loss/val": 1.0, "recall/32": 0.5}
        assert asked == [trainer.validation.source.size, 3]
        assert asked[0] < 10**6

        def stopped(*arguments):
            trainer.stop.number = 15
            assert arguments[-1]()
            raise StoppedError

        monkeypatch.setattr(validation, "recall", stopped)
        assert trainer.validation.run(trainer.stop) is None
        trainer.stop.number = 0


def test_a_slow_rank_is_said_and_told(monkeypatch):
    monkeypatch.setattr(validation, "compare_ranks", lambda _runtime: ({"run/slowest_rank": 1.0}, "rank 1 is slow"))
    looked, said, told = object.__new__(validation.Validation), [], []
    looked.say, looked.alert, looked.seconds = said.append, lambda *words: told.append(words), 2.5
    looked.runtime = SimpleNamespace(world_size=2)
    assert looked.costs() == {"run/slowest_rank": 1.0, "time/validation_s": 2.5}
    assert (said, told) == (["rank 1 is slow"], [("slow rank", "rank 1 is slow")])
    looked.runtime.world_size = 1
    assert looked.costs() == {"time/validation_s": 2.5}
