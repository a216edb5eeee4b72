"""The engine of nnsight: the only file that knows it.

nnsight lets code read and set what passes a module while its model runs. Its edits are written here from the
same taps, operations and strata as the hooks'; which tokens are meant it learns from the batch, not from what
enters the blocks. Importing nnsight gives every Python object a method ``save`` and changes
``Tensor.backward``, so it is imported when this engine is asked for and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxtyping import Bool
from torch import Tensor, nn

from osp_diag.capture.hooks import input_of, output_of, unobserved
from osp_diag.capture.strata import strata_of
from osp_diag.errors import CaptureError
from osp_diag.interventions.calls import edited_call
from osp_diag.interventions.intervention import KEYS, OF_WEIGHTS, Intervention
from osp_diag.interventions.operations import changed
from osp_diag.interventions.placement import rewritten, shares_its_input, with_input, with_output
from osp_diag.interventions.targets import check, is_at_call, layers_of, taps_of, tokens_of
from osp_diag.interventions.weights import edited_weights
from osp_diag.seams.call import AttentionCall
from osp_diag.seams.editing import EditingSwitch, refuse_own_masks
from osp_diag.sites.names import SiteMap, Tap

__all__ = ["NnsightEngine"]

_CALL = "attention_interface_"
"""How nnsight calls what transformers' attention modules do with their attention function, with a number; the
call itself comes last."""


class NnsightEngine:
    """Runs a model of transformers under interventions in nnsight's traces, in this process.

    Parameters
    ----------
    model : not wrapped; called with ``input_ids``
    sites, delimiter_ids : as of :func:`osp_diag.interventions.intervened`
    """

    def __init__(self, model: nn.Module, sites: SiteMap, delimiter_ids: Sequence[int]) -> None:
        self.model, self.sites, self.delimiter_ids = model, sites, tuple(delimiter_ids)
        self._before = {module: dict(vars(module)) for module in model.modules()}
        import nnsight

        self._envoy, self._save = nnsight.NNsight(model), nnsight.save
        self._batch: dict[str, Any] = {}

    @contextmanager
    def running(self, interventions: Sequence[Intervention]) -> Iterator[Callable[..., Any]]:
        """Within, what is yielded runs the model under the interventions.

        Raises
        ------
        as :func:`osp_diag.interventions.intervened`; CaptureError where attention does not go through
        transformers' attention interface
        """
        for intervention in interventions:
            check(self.model, self.sites, intervention)
        weights = [i for i in interventions if i.operation in OF_WEIGHTS]
        at_call = [i for i in interventions if is_at_call(self.sites, i)]
        at_taps = [i for i in interventions if i not in weights and i not in at_call]
        try:
            with edited_weights(self.model, self.sites, weights):
                for intervention in at_taps:
                    for tap in taps_of(self.sites, intervention):
                        self._edit_at(tap, intervention)
                for layer in range(self.sites.number_of_layers):
                    mine = [i for i in at_call if layer in layers_of(self.sites, i)]
                    if mine:
                        self._edit_call(layer, mine)
                yield self._run
        finally:
            self._envoy.clear_edits()

    def close(self) -> None:
        """Take off the modules what nnsight leaves on them, so that they run as they did before."""
        for module, before in self._before.items():
            now = vars(module)
            for name in [name for name in now if name not in before]:
                del now[name]
            now.update({name: value for name, value in before.items() if now[name] is not value})

    def _run(self, **batch: Any) -> Any:
        if "input_ids" not in batch:
            raise CaptureError(
                "the engine nnsight runs models that are called with input_ids, and this one takes "
                f'{", ".join(batch)}; use engine="hooks" (--engine hooks)'
            )
        self._batch = batch
        envoy, save = self._envoy, self._save
        with envoy.trace(**batch):
            output = save(envoy.output)
        return output

    def _edit_at(self, tap: Tap, intervention: Intervention) -> None:
        module = self._envoy.get(tap.module)
        edit_output, edit_inputs = self._edit_output, self._edit_inputs
        if tap.side == "output":
            with self._envoy.edit(inplace=True):
                module.output = edit_output(tap, intervention, module.output)
            return
        with self._envoy.edit(inplace=True):
            arguments, options = module.inputs
            module.inputs = edit_inputs(tap, intervention, arguments, options)

    def _edit_output(self, tap: Tap, intervention: Intervention, result: Any) -> Any:
        new = self._edited(tap, intervention, output_of(tap.argument, result))
        return with_output(tap.argument, result, new)

    def _edit_inputs(
        self, tap: Tap, intervention: Intervention, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        value = input_of(tap.argument, arguments, options)
        new = self._edited(tap, intervention, value)
        if shares_its_input(self.model.get_submodule(tap.module), tap):
            value.copy_(new)
            return arguments, options
        return with_input(tap.argument, arguments, options, new)

    def _edited(self, tap: Tap, intervention: Intervention, value: Tensor) -> Tensor:
        batch, tokens = self._batch["input_ids"].shape
        chosen = self._chosen(intervention).to(value.device)
        with unobserved(value.device):
            return rewritten(
                self.sites, tap, value, batch, tokens, lambda x: changed(intervention, tap.layer, x, chosen)
            )

    def _edit_call(self, layer: int, interventions: Sequence[Intervention]) -> None:
        tap = next((t for t in self.sites.taps if t.site == "attention_output" and t.layer == layer), None)
        module = None if tap is None else self._envoy.get(tap.module.rpartition(".")[0])
        names = [] if module is None else [name for name in module.source.names if name.startswith(_CALL)]
        if module is None or not names:
            raise CaptureError(
                f"{interventions[0]}: the attention of layer {layer} does not call transformers' attention "
                'interface in a module of its own, where nnsight would change it; use engine="hooks" '
                "(--engine hooks)"
            )
        call = getattr(module.source, max(names, key=lambda name: int(name.removeprefix(_CALL))))
        edits = _Calls(self, layer, interventions)
        switch = EditingSwitch(self.model, edits)
        if any(i.operation == KEYS for i in interventions):
            refuse_own_masks(switch)
        config = module._module.config
        with self._envoy.edit(inplace=True):
            arguments, options = call.inputs
            call.inputs = switch.arguments(config._attn_implementation, *arguments, **options)

    def _chosen(self, intervention: Intervention) -> Bool[Tensor, "batch token"]:
        ids = self._batch["input_ids"]
        strata = strata_of(ids, self._batch.get("attention_mask"), self.delimiter_ids).bool()
        return tokens_of(intervention, strata)


class _Calls:
    """What the interventions on attention in one layer make of its call."""

    def __init__(self, engine: NnsightEngine, layer: int, interventions: Sequence[Intervention]) -> None:
        self.engine, self.layer, self.interventions = engine, layer, interventions

    def __call__(self, call: AttentionCall) -> AttentionCall:
        with unobserved(call.tensor.device):
            for intervention in self.interventions:
                chosen = self.engine._chosen(intervention).to(call.tensor.device)
                call = edited_call(self.engine.sites, intervention, self.layer, call, chosen)
        return call
