"""The gate decides whether a rollout may grow, must wait or must go back.

``assess`` is a function of stored evidence and a policy, so that every
decision of a live rollout can be made again, to the last digit.
"""

from control_plane.core.gate.decide import assess, examine
from control_plane.core.gate.evidence import Evidence, Look, MetricLook, Outcome, Verdict

__all__ = ["Evidence", "Look", "MetricLook", "Outcome", "Verdict", "assess", "examine"]
