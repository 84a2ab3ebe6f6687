"""All tables of the control plane. Importing this module fills ``SQLModel.metadata``."""

from control_plane.store.tables import desired, device, event, registry, rollouts, telemetry, token, tuf

__all__ = ["desired", "device", "event", "registry", "rollouts", "telemetry", "token", "tuf"]
