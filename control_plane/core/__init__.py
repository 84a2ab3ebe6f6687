"""What the control plane decides, as functions of values: no clock, no chance, no I/O."""
