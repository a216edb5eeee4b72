"""A compact Llama with what OSP and its ablations change in it."""

from osp_diag.trainer.model.llama import Llama, LlamaOutput

__all__ = ["Llama", "LlamaOutput"]
