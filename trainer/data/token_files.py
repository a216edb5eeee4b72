"""Files of token ids, memory-mapped as their own headers say: NumPy's, llm.c's, Megatron's, or none."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from osp_diag.errors import TokenError
from osp_diag.text.documents import open_file

__all__ = ["token_array"]

LLM_C_WORDS = 256
"""int32 numbers of llm.c's header: magic, version, how many tokens, zeros."""
LLM_C_TYPES: dict[int, np.dtype] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}
"""Magic → type of the ids: GPT-2's (modded-nanogpt's too), Llama 3's."""
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LOOKED_AT = 1 << 20
LARGEST_HALF = 7
"""Upper halves of 32-bit ids are at most this: vocabularies stay below 2¹⁹."""


def token_array(file: Path, key: str, vocabulary_size: int) -> np.ndarray:
    """The ids of one file, as they lie there.

    A ``.npy`` has a type of its own. A ``.bin`` has the one that llm.c's header says, or the ``.idx`` of
    Megatron beside it; without either it is uint16, as nanoGPT writes it.

    Raises
    ------
    TokenError : it holds no ids, or ids of a type that it does not say; names ``key``
    """
    try:
        if ".npz" in file.suffixes:
            raise ValueError("a .npz holds several arrays; give the array as .npy")
        is_numpy = ".npy" in file.suffixes
        array = _numpy_array(file) if is_numpy else _bare_array(file, vocabulary_size)
    except (OSError, EOFError, ValueError) as error:
        raise TokenError(f"{key}={file} holds no token ids: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise TokenError(
            f"{key}={file} has {array.dtype} of shape {array.shape}; token ids are integers in one "
            "dimension, one or more"
        )
    return array


def _numpy_array(file: Path) -> np.ndarray:
    if file.suffix == ".npy":
        return np.load(file, mmap_mode="r", allow_pickle=False)
    with open_file(file) as stream:
        return np.load(io.BytesIO(stream.read()), allow_pickle=False)


def _bare_array(file: Path, vocabulary_size: int) -> np.ndarray:
    content: np.ndarray
    if file.suffix == ".bin":
        if not file.stat().st_size:
            raise ValueError("it is empty")
        content = np.memmap(file, dtype=np.uint8, mode="r")
    else:
        with open_file(file) as stream:
            content = np.frombuffer(stream.read(), np.uint8)
    index = file.with_suffix(".idx")
    if index.is_file():
        return _of_type(content, _megatron_type(index, content.size))
    if content.size >= 4 * LLM_C_WORDS:
        header = content[: 4 * LLM_C_WORDS].view("<i4")
        kind = LLM_C_TYPES.get(int(header[0]))
        if kind is not None:
            return _after_header(content, header, kind)
    return _without_header(content, vocabulary_size)


def _after_header(content: np.ndarray, header: np.ndarray, kind: np.dtype) -> np.ndarray:
    ids, count = _of_type(content[header.nbytes :], kind), int(header[2])
    if len(ids) != count:
        raise ValueError(
            f"llm.c's header promises {count:,} ids of {kind.name}, and {len(ids):,} follow; copy or make "
            "it again"
        )
    return ids


def _megatron_type(index: Path, size: int) -> np.dtype:
    """The type that a Megatron index names, after its magic and a version of eight bytes."""
    head = index.read_bytes()[: len(MEGATRON_MAGIC) + 9]
    kind = MEGATRON_TYPES.get(head[-1]) if len(head) == len(MEGATRON_MAGIC) + 9 else None
    if not head.startswith(MEGATRON_MAGIC) or head[9:17] != b"\x01" + bytes(7) or kind is None:
        raise ValueError(
            f"{index.name} lies beside it, as of Megatron's indexed data sets, and does not say the type "
            "of the ids. Make the pair again, or write the ids as .npy"
        )
    if size % np.dtype(kind).itemsize:
        raise ValueError(
            f"{index.name} says {np.dtype(kind).name}, and {size:,} bytes are no whole number of them"
        )
    return np.dtype(kind)


def _without_header(content: np.ndarray, vocabulary_size: int) -> np.ndarray:
    ids = _of_type(content, np.dtype("<u2"))
    beginning = ids[:LOOKED_AT]
    halves = beginning[: len(beginning) // 2 * 2].reshape(-1, 2)
    if len(halves) >= 32 and halves[:, 1].max() <= LARGEST_HALF < halves[:, 0].max():
        raise ValueError(
            "every second number of 16 bits is nearly zero, so these are ids of 32 bits; a .bin without a "
            "header is read as uint16. Write them as .npy: numpy.save('ids.npy', numpy.fromfile(FILE, "
            "'uint32'))"
        )
    if vocabulary_size > 1 << 16:
        raise ValueError(
            f"a .bin without a header is uint16, which cannot hold {vocabulary_size:,} different ids "
            "(model.vocabulary_size). Write them as .npy, which has a type of its own"
        )
    return ids


def _of_type(content: np.ndarray, kind: np.dtype) -> np.ndarray:
    if not content.size:
        raise ValueError("it is empty")
    if content.size % kind.itemsize:
        raise ValueError(
            f"{content.size} bytes are no whole number of {kind.name}; ids of another type go into a .npy"
        )
    return content.view(kind)
