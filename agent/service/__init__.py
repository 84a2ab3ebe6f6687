"""The supervisor: observe, choose the next step, execute, report; one thread that never waits for long."""
