"""Measurements are compiled, each apart from the others, whatever the observed model is made to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from osp_diag.capture.compiling import compile_apart


def test_measurements_stay_compiled_where_the_model_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append("compiled")
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    functions = [compile_apart(lambda x, n=n: x + n) for n in range(3)]
    with torch.compiler.set_stance("force_eager"):
        found = [float(function(torch.zeros(()))) for function in functions]
    assert found == [0, 1, 2]
    assert len(graphs) == 3
    torch.compiler.reset()
