"""A model run on arguments of its own in place of sequences of tokens: images, features, several inputs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from osp_diag.checkpoints import Checkpoint
from osp_diag.errors import UsageError
from osp_diag.probing.identity import model_attributes
from osp_diag.probing.ranks import is_distributed
from osp_diag.probing.saving import check_out
from osp_diag.probing.session import Probe
from osp_diag.probing.settings import MeasurementSettings
from osp_diag.runs.run import Run, open_run
from osp_diag.sites.trace import unwrap

__all__ = ["ModelInputs", "example_inputs", "parsed_shapes", "probe_inputs", "random_inputs"]

SEED = 0


@dataclass(frozen=True)
class ModelInputs:
    """Arguments of forward passes, by name; of the first one the sites are found too."""

    passes: tuple[Mapping[str, Any], ...]
    source: str


def example_inputs(model: nn.Module, example: Any, source: str) -> ModelInputs:
    """Arguments that a user's function returned: of one forward pass, or a list of several.

    Parameters
    ----------
    example : a mapping of arguments, a tuple of them in order, a single tensor, or a list of such

    Raises
    ------
    UsageError : there are none, or the model does not take them
    """
    entries = list(example) if isinstance(example, list) else [example]
    if not entries:
        raise UsageError(f"{source} returned an empty list; it must return the arguments of a forward pass")
    return ModelInputs(tuple(_named(model, entry, source) for entry in entries), source)


def random_inputs(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> ModelInputs:
    """One forward pass on standard normal numbers of those shapes, in the model's dtype, from a fixed seed.

    Raises
    ------
    UsageError : the model takes no argument of that name
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(SEED)
    values = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    words = ", ".join(f"{name} of shape {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    source = f"standard normal numbers: {words}"
    return ModelInputs((_named(model, values, source),), source)


def probe_inputs(
    checkpoint: Checkpoint,
    inputs: ModelInputs,
    settings: MeasurementSettings,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> Run:
    """Probe an opened checkpoint on such inputs.

    Sequences are what enters the first block; no kept group of batches tells what is significant, and no
    weights are mapped.

    Raises
    ------
    SiteError, StoreError, UsageError : before any long work
    """
    if is_distributed():
        raise UsageError("inputs of your own are run by one process; start it without torchrun")
    settings.check_held_out()
    if out is not None:
        check_out(out, overwrite=overwrite)
    settings = replace(settings, example=inputs.passes[0], token_groups=0)
    session = Probe(
        checkpoint.model,
        measurement_settings=settings,
        tokenizer=checkpoint.tokenizer,
        attributes={
            **model_attributes(checkpoint),
            "token_source": inputs.source,
            "protocol": "sequence",
            "bos": "as given",
        },
        deferred=False,
    )
    session.attributes["notes"] += checkpoint.notes
    session.measure(0, inputs.passes)
    if out is None:
        return session.run
    session.save(out, overwrite=overwrite)
    return open_run(out)


def _named(model: nn.Module, arguments: Any, source: str) -> Mapping[str, Any]:
    """By name, on the model's device."""
    device = next(model.parameters()).device
    signature = inspect.signature(unwrap(model).forward)
    try:
        if isinstance(arguments, Mapping):
            signature.bind(**arguments)
            named: Mapping[str, Any] = arguments
        else:
            positional = arguments if isinstance(arguments, tuple) else (arguments,)
            named = signature.bind(*positional).arguments
    except TypeError as error:
        raise UsageError(
            f"{type(unwrap(model)).__name__} does not take {source}: {error}; its forward is "
            f"forward{signature}"
        ) from error
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in named.items()}


def parsed_shapes(entries: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``pixel_values=8x3x32x32`` → the name and its shape.

    Raises
    ------
    UsageError : it is written otherwise, or is larger than 2³¹ numbers
    """
    shapes = {}
    for entry in entries:
        name, _, sizes = entry.partition("=")
        if not name.isidentifier() or not sizes or not all(size.isdigit() for size in sizes.split("x")):
            raise UsageError(
                f"--random-inputs {entry!r}: write NAME=SHAPE, for example pixel_values=8x3x32x32"
            )
        shapes[name] = tuple(int(size) for size in sizes.split("x"))
        if not 0 < math.prod(shapes[name]) < 2**31:
            raise UsageError(f"--random-inputs {entry!r}: that is no shape of 1 to 2³¹ numbers")
    return shapes
