"""Builds the control plane from its parts. The only reader of clock and environment."""
