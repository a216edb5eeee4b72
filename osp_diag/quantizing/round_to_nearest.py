"""What 4-bit arithmetic would do to a model: round-to-nearest quantization, simulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from osp_diag.errors import CheckpointError, UsageError
from osp_diag.quantizing.results import UNQUANTIZED
from osp_diag.sites import find_sites
from osp_diag.sites.stack import is_linear
from osp_diag.sites.trace import unwrap

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

__all__ = ["check_bits", "round_to_nearest", "rounded_share"]

_FEWEST_BITS, _MOST_BITS = 2, 8


@contextmanager
def round_to_nearest(
    model: nn.Module, weight_bits: int = 4, activation_bits: int = 4, *, blocks: str | None = None
) -> Iterator[tuple[str, ...]]:
    """The model as if every ``nn.Linear`` inside its blocks multiplied few-bit integers, while this lasts.

    Quantized are, of each such Linear (in a Llama q, k, v, o, gate, up and down of every layer):

    - its *weight*, symmetric per output channel: scale s = max|w| / ((2ᵇ − 1)/2) of its row, values
      s · clamp(round(w/s), −2ᵇ⁻¹, 2ᵇ⁻¹ − 1), rounded once (the row's largest |w| is half a step off);
    - its *input*, asymmetric per token, at every call: s = (max(x, 0) − min(x, 0)) / (2ᵇ − 1) over the
      token's channels, zero point z = round(−2ᵇ⁻¹ − min(x, 0)/s), values
      s · (clamp(round(x/s + z), −2ᵇ⁻¹, 2ᵇ⁻¹ − 1) − z).

    Left alone are embedding, head, norms, biases, the products of attention with keys and values, and
    weights that are in no Linear (experts stacked in one parameter). Ranges are plain minima and maxima:
    nothing is clipped, calibrated or rotated. OSP's tables clip weights by a search for the least squared
    error and divide by 2ᵇ⁻¹ − 1 (7 at 4 bits, not 7.5), so their numbers are not these.

    The arithmetic is that of ``compressed-tensors``, in float32 (float64 for float64 models); the products
    themselves run in the model's dtype. No gradient passes. Afterwards the model has its own weights back.
    Meanwhile the blocks' weights take twice their memory.

    Parameters
    ----------
    model : any model whose blocks osp_diag finds; one pass of eleven tokens finds them
    weight_bits, activation_bits : 2 to 8; 16 leaves weights or activations bit for bit as they are
    blocks : path or pattern of the stack of blocks, where the guess fails

    Yields
    ------
    Paths of the Linears that are quantized.

    Raises
    ------
    UsageError : bits that have no meaning, or ``compressed-tensors`` is not installed
    CheckpointError : blocks without Linears, or with weights that cannot be rounded
    SiteError : no blocks were found
    """
    scheme = check_bits(weight_bits, activation_bits)
    linears = _linears_of_blocks(model, blocks)
    # Whatever fails in between, what was exchanged up to there is put back, in reverse order.
    with ExitStack() as undo:
        if scheme.weights is not None:
            _round_weights(linears, scheme.weights, undo)
        if scheme.input_activations is not None:
            for linear in linears.values():
                hook = _rounding_of_inputs(scheme.input_activations)
                undo.callback(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield tuple(linears)


def rounded_share(model: nn.Module, *, blocks: str | None = None) -> float:
    """Which part of the numbers in the blocks' matrices :func:`round_to_nearest` rounds, 0 to 1.

    Matrices are parameters of two or more dimensions, each counted once. Experts stacked in one parameter
    are matrices, and in no Linear.

    Raises
    ------
    CheckpointError, SiteError : as :func:`round_to_nearest`
    """
    model = unwrap(model)
    matrices: dict[int, int] = {}
    for block in find_sites(model, blocks=blocks).block_paths:
        parameters = model.get_submodule(block).parameters()
        matrices |= {id(values): values.numel() for values in parameters if values.ndim > 1}
    rounded = {
        id(linear.weight): linear.weight.numel() for linear in _linears_of_blocks(model, blocks).values()
    }
    return sum(rounded.values()) / max(sum((matrices | rounded).values()), 1)


def check_bits(weight_bits: int, activation_bits: int) -> QuantizationScheme:
    """The scheme of ``compressed-tensors`` for so many bits.

    Raises
    ------
    UsageError : bits that have no meaning, or ``compressed-tensors`` is not installed
    """
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if bits != UNQUANTIZED and not _FEWEST_BITS <= bits <= _MOST_BITS:
            raise UsageError(f"{name}={bits}: give {_FEWEST_BITS} to {_MOST_BITS}, or {UNQUANTIZED} for none")
    try:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    except ModuleNotFoundError as error:
        raise UsageError(
            f"simulated quantization needs the package compressed-tensors (no module {error.name!r}): "
            "pip install 'osp-diag[quantization]'"
        ) from None
    # Ranges of inputs are taken anew at every call ("dynamic"), those of weights once.
    return QuantizationScheme(
        targets=["Linear"],
        weights=None
        if weight_bits == UNQUANTIZED
        else QuantizationArgs(num_bits=weight_bits, symmetric=True, strategy="channel"),
        input_activations=None
        if activation_bits == UNQUANTIZED
        else QuantizationArgs(num_bits=activation_bits, symmetric=False, strategy="token", dynamic=True),
    )


def _linears_of_blocks(model: nn.Module, blocks: str | None) -> dict[str, nn.Linear]:
    """Path → Linear, each once, also where blocks share their modules."""
    model = unwrap(model)
    linears: dict[str, nn.Linear] = {}
    visited: set[nn.Module] = set()
    for block in find_sites(model, blocks=blocks).block_paths:
        # `memo` is shared between blocks: a module that two of them hold is listed once.
        for name, module in model.get_submodule(block).named_modules(memo=visited, prefix=block):
            if isinstance(module, nn.Linear):
                _check(name, module)
                linears[name] = module
            elif is_linear(module):
                raise CheckpointError(
                    f"{name} is a {type(module).__name__}, not an nn.Linear: which of its axes are output "
                    "channels is unknown, so the model cannot be quantized here"
                )
    if not linears:
        raise CheckpointError(f"the blocks of {type(model).__name__} hold no nn.Linear to quantize")
    return linears


def _check(name: str, linear: nn.Linear) -> None:
    if linear.weight.is_meta:
        reason = "its weight is kept elsewhere until it is used; open the model on one device"
    elif not linear.weight.is_floating_point():
        reason = f"its weight is {linear.weight.dtype}, quantized already; open the original checkpoint"
    elif parametrize.is_parametrized(linear, "weight"):
        reason = "its weight is computed from others; remove the parametrization first"
    else:
        return
    raise CheckpointError(f"{name} cannot be rounded: {reason}")


def _round_weights(linears: dict[str, nn.Linear], arguments: QuantizationArgs, undo: ExitStack) -> None:
    """Exchange parameters, not their values: whoever else holds one (a tied head) keeps its numbers."""
    for linear in linears.values():
        original = linear.weight
        undo.callback(setattr, linear, "weight", original)
        linear.weight = nn.Parameter(_rounded(original.detach(), arguments), requires_grad=False)


def _rounding_of_inputs(arguments: QuantizationArgs) -> Any:
    """A hook before the forward pass of a Linear."""

    def rounded_input(
        module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (_rounded(inputs[0], arguments), *inputs[1:]), keywords
        return inputs, keywords | {"input": _rounded(keywords["input"], arguments)}

    return rounded_input


def _rounded(
    values: Float[Tensor, "... row channel"], arguments: QuantizationArgs
) -> Float[Tensor, "... row channel"]:
    """Each row on a grid of its own, from its minimum and maximum.

    The library's own observer takes the first two dimensions for the token whatever there are; with one
    row of tokens (a layer of experts) all would share one grid. So the range is taken here.
    """
    from compressed_tensors.quantization import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    if values.numel() == 0:
        return values
    # Scale and zero point of the formulas at `round_to_nearest`, from the row's minimum and maximum.
    working = values if values.dtype == torch.float64 else values.float()
    low, high = torch.aminmax(working.detach(), dim=-1, keepdim=True)
    scale, zero_point = calculate_qparams(low, high, arguments)
    return fake_quantize(working, scale, zero_point, arguments).to(values.dtype)
