"""Formats of weights that are recognised but not read, and what makes a checkpoint of each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

__all__ = ["foreign_format"]


class _Format(NamedTuple):
    patterns: tuple[str, ...]
    """of files or folders in the directory; one that is there is enough"""
    what: str
    advice: str
    beside: str = "*"
    """what must be there too"""


_FORMATS = (
    _Format(
        ("global_step*", "zero_pp_rank_*", "*mp_rank_*_model_states.pt", "zero_to_fp32.py"),
        "DeepSpeed's ZeRO shards",
        "Join them with the script that DeepSpeed put beside them, `python zero_to_fp32.py . OUT`, and pass "
        "OUT with the model's config.json in it",
    ),
    _Format(
        ("state.json",),
        "a checkpoint that `osp-diag train` goes on from",
        "`osp-diag export RUN --out MODEL` writes the model",
        beside="*.distcp",
    ),
    _Format(
        ("*.distcp", "*/*.distcp"),
        "a distributed checkpoint of PyTorch (FSDP)",
        "`accelerate merge-weights FOLDER OUT` joins what accelerate wrote, `python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt` any other; then pass the "
        "result with the model's config.json beside it",
    ),
    _Format(
        ("latest_checkpointed_iteration.txt", "mp_rank_*", "iter_*", "*/model_optim_rng.pt"),
        "a checkpoint of Megatron-LM",
        "Convert it with the tools/checkpoint or Megatron Bridge script that writes Hugging Face's format",
    ),
    _Format(
        ("consolidated*.pth", "consolidated*.safetensors"),
        "weights under their authors' own names (Llama, Mistral)",
        "Convert them with transformers' convert_*_weights_to_hf.py of the model, or use its Hugging Face "
        "files",
    ),
    _Format(("*.nemo",), "a NeMo archive", "Convert it with NeMo's own script to Hugging Face's format"),
    _Format(
        ("flax_model*.msgpack", "tf_model*.h5"),
        "weights for JAX or TensorFlow",
        "Convert them to PyTorch with a transformers before version 5, from_flax=True or from_tf=True",
    ),
    _Format(
        ("*.onnx", "onnx/*.onnx"), "an ONNX graph", "Pass the PyTorch checkpoint that it was exported from"
    ),
)


def foreign_format(directory: Path) -> str:
    """What the directory holds if it is weights of a format that is not read, and the way out; or nothing."""
    for kind in _FORMATS:
        names = (entry.name for pattern in kind.patterns for entry in directory.glob(pattern))
        name = next(names, None)
        if name is not None and any(directory.glob(kind.beside)):
            return f"it holds {kind.what} ({name}). {kind.advice}"
    return ""
