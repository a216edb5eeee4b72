"""What an intervention makes of one attention call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from osp_diag.errors import UsageError
from osp_diag.interventions.intervention import KEYS, Intervention
from osp_diag.interventions.operations import changed
from osp_diag.seams.call import AttentionCall
from osp_diag.seams.editing import without_keys
from osp_diag.sites.names import SiteMap

__all__ = ["edited_call"]


def edited_call(
    sites: SiteMap,
    intervention: Intervention,
    layer: int,
    call: AttentionCall,
    chosen: Bool[Tensor, "batch token"],
    operate: Callable[[Intervention, int, Tensor, Tensor], Tensor] = changed,
) -> AttentionCall:
    """The call to compute in place of one.

    Raises
    ------
    UsageError : a head or channel that the call does not have
    """
    if intervention.operation == KEYS:
        masked = chosen[:, None, None, :]
        if intervention.heads is not None:
            heads = call.tensor.shape[1]
            if max(intervention.heads) >= heads:
                raise UsageError(
                    f"{intervention}: attention of layer {layer} has heads 0 to {heads - 1}, not "
                    f"{max(intervention.heads)}"
                )
            mine = torch.zeros(heads, dtype=torch.bool, device=chosen.device)
            mine[list(intervention.heads)] = True
            masked = masked & mine[:, None, None]
        return without_keys(call, masked)
    name = intervention.site.removesuffix("_post_rope")
    value = getattr(call, name)
    # Keys and values that the model repeats for several heads are one head each.
    copies = 1 if name == "query" else sites.key_copies.get(layer, 1)
    new = operate(intervention, layer, value[:, ::copies], chosen)
    operand: dict[str, Any] = {name: new.repeat_interleave(copies, dim=1) if copies > 1 else new}
    return replace(call, **operand)
