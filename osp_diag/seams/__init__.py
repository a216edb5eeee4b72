"""What a model calls to attend, observed for one forward pass and left as it was."""
