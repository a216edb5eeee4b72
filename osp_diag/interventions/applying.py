"""A model under interventions, for as long as a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from osp_diag.interventions.editing import Editing
from osp_diag.interventions.intervention import OF_WEIGHTS, Intervention
from osp_diag.interventions.targets import check
from osp_diag.interventions.weights import edited_weights
from osp_diag.sites.names import SiteMap
from osp_diag.sites.trace import is_compiled, unfused, unwrap

__all__ = ["intervened"]


@contextmanager
def intervened(
    model: nn.Module,
    sites: SiteMap,
    interventions: Sequence[Intervention],
    *,
    delimiter_ids: Sequence[int] = (),
) -> Iterator[nn.Module]:
    """Run ``model`` under all of these interventions within the block; yields the model.

    Weights are changed when the block begins; activations and attention in every forward pass of the whole
    model that the present thread runs in it. Whatever reads a site later in the pass sees it changed; of the
    stream (``residual_*``) that is all that follows. Attach probes within the block, so that they see it too.
    Afterwards the model is what it was: no hook is left, and the weights are the same to the bit, also if the
    block raises.

    Parameters
    ----------
    model : any torch module; wrappers of ``torch.compile`` and DDP are looked through
    sites : what :func:`osp_diag.sites.find_sites` found in it
    interventions : what to change; at one site, one after the other
    delimiter_ids : the tokens of the stratum ``delimiter``

    Raises
    ------
    SiteError, UsageError : a site, layer, channel, head or weight that the model does not have, as far as
        its modules tell before it runs; the rest in the first pass
    CaptureError : attention whose keys cannot be masked; in a pass, one with gradients, one that goes on with
        a cache, or one in which a site was not reached

    Examples
    --------
    >>> change = Intervention(operation="zero", site="residual_post", layers=(11,), channels=(507,))
    >>> with intervened(model, find_sites(model), [change]):  # doctest: +SKIP
    ...     logits = model(input_ids).logits
    """
    inner = unwrap(model)
    for intervention in interventions:
        check(inner, sites, intervention)
    weights = [i for i in interventions if i.operation in OF_WEIGHTS]
    others = [i for i in interventions if i.operation not in OF_WEIGHTS]
    with ExitStack() as stack:
        stack.enter_context(edited_weights(inner, sites, weights))
        if others:
            if is_compiled(model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(unfused(inner))
            stack.enter_context(Editing(inner, sites, others, delimiter_ids))
        yield model
