"""`pithead demo`: the main job told as a story, each claim checked against the running system."""
