"""The device's identity. Only ``record`` is light; the rest runs in short-lived processes."""
