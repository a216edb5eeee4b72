"""GGUF files: read the header, dequantise once, keep the result as safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from osp_diag.checkpoints.gguf_rope import check_frequencies, rotary_scaling
from osp_diag.checkpoints.gguf_tensors import (
    refuse_fewer_numbers,
    refuse_other_depth,
    set_expert_sizes,
    unused_tensors,
)
from osp_diag.checkpoints.loaded import refuse_incomplete, unused_notes
from osp_diag.checkpoints.weight_files import find_weights, read_json
from osp_diag.errors import CheckpointError
from osp_diag.quiet import quietly

__all__ = ["GgufHeader", "cache_directory", "conversion_notes", "converted", "read_header"]

SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
STRING, ARRAY = 8, 9
CONVERSION = 2
"""Counted up whenever the same file gives another model, so that earlier copies stay unread."""
NOTES = "conversion_notes.json"
LONGEST_ARRAY = 64
"""Longer arrays (vocabularies, merges) are passed over."""


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says of itself before its tensors."""

    architecture: str
    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    """Name → dimensions, the fastest first."""
    parameters: int
    size: int
    """Bytes that the file must have."""

    @property
    def has_tokenizer(self) -> bool:
        return "tokenizer.ggml.tokens" in self.metadata


def cache_directory() -> Path:
    """The folder of converted files: ``$OSP_DIAG_CACHE``, or ``~/.cache/osp_diag``."""
    setting = os.environ.get("OSP_DIAG_CACHE")
    if setting:
        return Path(setting).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "osp_diag"


def converted(path: Path) -> Path:
    """The directory of the dequantised copy of a GGUF file, made if it is not there yet.

    Every weight becomes the float32 number that its quantised form stands for. The copy is keyed by the
    SHA-256 of the file, the version of transformers that converted it, and our :data:`CONVERSION`.

    Raises
    ------
    CheckpointError
        The file is truncated, of an unsupported kind, or there is no room for the copy.
    """
    import transformers

    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    name = f"{digest}-transformers-{transformers.__version__}-conversion-{CONVERSION}"
    copy = cache_directory() / "gguf" / name
    if copy.is_dir():
        try:
            find_weights(copy)
            return copy
        except CheckpointError:  # damaged since: make it again
            shutil.rmtree(copy)
    header = read_header(path)
    _refuse_unsupported(path, header)
    _convert(path, header, copy)
    return copy


def conversion_notes(copy: Path) -> tuple[str, ...]:
    """What was to be said of a file when it was converted to ``copy``."""
    return tuple(read_json(copy / NOTES)["notes"]) if (copy / NOTES).is_file() else ()


def _refuse_unsupported(path: Path, header: GgufHeader) -> None:
    # First, since only the first part says what the model is.
    if header.metadata.get("split.count", 0) > 1:
        part, parts = header.metadata.get("split.no", 0) + 1, header.metadata["split.count"]
        raise CheckpointError(
            f"{path} is one of {parts} parts, the {part}. of them. Join them with `llama-gguf-split --merge "
            "FIRST_PART WHOLE_FILE` and pass the whole file"
        )
    if not header.architecture:
        raise CheckpointError(
            f"{path} does not say what model it is: it has no general.architecture. It may be part of one, a "
            "LoRA or a projector; pass the file of the whole model"
        )
    refuse_other_depth(path, header.architecture, header.metadata, header.tensors)


def _unsupported(path: Path, header: GgufHeader) -> CheckpointError:
    import transformers
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    supported = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer", "tokenizer_config"})
    return CheckpointError(
        f"{path} has the GGUF architecture {header.architecture!r}, which transformers "
        f"{transformers.__version__} cannot convert; it knows {', '.join(supported)}. Use the model's "
        "safetensors instead"
    )


def _convert(path: Path, header: GgufHeader, copy: Path) -> None:
    # float32 weights, and 64 MiB for configuration and tokenizer.
    size = 4 * header.parameters + 2**26
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(copy.parent).free
        if free < size:
            raise CheckpointError(
                f"{copy.parent} has {free / 1e9:.1f} GB free, and the dequantised copy of {path.name} needs "
                f"{size / 1e9:.1f} GB. Make room, or set OSP_DIAG_CACHE to another directory"
            )
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=copy.parent))
    except OSError as error:
        raise CheckpointError(
            f"the dequantised copy of {path.name} cannot be kept in {copy.parent}: {error}. Set "
            "OSP_DIAG_CACHE to a directory that can be written"
        ) from error
    try:
        _dequantise(path, header, partial)
        partial.chmod(0o755)
        try:
            partial.rename(copy)
        except OSError:
            if not copy.is_dir():  # otherwise another process was faster
                raise
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be converted: {type(error).__name__}: {error}. If its quantisation is not "
            "supported, use another GGUF file of the model or its safetensors"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dequantise(path: Path, header: GgufHeader, destination: Path) -> None:
    import torch
    import transformers

    # transformers 5 leaves weights packed by default; before it had the option it never did.
    unpack = {}
    if hasattr(transformers, "GgufConfig"):
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with quietly(bars=True), _parsed_once():
        try:
            config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except (ValueError, KeyError, NotImplementedError) as error:
            if header.architecture in str(error):
                raise _unsupported(path, header) from error
            raise
        set_expert_sizes(header.tensors, config)
        _refuse_other_size(path, header, config)
        scaling = rotary_scaling(path, header.architecture, header.metadata, config)
        if scaling:
            config.rope_parameters = (config.rope_parameters or {}) | scaling
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent,
            config=config,
            gguf_file=path.name,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the message can name the tensor
            **unpack,
        )
        model, report = loaded
        refuse_incomplete(path.name, model, report)
        refuse_fewer_numbers(path, header.tensors, model)
        check_frequencies(path, model, scaling)
        model.save_pretrained(destination)
        unused = unused_tensors(header.architecture, header.tensors, model)
        notes = unused_notes({*unused, *report["unexpected_keys"]})
        (destination / NOTES).write_text(json.dumps({"notes": notes}), encoding="utf-8")
        if header.has_tokenizer:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            # transformers warns whenever a tokenizer that asks for clean-up decodes, and does without.
            tokenizer.clean_up_tokenization_spaces = False
            tokenizer.save_pretrained(destination)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers parses the file anew for configuration, weights and tokenizer, seconds each time."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = lru_cache(maxsize=1)(reader)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]


def _refuse_other_size(path: Path, header: GgufHeader, config: Any) -> None:
    """Where metadata are missing, defaults stand in for them: a model of 7 billion parameters, made up."""
    import torch
    import transformers

    with torch.device("meta"):
        described = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if described > 1.5 * header.parameters:
        raise CheckpointError(
            f"{path} cannot be converted: its metadata describe a model of {described:,} parameters, and its "
            f"tensors hold {header.parameters:,}. Its metadata are incomplete; use another GGUF file of the "
            "model"
        )


def read_header(path: Path) -> GgufHeader:
    """Read the metadata and the table of tensors of a GGUF file, and check that it is whole.

    Raises
    ------
    CheckpointError
        It is not GGUF, of an unknown version, or shorter than its header says.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != b"GGUF":
            raise CheckpointError(
                f"{path} is not a GGUF file: it starts with {magic!r}. Copy or download it again"
            )
        try:
            header = _header_after_magic(file, path)
            _check_kinds(path, header.metadata)
            return header
        except RecursionError:
            raise CheckpointError(f"{path} is damaged: its metadata are nested too deep") from None
        except (struct.error, UnicodeDecodeError):
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} is truncated or damaged: it ends inside its header, at {size:,} bytes. Copy or "
                "download it again"
            ) from None


def _header_after_magic(file: BinaryIO, path: Path) -> GgufHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    version = _scalar(file, "<I")
    if version in (2 << 24, 3 << 24):
        raise CheckpointError(
            f"{path} is a big-endian GGUF file, for machines such as IBM's s390x. Convert it with "
            "`gguf-convert-endian FILE little`, which comes with the package gguf, or use the usual file of "
            "the model"
        )
    if version not in (2, 3):
        raise CheckpointError(
            f"{path} is GGUF version {version}; versions 2 and 3 are supported. Download a later file of the "
            "model, or convert its safetensors anew with llama.cpp's convert_hf_to_gguf.py"
        )
    tensor_count, entry_count = _scalar(file, "<Q"), _scalar(file, "<Q")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = _string(file)
        metadata[key] = _value(file, _scalar(file, "<I"))
    end = parameters = 0
    tensors: dict[str, tuple[int, ...]] = {}
    for _ in range(tensor_count):
        name = _string(file)
        dimensions = [_scalar(file, "<Q") for _ in range(_scalar(file, "<I"))]
        kind, offset = _scalar(file, "<I"), _scalar(file, "<Q")
        try:
            values_per_block, bytes_per_block = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise CheckpointError(f"{path} stores {name!r} in GGML type {kind}, which is not known") from None
        count = math.prod(dimensions)
        parameters += count
        tensors[name] = tuple(dimensions)
        end = max(end, offset + count // values_per_block * bytes_per_block)
    # The data begin at the next multiple of the alignment after the header; offsets count from there.
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment < 2**20:
        raise CheckpointError(f"{path} is damaged: its general.alignment is {alignment!r}")
    size = -(-file.tell() // alignment) * alignment + end
    actual = path.stat().st_size
    if actual < size:
        raise CheckpointError(
            f"{path} is truncated: its header promises {size:,} bytes, and it has {actual:,}. Copy or "
            "download it again"
        )
    return GgufHeader(str(metadata.get("general.architecture", "")), metadata, tensors, parameters, size)


_COUNTS = re.compile(r"(count|count_kv|length|length_swa|length_k|length_l|dimension_count|_id|\.no)$")


def _check_kinds(path: Path, metadata: dict[str, Any]) -> None:
    """Refuse metadata of another kind than their names say, on which transformers would fail or never end."""
    for name, value in metadata.items():
        is_count = name.startswith(("split.", "tokenizer.")) or not name.startswith("general.")
        if is_count and _COUNTS.search(name):
            values = value if isinstance(value, list) else [value]
            right = all(type(number) is int and 0 <= number < 2**32 for number in values)
        elif name in ("general.architecture", "tokenizer.ggml.model"):
            right = isinstance(value, str)
        elif name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
            right = isinstance(value, list) and all(isinstance(text, str) for text in value)
        elif name in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
            right = isinstance(value, list) and all(isinstance(number, (int, float)) for number in value)
        else:
            continue
        if not right:
            raise CheckpointError(
                f"{path} is damaged: its {name} is {str(value)[:60]!r}. Copy or download it again"
            )


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    length = _scalar(file, "<Q")
    raw = file.read(length) if length <= os.fstat(file.fileno()).st_size else b""
    if len(raw) < length:
        raise struct.error
    return raw.decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(file)
    if kind != ARRAY:
        if kind not in SCALARS:
            raise struct.error
        return _scalar(file, SCALARS[kind])
    element, length = _scalar(file, "<I"), _scalar(file, "<Q")
    values = []
    for position in range(length):
        item = _value(file, element)
        if position < LONGEST_ARRAY:
            values.append(item)
    return values
