"""Smaller and faster variants of a model, each measured against the original before anybody may use it."""
