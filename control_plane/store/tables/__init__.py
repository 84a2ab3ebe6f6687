"""All tables of the control plane. Importing this module fills ``SQLModel.metadata``."""

from control_plane.store.tables import device, event, telemetry, token

__all__ = ["device", "event", "telemetry", "token"]
