"""The Hugging Face Hub: whether a model is there and can be reached, asked once and quickly."""

from __future__ import annotations

from pathlib import Path

from osp_diag.checkpoints.path_advice import path_advice
from osp_diag.errors import CheckpointError
from osp_diag.quiet import quietly

__all__ = ["reach"]

PATIENCE = 10.0
"""Seconds to wait for the hub's answer. Its own client would retry for most of a minute."""


def reach(identifier: str) -> bool:
    """Whether only the local cache can serve this model (True) or the hub itself can (False).

    Raises
    ------
    CheckpointError
        There is no such model, access is refused, or the hub cannot be reached and nothing is cached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        with quietly():
            HfApi().model_info(identifier, timeout=PATIENCE)
        return False
    except GatedRepoError as error:
        raise CheckpointError(
            f"{identifier} is a gated model. Accept its terms at https://huggingface.co/{identifier}, then "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CheckpointError(
            f"{identifier} is neither a path here nor a model on the Hugging Face Hub{_advice(identifier)}. "
            "If it is private, log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except Exception as error:
        if isinstance(try_to_load_from_cache(identifier, "config.json"), str):
            return True
        raise CheckpointError(
            f"{identifier} is not a path here{_advice(identifier)}, and the Hugging Face Hub cannot be "
            f"reached ({type(error).__name__}: {str(error).strip() or 'no answer'}). On a machine with a "
            f"connection, run `hf download {identifier} --local-dir {identifier.rpartition('/')[2]}`, copy "
            "that directory here and pass its path; or `osp-diag demo` for a model from the package registry"
        ) from error


def _advice(identifier: str) -> str:
    advice = path_advice(Path.cwd() / identifier)
    return f" ({advice.removeprefix('; ')})" if "did you mean" in advice else ""
