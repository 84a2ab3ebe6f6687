"""One file per runtime; ``inference.registry`` lists them."""
