"""Whether checkpoints are of one model and one tokenizer, read off their files before any is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from osp_diag.checkpoints.hub import check_revisions
from osp_diag.checkpoints.pretrained import check_files
from osp_diag.checkpoints.series import StepCheckpoint
from osp_diag.checkpoints.weight_files import read_json
from osp_diag.errors import CheckpointError
from osp_diag.json_text import parse_object
from osp_diag.wording import listed

__all__ = ["another_tokenizer", "check_alike", "tokenizer_difference"]

SHAPE_FIELDS = (
    "model_type", "architectures", "vocab_size", "hidden_size", "n_embd", "d_model", "num_hidden_layers",
    "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head", "n_heads", "num_heads",
    "num_key_value_heads", "head_dim", "intermediate_size", "n_inner", "d_ff", "num_experts",
    "num_local_experts",
)  # fmt: skip
"""What configurations call the shape of a model. What they leave open is compared once a model is open."""


def check_alike(members: Sequence[StepCheckpoint], *, compare_tokenizers: bool) -> None:
    """Refuse checkpoints whose files are not whole, or not of the same model, without loading weights.

    Parameters
    ----------
    compare_tokenizers : False where one is used in place of theirs

    Raises
    ------
    CheckpointError : names the checkpoint, and what is wrong or differs
    """
    by_repository: dict[str, list[str]] = {}
    for one in members:
        if one.revision is not None:
            by_repository.setdefault(one.source, []).append(one.revision)
    for repository, revisions in by_repository.items():
        check_revisions(repository, revisions)
    directories = [(one, directory) for one in members if (directory := one.directory) is not None]
    for _, directory in directories:
        check_files(directory)
    if not directories:
        return
    first, place = directories[0]
    shape = dict(_shape(read_json(place / "config.json")))
    for one, directory in directories[1:]:
        other = dict(_shape(read_json(directory / "config.json")))
        differing = [field for field in (*shape, *other) if shape.get(field) != other.get(field)]
        if differing:
            field = differing[0]
            raise CheckpointError(
                f"{one.name} is another model than {first.name}: {field} is {other.get(field, 'absent')} in "
                f"its config.json, and {shape.get(field, 'absent')} in the other; a run over steps is of one "
                "model"
            )
        if compare_tokenizers:
            _check_tokenizer(one, directory, first, place)


def tokenizer_difference(tokenizer: Any, other: Any) -> str:
    """In what a tokenizer differs from another one, in words; nothing where both make the same of a text.

    How they pad and truncate is left out: a training changes it, and no token here.
    """
    if (tokenizer is None) != (other is None):
        return "it has none" if tokenizer is None else "the other has none"
    vocabulary, others = _vocabulary(tokenizer), _vocabulary(other)
    if len(vocabulary) != len(others):
        return f"it has {len(vocabulary):,} tokens and the other {len(others):,}"
    differing = sorted((index, token) for token, index in vocabulary.items() if others.get(token) != index)
    if differing:
        index, token = differing[0]
        return f"its token {token!r} has the id {index}, in the other {others.get(token, 'none')}"
    sections, other_sections = _sections(tokenizer), _sections(other)
    names = [
        name for name in {**sections, **other_sections} if sections.get(name) != other_sections.get(name)
    ]
    return f"its {listed(names)} differ from the other's" if names else ""


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return dict(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else {}


def _sections(tokenizer: Any) -> dict[str, Any]:
    """The parts of a fast tokenizer's own serialisation that decide how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    content = parse_object(backend.to_str()) if hasattr(backend, "to_str") else {}
    return {name: part for name, part in content.items() if name not in ("version", "padding", "truncation")}


def _shape(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _shape(value, f"{path}{key}.")
        elif key in SHAPE_FIELDS:
            yield f"{path}{key}", value


def _check_tokenizer(one: StepCheckpoint, directory: Path, first: StepCheckpoint, place: Path) -> None:
    """Compare ``tokenizer.json``; one without is compared when it is opened."""
    texts = [folder / "tokenizer.json" for folder in (directory, place)]
    if not all(path.is_file() for path in texts) or texts[0].read_bytes() == texts[1].read_bytes():
        return
    from osp_diag.text.tokenizer_files import open_tokenizer

    difference = tokenizer_difference(*(open_tokenizer(path) for path in texts))
    if difference:
        raise another_tokenizer(one.name, first.name, difference)


def another_tokenizer(name: str, first: str, difference: str) -> CheckpointError:
    """What is raised where the tokenizers of two checkpoints differ."""
    return CheckpointError(
        f"{name} has another tokenizer than {first}: {difference}. The same tokens are run through all; name "
        "one tokenizer for all with --tokenizer (tokenizer=) if their weights take the same ids"
    )
