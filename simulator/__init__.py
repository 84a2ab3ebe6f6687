"""A fleet on one machine: real agents, a real broker, a real control plane."""
