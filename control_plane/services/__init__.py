"""The use cases: each stands here once, whoever calls it, and is one transaction."""
