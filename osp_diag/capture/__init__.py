"""Getting activations and attention calls out of a running torch model."""
