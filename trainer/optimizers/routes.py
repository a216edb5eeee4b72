"""Where parameters go, as data: one route for each, and the table of all."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from osp_diag.trainer.config import Destination

__all__ = ["Role", "Route", "Routing"]

Role = Literal["hidden", "embedding_projection", "embedding", "head", "vector"]


@dataclass(frozen=True)
class Route:
    """One parameter's way.

    Attributes
    ----------
    name : as ``named_parameters`` has it, without what wrappers add
    shape : whole, also where it is sharded
    role : ``hidden`` matrix, ``embedding_projection`` (both of them), ``embedding`` (tied: the head, too),
        ``head``, or ``vector`` for norm gains, sinks and all else without two dimensions
    optimizer, lr, weight_decay : who moves it, the peak learning rate, and the decay multiplied by it
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    optimizer: Destination
    lr: float
    weight_decay: float

    @property
    def group(self) -> str:
        """``optimizer.role``: the parameters whose updates are summed up together."""
        return f"{self.optimizer}.{self.role}"


@dataclass(frozen=True)
class Routing:
    """Where every trainable parameter goes.

    Attributes
    ----------
    routes : in the model's order
    frozen : names of the parameters that need no gradient, which nothing moves
    warnings : what is no mistake, but no OSP either: sentences to show
    """

    routes: tuple[Route, ...]
    frozen: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def of(self, name: str) -> Route:
        """The route of a parameter; KeyError if there is none."""
        for route in self.routes:
            if route.name == name:
                return route
        raise KeyError(name)

    def table(self) -> str:
        """The routes as aligned text; parameters that differ by their layer alone share a line."""
        rows: dict[tuple[str, ...], int] = {}
        for route in self.routes:
            shape = " × ".join(map(str, route.shape)) or "scalar"
            key = (folded(route.name), shape, route.optimizer, f"{route.lr:g}", f"{route.weight_decay:g}")
            rows[key] = rows.get(key, 0) + 1
        lines = [["parameter", "shape", "count", "optimizer", "lr", "weight decay"]]
        lines += [[name, shape, f"×{count}", *cells] for (name, shape, *cells), count in rows.items()]
        lines += [[name, "", "×1", "frozen", "", ""] for name in self.frozen]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def folded(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` → ``model.layers.*.mlp.up_proj.weight``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
