"""The wire between devices and the control plane: small, pure, without I/O."""
