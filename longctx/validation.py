"""Looks at the model now and then: validation loss, recall by distance, and how fast ranks are."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import nn

from longctx.config import Config
from longctx.data.mixture import Mixture
from longctx.evaluate import StoppedError, recall, validate
from longctx.parallel.mesh import Mesh
from longctx.runtime import Runtime
from longctx.sources import probes, validation_source
from longctx.stopping import StopSignals
from longctx.straggler import compare_ranks


class Validation:
    """The held-out text of a run, and what is measured with it."""

    def __init__(self, config: Config, tokens: Mixture | None, model: nn.Module, mesh: Mesh, runtime: Runtime) -> None:
        """Says so if there is too little text to validate with."""
        self.config, self.model, self.mesh, self.runtime = config, model, mesh, runtime
        self.say = runtime.say  # that of the metrics, once there are any
        self.alert: Callable[[str, str], None] = lambda _title, _text: None  # alike
        self.seconds = 0.0  # of the last one
        self.source = validation_source(config, tokens, runtime)
        self.probes = probes(config, tokens)
        self.token_bytes = tokens.token_bytes if tokens else None

    def run(self, stop: StopSignals) -> dict[str, float] | None:
        """Metrics of the model as it is; {} if there is nothing to validate with, None if some rank was asked to stop.

        Collective. Every rank gets the same numbers.
        """
        if not self.source:
            return {}

        def must_stop() -> bool:  # asked before each sequence
            stop.gate(is_open=True)
            return bool(stop.number)

        began, where = time.perf_counter(), (self.mesh, self.runtime.device)
        try:
            results = validate(self.model, self.source, self.source.size, *where, self.token_bytes, must_stop)
            if not results:
                return {}
            results |= recall(self.model, self.probes, self.config.validation.recall_sequences, *where, must_stop)
        except StoppedError:
            return None
        finally:
            self.seconds = time.perf_counter() - began
        return results

    def costs(self) -> dict[str, float]:
        """How long the last validation took, and how fast ranks are; a slow one is said. Collective."""
        speeds, message = compare_ranks(self.runtime) if self.runtime.world_size > 1 else ({}, None)
        if message:
            self.say(message)
            self.alert("slow rank", message)
        return speeds | {"time/validation_s": self.seconds}
