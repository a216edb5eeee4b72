"""The Hugging Face Hub: whether a model is there and can be reached, asked once and quickly."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from osp_diag.checkpoints.path_advice import path_advice
from osp_diag.errors import CheckpointError
from osp_diag.quiet import quietly

__all__ = ["check_revisions", "reach"]

_COMMIT = re.compile("[0-9a-f]{7,40}")

PATIENCE = 10.0
"""Seconds to wait for the hub's answer. Its own client would retry for most of a minute."""


def reach(identifier: str, revision: str | None = None) -> bool:
    """Whether only the local cache can serve this model (True) or the hub itself can (False).

    Raises
    ------
    CheckpointError
        There is no such model or revision, access is refused, or the hub cannot be reached and nothing is
        cached.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with quietly():
            HfApi().model_info(identifier, revision=revision, timeout=PATIENCE)
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
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{identifier} has no revision {revision!r}: no branch, tag or commit is called so; "
            f"https://huggingface.co/{identifier}/refs lists them"
        ) from error
    except Exception as error:
        if isinstance(try_to_load_from_cache(identifier, "config.json", revision=revision), str):
            return True
        option = "" if revision is None else f" --revision {revision}"
        raise CheckpointError(
            f"{identifier} is not a path here{_advice(identifier)}, and the Hugging Face Hub cannot be "
            f"reached ({type(error).__name__}: {str(error).strip() or 'no answer'}). On a machine with a "
            f"connection, run `hf download {identifier}{option} --local-dir "
            f"{revision or identifier.rpartition('/')[2]}`, copy that directory here and pass its path; or "
            "`osp-diag demo` for a model from the package registry"
        ) from error


def check_revisions(identifier: str, revisions: Sequence[str]) -> None:
    """Refuse revisions that a model of the hub does not have, or, where it can't be reached, the cache.

    Raises
    ------
    CheckpointError : as :func:`reach`, of the first that is not there
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if reach(identifier, revisions[0]):
        paths = {r: try_to_load_from_cache(identifier, "config.json", revision=r) for r in revisions}
        known = {revision for revision, path in paths.items() if isinstance(path, str)}
    else:  # one question for all: Pythia has 154
        try:
            with quietly():
                references = HfApi().list_repo_refs(identifier)
            known = {reference.name for reference in (*references.branches, *references.tags)}
        except Exception:  # then each is asked for, and the answer says what is wrong
            known = set()
    for revision in revisions:
        if revision not in known and not _COMMIT.fullmatch(revision):
            reach(identifier, revision)


def _advice(identifier: str) -> str:
    advice = path_advice(Path.cwd() / identifier)
    return f" ({advice.removeprefix('; ')})" if "did you mean" in advice else ""
