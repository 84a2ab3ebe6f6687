"""How the supervisor speaks with the control plane: MQTT and HTTPS."""
