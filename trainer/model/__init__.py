"""A compact Llama with what OSP and its ablations change in it."""

from trainer.model.llama import Llama, LlamaOutput

__all__ = ["Llama", "LlamaOutput"]
