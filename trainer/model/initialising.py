"""A model's first weights, which depend on the seed alone and not on how ranks share the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from osp_diag.trainer.model.norms import RMSNorm

__all__ = ["draw_weights", "spend_layer_draws"]


@torch.no_grad()
def draw_weights(model: nn.Module, *, deviation: float, orthogonal: Iterable[nn.Module | None]) -> None:
    """Draw all weights from torch's random state on the CPU, one parameter after another.

    Of a sharded parameter every rank draws the whole, one at a time, and keeps its rows: no rank ever holds
    more of the model than its shards and one parameter.

    Parameters
    ----------
    deviation : of the normal distribution of all matrices
    orthogonal : modules whose matrix is orthogonal instead
    """
    projections, drawn = set(orthogonal), set()
    for module in model.modules():
        if isinstance(module, RMSNorm):
            _fill(module.weight, partial(nn.init.constant_, val=module.scale))
        elif isinstance(module, (nn.Embedding, nn.Linear)) and module.weight not in drawn:
            drawn.add(module.weight)  # a tied head is the embedding
            draw = nn.init.orthogonal_ if module in projections else partial(nn.init.normal_, std=deviation)
            _fill(module.weight, draw)
        elif isinstance(sinks := getattr(module, "sinks", None), Tensor):
            _fill(sinks, nn.init.zeros_)


def spend_layer_draws(model: nn.Module) -> None:
    """Draw, and throw away, what torch draws as it makes the layers of ``model`` anywhere but on ``meta``.

    A seed's weights are what comes after.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        elif isinstance(module, nn.Embedding):
            nn.Embedding(module.num_embeddings, module.embedding_dim)


def _fill(parameter: Tensor, draw: Callable[[Tensor], object]) -> None:
    if not isinstance(parameter, DTensor):
        draw(parameter)
        return
    whole = torch.empty(parameter.shape, dtype=parameter.dtype)
    draw(whole)
    mesh = parameter.device_mesh
    # Every rank has drawn the same: nothing is sent.
    rows = distribute_tensor(whole.to(parameter.device), mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(rows)
