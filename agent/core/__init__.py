"""Pure parts of the agent: the clock, the numbers and the bytes come as arguments."""
