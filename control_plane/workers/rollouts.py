"""Bring every open rollout on, again and again."""

import logging

from control_plane.services.rollouts_worker import Progress

log = logging.getLogger(__name__)


class RolloutWorker:
    """Ticks. One rollout that fails does not keep the others from their step."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def tick(self, now: int) -> int:
        """Give every open rollout its steps at ``now`` (microseconds UTC); return how many changed."""
        changed = 0
        for rollout_id in self._progress.open_rollouts():
            try:
                changed += self._progress.step(rollout_id, now)
            except Exception:
                # Whatever it is: it holds this rollout and is tried again at the next tick.
                log.exception("rollout.step_failed", extra={"facts": {"rollout": rollout_id}})
        return changed
