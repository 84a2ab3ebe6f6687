"""Check signed metadata and fetch what they name: the only way by which anything new comes in."""
