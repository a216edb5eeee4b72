"""Which Linears of a model are rounded, and what each of them is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from osp_diag.errors import CheckpointError
from osp_diag.schema import DOWN_WEIGHT, PROJECTION_WEIGHT
from osp_diag.sites import SiteMap, find_sites
from osp_diag.sites.stack import is_linear
from osp_diag.sites.trace import unwrap

__all__ = ["OTHER", "ROLES", "BlockLinear", "block_linears", "rounded_share"]

ROLES = ("query", "key", "value", "attention_output", "gate", "up", "down")
"""What a Linear of a block can be, by what it computes …"""
OTHER = "other"
"""… and what one is called that is none of these."""


@dataclass(frozen=True)
class BlockLinear:
    """A Linear inside the blocks.

    Attributes
    ----------
    path, module
        where it is; every module is listed once, also where blocks share it.
    layer
        of the first block that runs it.
    roles
        of :data:`ROLES`, several of a fused projection; :data:`OTHER` where what it computes was not
        recognised.
    head_width
        channels of one head of its input, of attention's output projection; else 0.
    """

    path: str
    module: nn.Linear
    layer: int
    roles: tuple[str, ...] = (OTHER,)
    head_width: int = 0


def block_linears(
    model: nn.Module, *, blocks: str | None = None, sites: SiteMap | None = None
) -> tuple[BlockLinear, ...]:
    """The Linears inside the blocks, in the order of the layers.

    Parameters
    ----------
    blocks : path or pattern of the stack of blocks, where the guess fails
    sites : what :func:`osp_diag.sites.find_sites` told of the model, where that is at hand

    Raises
    ------
    CheckpointError : blocks without Linears, or with weights that cannot be rounded
    SiteError : no blocks were found
    """
    model = unwrap(model)
    sites = sites or find_sites(model, blocks=blocks)
    roles, head_widths = _roles(sites)
    linears: list[BlockLinear] = []
    visited: set[nn.Module] = set()
    for layer, block in enumerate(sites.block_paths):
        # `memo` is shared between blocks: a module that two of them hold is listed once.
        for name, module in model.get_submodule(block).named_modules(memo=visited, prefix=block):
            if isinstance(module, nn.Linear):
                _check(name, module)
                heads = head_widths.get(name, 0)
                width = module.in_features // heads if heads else 0
                linears.append(BlockLinear(name, module, layer, tuple(roles.get(name, (OTHER,))), width))
            elif is_linear(module):
                raise CheckpointError(
                    f"{name} is a {type(module).__name__}, not an nn.Linear: which of its axes are output "
                    "channels is unknown, so the model cannot be quantized here"
                )
    if not linears:
        raise CheckpointError(f"the blocks of {type(model).__name__} hold no nn.Linear to quantize")
    return tuple(linears)


def rounded_share(model: nn.Module, *, blocks: str | None = None) -> float:
    """Which part of the numbers in the blocks' matrices is in Linears, and so is rounded, 0 to 1.

    Matrices are parameters of two or more dimensions, each counted once. Experts stacked in one parameter
    are matrices, and in no Linear.

    Raises
    ------
    CheckpointError, SiteError : as :func:`block_linears`
    """
    model = unwrap(model)
    sites = find_sites(model, blocks=blocks)
    matrices: dict[int, int] = {}
    for block in sites.block_paths:
        parameters = model.get_submodule(block).parameters()
        matrices |= {id(values): values.numel() for values in parameters if values.ndim > 1}
    weights = [linear.module.weight for linear in block_linears(model, sites=sites)]
    rounded = {id(weight): weight.numel() for weight in weights}
    return sum(rounded.values()) / max(sum((matrices | rounded).values()), 1)


def _roles(sites: SiteMap) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Path of a Linear → what it is; path of an output projection → how many heads its input has."""
    roles: dict[str, list[str]] = {}
    heads: dict[str, int] = {}
    by_layer = {
        tap.layer: tap.heads for tap in sites.taps if tap.site == "query_pre_rope" and tap.side == "output"
    }
    for tap in sites.taps:
        role = "down" if tap.site == DOWN_WEIGHT else tap.site.removeprefix(PROJECTION_WEIGHT)
        if tap.side != "weight" or role not in ROLES or role in roles.get(tap.module, ()):
            continue
        roles.setdefault(tap.module, []).append(role)
        if role == "attention_output" and by_layer.get(tap.layer):
            heads[tap.module] = by_layer[tap.layer]
    return roles, heads


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
