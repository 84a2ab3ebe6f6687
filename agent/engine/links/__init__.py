"""Connections to the machines of a plant, for the sources that read them and the sinks that write to them."""
