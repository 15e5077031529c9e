"""A run over a data set: plan, infer, store, read back."""
