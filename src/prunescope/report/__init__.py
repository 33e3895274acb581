"""Tables, figures and pages from run folders alone."""

KIND_NAMES = {"attn": "attention", "mlp": "MLP"}  # what people read for a kind of sublayer
