"""What determines a number, as attributes of a run: model, tokenizer, tokens, estimators, libraries."""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from osp_diag.checkpoints import Checkpoint
from osp_diag.estimators import estimator_parameters as parameter_names
from osp_diag.estimators.base import Estimator
from osp_diag.tokens import TokenBatches
from osp_diag.version import __version__

__all__ = [
    "circumstances",
    "delimiter_fingerprint",
    "estimator_parameters",
    "library_versions",
    "model_attributes",
    "token_attributes",
    "tokenizer_fingerprint",
]

LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "xarray", "zarr", "jax")
"""Those whose versions a number can depend on."""


def model_attributes(checkpoint: Checkpoint) -> dict[str, Any]:
    """What identifies an opened checkpoint and its tokenizer."""
    tokenizer = checkpoint.tokenizer
    return {
        "model_name": checkpoint.name,
        "model_source": checkpoint.source,
        "model_fingerprint": checkpoint.fingerprint,
        "architecture": checkpoint.architecture,
        "dtype": checkpoint.dtype,
        "device": checkpoint.device,
        "attention_implementation": str(
            getattr(checkpoint.config, "_attn_implementation", None) or "the model's own"
        ),
        "tokenizer": "none" if tokenizer is None else type(tokenizer).__name__,
        "tokenizer_fingerprint": "none" if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """32 hexadecimal digits of the SHA-256 of all that decides how text becomes ids.

    That is the fast tokenizer's own serialisation (vocabulary, merges, normalisation, what it puts first),
    or the vocabulary of a tokenizer that has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "to_str"):
        content = backend.to_str()
    elif hasattr(tokenizer, "get_vocab"):
        content = repr(sorted(tokenizer.get_vocab().items()))
    else:
        content = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def token_attributes(batches: TokenBatches) -> dict[str, Any]:
    """What identifies the tokens."""
    return {
        "token_source": batches.source,
        "token_fingerprint": batches.fingerprint,
        "protocol": batches.protocol,
        "bos": batches.bos,
        "bos_ids": list(batches.bos_ids),
        "sequence_length": batches.sequence_length,
        "tokens": int(batches.attention_mask.sum()),
        "sequences": len(batches.tokens),
    }


def delimiter_fingerprint(delimiter_ids: Iterable[int]) -> str:
    """How many token ids form the delimiter stratum, and 16 hexadecimal digits of their SHA-256."""
    ids = sorted(delimiter_ids)
    digest = hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:16]
    return f"{len(ids)} ids, {digest}" if ids else "none"


def estimator_parameters(estimators: Iterable[Estimator]) -> dict[str, dict[str, Any]]:
    """Identifier → parameters, of the estimators that have any."""
    by_identifier = {
        estimator.identifier: {name: getattr(estimator, name) for name in parameter_names(type(estimator))}
        for estimator in estimators
    }
    return {identifier: parameters for identifier, parameters in by_identifier.items() if parameters}


def library_versions() -> dict[str, str]:
    """Installed library → version, Python's and our own included."""
    # Our own is not asked of the installer: a clone need not be installed.
    versions = {"osp-diag": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


_WEBHOOK = re.compile(r"(webhook=\w+://[^/\s]*)\S*")
"""Who has such an address may post to it, and runs are sent to others: the host says enough."""


def circumstances() -> dict[str, Any]:
    """When and how the run came about."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _WEBHOOK.sub(r"\1/…", " ".join(sys.argv)),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
