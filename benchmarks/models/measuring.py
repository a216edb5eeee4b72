"""One row of the table: probe a model, and compare the numbers with those of its own dense float64 pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.models.cases import Case
from benchmarks.models.configurations import CannotBeBuiltError
from benchmarks.models.reference import (
    Reference,
    attention_statistics,
    first_tensor,
    make_eager,
    reference_of,
    state_statistics,
)

__all__ = ["Row", "measure", "regressions"]

OTHER = "the dense pass itself"
OTHER_OUTPUT = 1e-3
"""Relative to its largest element: from here on the dense pass computes something else than the model."""

ROUNDING = 1e-5
"""What float32 may make of a number of these sizes."""


@dataclass
class Row:
    """What came of one model.

    Attributes:
        state: "measured"; "not built": the model; "refused": by the probe; "raised": by the probe or in it.
        reason: why it was not measured.
        sites: those that were found, but for the inputs and weights of projections.
        absent: site → reason.
        layers: blocks; with attention, how many of them were compared.
        kurtosis_error: largest of kurtoses and maxima of states, relative where they exceed 1.
        attention_error: largest of first-token attention, key mass and sink rate, absolute.
        bit_identical: the outputs of a probed forward pass are those of an unprobed one.
        notes: what else is to be known.
    """

    name: str
    kind: str
    model: str
    state: str = "measured"
    reason: str = ""
    sites: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    layers: int = 0
    layers_compared: int = 0
    attention_layers: int = 0
    attention_layers_compared: int = 0
    kurtosis_error: float | None = None
    attention_error: float | None = None
    bit_identical: bool | None = None
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(case: Case) -> Row:
    """Build, probe and compare one model; whatever is raised is in the row."""
    row = Row(case.name, case.kind, case.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, batch, output = _built(case, row)
        except Exception as error:
            return _ended(row, "not built", error)
        _compared(case, row, model, batch, output)
        if any(note.startswith(OTHER) for note in row.notes) and make_eager(model):
            row = Row(case.name, case.kind, case.model)
            row.notes.append("probed under eager attention: by default the model computes something else")
            _compared(case, row, model, batch, _forward(model, batch))
        return row


def regressions(row: Row, earlier: Mapping[str, Any]) -> list[str]:
    """In what a row is worse than that of the table: sites lost, other bits, or an error ten times as large.

    An error may be as large as rounding makes it, whatever the table has: other processors round differently.
    """
    worse = []
    if row.state != earlier["state"]:
        return [f"{row.state} ({row.reason}), was {earlier['state']}"]
    if lost := [site for site in earlier["sites"] if site not in row.sites]:
        worse.append(f"without {', '.join(lost)}")
    if earlier["bit_identical"] and not row.bit_identical:
        worse.append("outputs are not bit-identical")
    for name in ("kurtosis_error", "attention_error"):
        before, now = earlier[name], getattr(row, name)
        if before is not None and (now is None or now > max(10 * before, ROUNDING)):
            worse.append(f"{name} {now}, was {before}")
    return worse


def _ended(row: Row, state: str, error: Exception) -> Row:
    message = " ".join(str(error).split())
    kind = "" if isinstance(error, CannotBeBuiltError) else f"{type(error).__name__}: "
    row.state, row.reason = state, kind + (message[:157] + "…" if len(message) > 158 else message)
    return row


def _built(case: Case, row: Row) -> tuple[nn.Module, dict[str, Tensor], Any]:
    if not case.is_buildable:
        raise CannotBeBuiltError(f"{case.package} is not installed (it is no dependency)")
    for sharp in (True, False):
        model = case.build(sharp)
        batch = case.inputs(model)
        output = _forward(model, batch)
        if all(bool(t.isfinite().all()) for t in _tensors(output)):
            if not sharp:
                row.notes.append("weights as initialised: larger ones overflow")
            return model, batch, output
    raise CannotBeBuiltError("random weights give NaN")


def _compared(case: Case, row: Row, model: nn.Module, batch: dict[str, Tensor], output: Any) -> Row:
    import osp_diag
    from osp_diag.errors import OspDiagError

    try:
        example = {"example": batch} if case.as_example else {}
        probe = osp_diag.Probe(model, deferred=False, **example)  # type: ignore[arg-type]
    except OspDiagError as error:
        return _ended(row, "refused", error)
    except Exception as error:
        return _ended(row, "raised", error)
    try:
        with probe.step(0):
            probed = _forward(model, batch)
        run = probe.run
    except Exception as error:
        return _ended(row, "raised", error)
    row.bit_identical = _same(output, probed) and _same(output, _forward(model, batch))
    site_map = probe.site_map
    of_projections = ("linear_input:", "projection_weight:")
    row.sites = [site for site in site_map.sites if not site.startswith(of_projections)]
    row.absent = dict(site_map.absent)
    row.notes += [n for n in site_map.notes if not n.startswith("attention seen through")]
    row.layers = site_map.number_of_layers
    first = site_map.block_paths[0]
    stack = ""
    if hasattr(getattr(model, "config", None), "is_encoder_decoder") and model.config.is_encoder_decoder:
        stack = "decoder" if "decoder" in first else "encoder"
    try:
        reference = reference_of(model, batch, tuple(site_map.block_paths), stack)
    except Exception as error:
        row.notes.append(f"no reference: the dense pass raises {type(error).__name__}: {str(error)[:90]}")
    else:
        _compare(row, run, reference, output, batch, stack)
    return row


def _compare(row: Row, run: Any, reference: Reference, output: Any, batch: Any, stack: str) -> None:
    row.notes += reference.notes
    ours = first_tensor(output)
    assert ours is not None
    if reference.output is not None and reference.output.shape == ours.shape:
        difference = float((reference.output - ours.double()).abs().max() / ours.abs().max().clamp_min(1e-9))
        if difference > OTHER_OUTPUT:
            row.notes.append(f"{OTHER} differs from the model by {difference:.1g} of its largest output")
    _compare_states(row, run, reference, batch, stack)
    _compare_attention(row, run, reference, batch, stack)


def _valid(batch: Mapping[str, Tensor], shape: tuple[int, ...], stack: str) -> np.ndarray:
    mask = None if stack == "decoder" else batch.get("attention_mask")
    return np.ones(shape) if mask is None or tuple(mask.shape) != shape else mask.numpy()


def _compare_states(row: Row, run: Any, reference: Reference, batch: Any, stack: str) -> None:
    states = list(reference.states)
    if not states:
        return
    ids = next(iter(batch.values()))
    errors: list[float] = []
    last = len(states) - 1
    for index, state in enumerate(states):
        if state.shape[0] != len(ids) and state.shape[1] == len(ids):
            state = state.transpose(1, 0, 2)  # (token, batch, channel)
        expected = state_statistics(state, _valid(batch, state.shape[:2], stack))
        places = [("embedding", 0)] if index == 0 else [("residual_post", index - 1)]
        if index == last and reference.last_is_normed:
            places.append(("final_norm", index - 1))
        candidates = [_state_error(run, site, layer, expected) for site, layer in places]
        present = [error for error in candidates if error is not None]
        if present:
            errors.append(min(present))
            row.layers_compared += index > 0
    row.kurtosis_error = max(errors, default=None)


def _state_error(run: Any, site: str, layer: int, expected: dict[str, float]) -> float | None:
    if site not in run.tree.children:
        return None
    data = run.tree[site]
    if layer not in data["layer"].values:
        return None
    errors = []
    for name, value in expected.items():
        ours = float(data[name].sel(step=0, layer=layer, stratum="all"))
        errors.append(abs(ours - value) / max(1.0, abs(value)))
    return _largest(errors)


def _compare_attention(row: Row, run: Any, reference: Reference, batch: Any, stack: str) -> None:
    if "attention" not in run.tree.children:
        return
    data = run.tree["attention"]
    layers = [int(i) for i in data["layer"].values]
    row.attention_layers = len(layers)
    weights = reference.weights
    if len(weights) == row.layers:
        weights = [weights[i] for i in layers]
    if len(weights) != len(layers):
        row.notes.append(
            f"attention not compared: the dense pass gives {len(weights)} sets of T×T weights for "
            f"{len(layers)} layers"
        )
        return
    errors = []
    for layer, dense in zip(layers, weights, strict=True):
        shape = dense.shape[0], dense.shape[-1]
        expected = attention_statistics(dense, _valid(batch, shape, stack))
        ours = data.sel(step=0, layer=layer)
        heads = dense.shape[1]
        beyond = ours["first_token_attention"].sel(stratum="all").values[heads:]
        if ours.sizes["head"] < heads or not np.isnan(beyond).all():
            row.notes.append(f"layer {layer}: {ours.sizes['head']} heads, where the model has {heads}")
            errors.append(float("inf"))
            continue
        ours = ours.isel(head=slice(heads))
        mass = ours["key_mass"].values[:, : shape[1]]
        rate = ours["sink_rate"].values[:, :, : expected["sink_rate"].shape[-1]]
        first = ours["first_token_attention"].sel(stratum="all").values
        errors.append(
            _largest(
                [
                    _difference(mass, expected["key_mass"]),
                    _difference(rate, np.clip(rate, expected["sink_rate_least"], expected["sink_rate_most"])),
                    _difference(first, expected["first_token_attention"]),
                ]
            )
        )
        row.attention_layers_compared += 1
    row.attention_error = _largest(errors)


def _difference(ours: np.ndarray, expected: np.ndarray) -> float:
    """The largest; a number that only one of the two has is infinitely wrong."""
    width = min(ours.shape[-1], expected.shape[-1])
    ours, expected = ours[..., :width], expected[..., :width]
    if (np.isnan(ours) != np.isnan(expected)).any():
        return float("inf")
    return float(np.nanmax(np.abs(ours - expected), initial=0.0))


def _largest(errors: list[float]) -> float:
    return float("inf") if any(np.isnan(e) for e in errors) else max(errors)


def _forward(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        return model(**batch)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    return [tensor for part in parts for tensor in _tensors(part)]


def _same(one: Any, other: Any) -> bool:
    pairs = _tensors(one), _tensors(other)
    return len(pairs[0]) == len(pairs[1]) and all(
        torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(*pairs, strict=True)
    )
