"""Pipelines of a device's models, and which activation of a model has put an end to one.

A version may answer well by itself and still take or give something else than
the device's pipelines were made for. Whoever asks a pipeline is no less failed
by that, so it counts against the version that came last, and its trial ends.
A pipeline that never worked with what is in service is a mistake in
``agent.toml``, and speaks against nobody.
"""

from collections.abc import Mapping

from agent.engine.serve.pipeline import Pipeline
from agent.engine.serve.pipelines import Pipelines
from agent.ports import PipelineState

Served = Mapping[str, str]
"""Model -> the identity of the activation that serves."""


class Watch:
    """Remembers with which activations each pipeline last worked. On the loop's thread."""

    def __init__(self, pipelines: Pipelines) -> None:
        self._pipelines = pipelines
        self._worked: dict[str, Served] = {}
        self.broken: dict[str, str] = {}
        """Model -> which pipeline its activation has ended, and why."""

    def look(self, settled: Served) -> None:
        """Look at all pipelines; ``settled`` are the models that serve what is wanted of them.

        One of which a model is still being loaded is not judged: two that
        only fit each other come one after the other.
        """
        self.broken = {}
        for pipeline in self._pipelines:
            mine = _models(pipeline)
            if not mine <= settled.keys():
                continue
            now = {name: settled[name] for name in mine}
            why = self._pipelines.reason(pipeline)
            if not why:
                self._worked[pipeline.name] = now
            elif (before := self._worked.get(pipeline.name)) is not None:
                self.broken.update({name: why for name in mine if before[name] != now[name]})

    def states(self) -> tuple[PipelineState, ...]:
        """Return how each pipeline is."""
        return tuple(
            PipelineState(
                p.name, self._pipelines.reason(p)[:2000], p.statistics.successes, p.statistics.failures
            )
            for p in self._pipelines
        )


def _models(pipeline: Pipeline) -> frozenset[str]:
    return frozenset(step.model for step in pipeline.spec.steps)
