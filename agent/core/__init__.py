"""The pure part of the agent: decisions as functions of values."""
