"""Projections that are adapted, quantised or begin at zero: sites are those of the plain model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from osp_diag import Probe
from osp_diag.capture.down_projection import down_projection
from osp_diag.sites import SiteMap, find_sites
from tests.attention_reference import no_trace
from tests.site_reference import OddModel, odd_model

TOKENS = torch.arange(20).reshape(2, 10)


class LowRank(nn.Module):
    """A frozen projection with two small ones beside it, the second zero, as LoRA begins."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        self.frozen, self.narrow, self.wide = base, nn.Linear(columns, 2, False), nn.Linear(2, rows, False)
        nn.init.zeros_(self.wide.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.wide(self.narrow(x))


class BareLowRank(nn.Module):
    """The same with parameters of its own, and a magnitude for each output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        self.inside = base
        self.left, self.right = nn.Parameter(torch.zeros(rows, 2)), nn.Parameter(torch.randn(2, columns))
        self.magnitude = nn.Parameter(torch.ones(rows))

    def forward(self, x: Tensor) -> Tensor:
        return self.magnitude * (self.inside(x) + x @ self.right.T @ self.left.T)


class Packed(nn.Module):
    """Eight bits in buffers, nothing in parameters, and a name that does not tell."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        step = base.weight.detach().abs().max() / 127
        self.register_buffer("codes", (base.weight.detach() / step).round().to(torch.int8))
        self.register_buffer("step", step)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(x.dtype) * self.step).T


class AdaptedPacked(LowRank):
    """QLoRA: low rank beside packed weights."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.frozen = Packed(base)


def changed(kind: Callable[[nn.Module], nn.Module]) -> OddModel:
    model = odd_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for module in list(model.orchard.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, kind(child))
    return model.eval()


def places(sites: SiteMap) -> set[tuple[str, int, str, str]]:
    return {(tap.site, tap.layer, tap.module, tap.side) for tap in sites.taps}


@pytest.mark.parametrize("kind", [LowRank, BareLowRank, Packed, AdaptedPacked])
def test_sites_do_not_depend_on_what_a_projection_is_made_of(kind: type[nn.Module]) -> None:
    model = changed(kind)
    with no_trace(model):
        sites = find_sites(model)
    plain = find_sites(odd_model())
    assert places(sites) == places(plain)
    assert sites.absent == plain.absent
    assert sites.causal_layers == {0, 1, 2}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, of torch.ao
def test_packed_objects_of_torch_count_as_weights() -> None:
    model = torch.ao.quantization.quantize_dynamic(odd_model(), {nn.Linear}, dtype=torch.qint8)
    assert places(find_sites(model)) == places(find_sites(odd_model()))


def test_an_adapter_that_learns_moves_no_site() -> None:
    model = changed(LowRank)
    probe = Probe(model)
    for module in model.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.wide.weight)
    with probe.step(0), torch.no_grad():
        model(TOKENS)
    # Rotary embedding keeps norms.
    for side in ("query", "key"):
        before, after = (
            probe.run.at(f"{side}_{place}_rope")["token_norm"].sel(stratum="all").values
            for place in ("pre", "post")
        )
        assert before == pytest.approx(after)
    assert probe.run.at("mlp_hidden").sizes["channel"] == 48
    reason = "its projection (LowRank) has no weight of its own"
    assert probe.run.absent_sites["mlp_down_weight"] == reason


def test_the_matrix_of_an_adapted_projection_is_the_sum() -> None:
    class Peft(LowRank):
        """What peft's layers offer."""

        merged = disable_adapters = False
        active_adapters = ("mine",)

        def __init__(self, base: nn.Module) -> None:
            super().__init__(base)
            self.lora_A = {"mine": None}
            nn.init.normal_(self.wide.weight)

        @property
        def weight(self) -> Tensor:
            return self.frozen.weight

        def get_delta_weight(self, adapter: str) -> Tensor:
            return self.wide.weight @ self.narrow.weight

    module = Peft(nn.Linear(6, 4, bias=False))
    matrix = down_projection(module, torch.zeros(1, 6))
    assert isinstance(matrix, Tensor)
    torch.testing.assert_close(matrix[0], module(torch.eye(6)).T.detach())
    module.merged = True
    torch.testing.assert_close(down_projection(module, torch.zeros(1, 6))[0], module.frozen.weight.detach())


# -- weights that begin at zero ----------------------------------------------------------------------------


def zero_outputs(model: OddModel) -> None:
    """Output projections, as muP and modded-nanogpt begin."""
    for block in model.orchard:
        nn.init.zeros_(block.lemon.four.weight)
        nn.init.zeros_(block.plum[2].weight)
        nn.init.zeros_(block.plum[2].bias)


def zero_queries(model: OddModel) -> None:
    for block in model.orchard:
        nn.init.zeros_(block.lemon.one.weight)


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """The same memory, of the same version, with the same numbers."""
    before = [(p, p.data_ptr(), p._version, p.detach().clone()) for p in model.parameters()]
    yield
    for parameter, pointer, version, values in before:
        assert (parameter.data_ptr(), parameter._version) == (pointer, version)
        assert torch.equal(parameter, values)


@pytest.mark.parametrize("initialise", [zero_outputs, zero_queries])
def test_sites_at_initialisation_are_those_after_training(initialise: Callable[[OddModel], None]) -> None:
    model = odd_model()
    initialise(model)
    with no_trace(model), unwritten(model):
        sites = find_sites(model)
    assert places(sites) == places(find_sites(odd_model()))
    assert not sites.absent


def test_a_model_that_cannot_be_run_keeps_its_zeros() -> None:
    model = odd_model()
    zero_outputs(model)
    with unwritten(model), pytest.raises(Exception, match="could not be run"):
        find_sites(model, example={"nothing": 0})
