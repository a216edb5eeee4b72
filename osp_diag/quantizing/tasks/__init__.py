"""What a model can do at few bits: accuracy on tasks, which EleutherAI's lm-eval asks and judges."""
