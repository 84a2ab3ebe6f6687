"""The data plane: a process of its own that turns sensor samples into scores and alarms."""
