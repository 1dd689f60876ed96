"""The driver's side of `fit`, `evaluate` and `predict`."""
