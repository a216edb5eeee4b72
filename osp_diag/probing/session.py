"""The user's object: a probe binds a model, its sites, estimators and a schedule, and keeps the numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
import xarray as xr
from torch import nn

from osp_diag.capture.collector import Collector
from osp_diag.capture.expert_modules import ExpertModuleCapture
from osp_diag.capture.experts import ExpertCapture
from osp_diag.capture.gradients import has_gradient
from osp_diag.capture.hooks import SiteCapture
from osp_diag.capture.snapshots import SNAPSHOT_SITES, Snapshots
from osp_diag.capture.states import suites_of
from osp_diag.capture.super_weights import with_super_weights
from osp_diag.capture.token_groups import TokenGroups
from osp_diag.capture.token_kinds import TokenKinds
from osp_diag.checkpoints.checkpoint import evaluation_mode, vocabulary_size_of
from osp_diag.errors import CaptureError, SiteError, UsageError
from osp_diag.estimators.base import Estimator, Field, Layout
from osp_diag.probing.control import RunControl
from osp_diag.probing.host import snapshot_datasets, to_host
from osp_diag.probing.identity import (
    circumstances,
    delimiter_fingerprint,
    estimator_parameters,
    library_versions,
)
from osp_diag.probing.labelling import StepLabels, labelled_groups, token_group_states
from osp_diag.probing.padding_note import padding_note
from osp_diag.probing.ranks import is_distributed, is_first_rank, merge_over_ranks, rank_of_all
from osp_diag.probing.records import Records
from osp_diag.probing.schedule import Schedule, schedule_of
from osp_diag.probing.settings import MeasurementOptions, MeasurementSettings, keyword_form
from osp_diag.probing.vocabulary import VOCABULARY, name_tokens, vocabulary_dataset
from osp_diag.probing.window_note import BEGINNING, window_note
from osp_diag.runs.declared import ProbedStep
from osp_diag.runs.run import Run
from osp_diag.schema import (
    ATTENTION,
    CROSS_ATTENTION,
    DOWN_WEIGHT,
    GRADIENT,
    HEAD_SITES,
    HIDDEN_STATES,
    LINEAR_INPUT,
    PROJECTION_WEIGHT,
    ROUTER,
    SITES,
)
from osp_diag.seams.attention import AttentionCapture
from osp_diag.sites import find_sites, matches
from osp_diag.sites.token_kinds import recognised_token_kinds
from osp_diag.sites.trace import is_compiled, unfused, unwrap
from osp_diag.tokens import delimiter_ids_of
from osp_diag.wording import did_you_mean, listed

__all__ = ["Probe"]

GRADIENT_OF = (
    "the sum of what the loop called backward on within the step (loss scaling of its own included), on each "
    "rank that of its own tokens"
)
"""Of which loss gradients are, where the loop says nothing."""


class Probe:
    """Measures a model's activations and attention while someone else's loop runs it.

    Parameters
    ----------
    model : the module that the loop calls; may be wrapped by ``torch.compile`` or DDP
    every : a period in steps, the steps themselves, or a function of it (:mod:`osp_diag.probing.schedule`)
    out : path of the run to write; None keeps the numbers in memory (:attr:`run`)
    measurement_settings : what to measure; see :class:`osp_diag.MeasurementSettings`
    tokenizer : tells which tokens are delimiters, and what tokens read as; without it that stratum is empty
    attributes : what else determines the numbers (token source, protocol …), recorded in the run
    deferred : finish a step's statistics and write them in a thread while the caller's loop goes on; "auto"
        does so on CUDA. What fails in the thread is raised by the next call, :meth:`close` at the latest
    beside : gives further datasets to record with every probed step (group name → dataset), such as what the
        optimizer holds; called on every rank
    loss_scale : with ``gradients``: what the loop multiplies its loss by before ``backward`` (the number of
        ranks, a ``GradScaler``'s factor), by which gradients are divided
    resume, overwrite : what to do with a run that is already at ``out``
    segment_after : with ``resume``: the step after which the run goes on under other attributes
    control : whether ``osp-diag control`` may change schedule and sites while the loop runs. Under several
        ranks :meth:`step` is then a collective that all of them have to call at every step; "auto" allows it
        in one process alone
    options : fields of the settings, which change them (``sites=["residual_*"]``)

    Raises
    ------
    SiteError : the sites were not found, or a pattern matches none
    StoreError : ``out`` holds another run
    UsageError : ``loss_scale`` is not positive
    TypeError : there is no such option; the message names the nearest

    Examples
    --------
    >>> with osp_diag.Probe(model, every=50, out="run.zarr") as probe:  # doctest: +SKIP
    ...     for step, batch in enumerate(loader):
    ...         with probe.step(step):
    ...             loss = model(**batch).loss
    """

    @keyword_form(MeasurementSettings())
    def __init__(
        self,
        model: nn.Module,
        *,
        every: int | Collection[int] | Schedule = 1,
        out: str | Path | None = None,
        measurement_settings: MeasurementSettings | None = None,
        tokenizer: Any = None,
        attributes: Mapping[str, Any] | None = None,
        deferred: bool | Literal["auto"] = "auto",
        beside: Callable[[], Mapping[str, xr.Dataset]] | None = None,
        loss_scale: float = 1.0,
        resume: bool = False,
        segment_after: int | None = None,
        overwrite: bool = False,
        control: bool | Literal["auto"] = "auto",
        **options: Unpack[MeasurementOptions],
    ) -> None:
        settings = (measurement_settings or MeasurementSettings()).changed(dict(options))
        self.model, self.settings, self.tokenizer = model, settings, tokenizer
        self.beside = beside
        if not loss_scale > 0:
            raise UsageError(f"loss_scale={loss_scale}: gradients are divided by it; give a positive number")
        self.loss_scale = loss_scale
        self.schedule = schedule_of(every)
        self.patterns = None if settings.sites is None else tuple(settings.sites)
        self.estimators = settings.estimator_instances()
        delimiters = settings.delimiter_ids
        if delimiters is None:
            delimiters = () if tokenizer is None else delimiter_ids_of(tokenizer)
        self.delimiter_ids = tuple(delimiters)
        self.site_map = find_sites(
            model,
            blocks=settings.blocks,
            stack=settings.stack,
            named=settings.named_sites,
            example=settings.example,
        )
        self._check_patterns(self.patterns)
        self.token_kinds = self._token_kinds()
        self.vocabulary = vocabulary_size_of(unwrap(model))
        on_accelerator = any(p.device.type == "cuda" for p in model.parameters())
        self.compiled = on_accelerator if settings.compile == "auto" else bool(settings.compile)
        self.deferred = on_accelerator if deferred == "auto" else bool(deferred)
        # Which hidden states a model lacks is always recorded: the headline number depends on it.
        self.absent = {
            site: reason
            for site, reason in self.site_map.absent.items()
            if self.measures_site(site) or site in HIDDEN_STATES
        }
        self.attributes = {**self._identity(), **(attributes or {})}
        self._records = Records(
            Path(out) if out is not None else None,
            self.attributes,
            resume=resume,
            segment_after=segment_after,
            overwrite=overwrite,
            deferred=self.deferred,
        )
        self._labels = StepLabels(self._records.layers)
        controlled = not is_distributed() if control == "auto" else control
        self._control = RunControl(self, Path(out)) if out is not None and controlled else None
        self._vocabulary_settled = tokenizer is None or not self.vocabulary or not is_first_rank()

    # What is measured

    def measures_site(self, site: str) -> bool:
        return self._is_among(site, self.patterns)

    def _measures_gradient_at(self, site: str) -> bool:
        return self._has_gradient_at(site) and self.measures_site(site)

    def _has_gradient_at(self, site: str) -> bool:
        taps = self.site_map.taps if self.settings.gradients else ()
        return any(has_gradient(tap) for tap in taps if tap.site == site)

    def _sites_with_gradients(self) -> list[str]:
        measured = [site for site in self.site_map.sites if self.measures_site(site)]
        return measured + [f"{GRADIENT}{site}" for site in measured if self._measures_gradient_at(site)]

    def _is_among(self, site: str, patterns: tuple[str, ...] | None) -> bool:
        named_sites = self.settings.named_sites or ()
        return matches(site, patterns) or (patterns is None and site in named_sites)

    def _check_patterns(self, patterns: tuple[str, ...] | None) -> None:
        sites = (*self.site_map.sites, *(self.settings.named_sites or ()))
        for pattern in patterns or ():
            if not any(matches(site, (pattern,)) for site in sites):
                reason = self.site_map.absent.get(pattern)
                raise SiteError(
                    f"site {pattern!r} is not in this model"
                    + (f": {reason}" if reason else f"; {did_you_mean(pattern, sites)}")
                )

    def _token_kinds(self) -> TokenKinds | None:
        """Those that were named, or else those that the model tells apart; None for text alone."""
        kinds = self.settings.token_kinds
        if kinds == "auto":
            kinds = recognised_token_kinds(self.model, self.site_map, self.settings.example)
        return TokenKinds(kinds) if isinstance(kinds, Mapping) and kinds else None

    def _identity(self) -> dict[str, Any]:
        """Everything about the model and the probe that determines a number."""
        model = unwrap(self.model)
        estimators = self._estimators_at(self.patterns)
        parameter = next(model.parameters())
        return {
            "model_name": getattr(getattr(model, "config", None), "_name_or_path", "")
            or type(model).__name__,
            # FSDP2 makes a subclass on the way; the model is the same on any number of ranks.
            "architecture": type(model).__name__.removeprefix("FSDP"),
            "number_of_layers": self.site_map.number_of_layers,
            "hidden_size": self.site_map.hidden_size,
            "blocks": self.site_map.blocks,
            **({"stack": self.site_map.stack} if self.site_map.stack else {}),
            "sites": {site: _meaning(site) for site in self._sites_with_gradients()},
            "absent_sites": self.absent,
            "notes": list(self.site_map.notes),
            "estimators": list(estimators),
            "estimator_parameters": estimator_parameters(estimators.values()),
            "delimiter_ids": delimiter_fingerprint(self.delimiter_ids),
            **({"gradient_of": GRADIENT_OF} if self.settings.gradients else {}),
            **({} if self.token_kinds is None else {"token_kinds": self.token_kinds.described()}),
            "compiled": self.compiled,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": str(parameter.device),
            "versions": library_versions(),
            **circumstances(),
        }

    def _estimators_at(self, patterns: tuple[str, ...] | None) -> dict[str, Estimator]:
        """The estimators that run somewhere, by identifier."""
        sites = [site for site in self.site_map.sites if self._is_among(site, patterns)]
        sites += [f"{GRADIENT}{site}" for site in sites if self._has_gradient_at(site)]
        return {
            estimator.identifier: estimator
            for site in sites
            for suite in suites_of(site, self.estimators).values()
            for estimator in suite.estimators
        }

    # While it runs

    def due(self, step: int) -> bool:
        """Whether ``step`` is probed; in one process, a request that waits is done first."""
        if self._control is not None and not is_distributed():
            self._control.between_steps(step)
        return self.schedule(step)

    def check_sites(self, patterns: tuple[str, ...] | None) -> None:
        """Refuse sites to which this probe cannot be switched.

        Raises
        ------
        SiteError : the model has no such site, the run did not begin with one of a user's naming, or no
            estimator of this probe applies at any
        """
        self._check_patterns(patterns)
        for site in self.settings.named_sites or ():
            if site not in self.attributes["sites"] and self._is_among(site, patterns):
                raise SiteError(f"site {site!r} is of your own naming, and the run did not begin with it")
        if not self._estimators_at(patterns):
            raise SiteError(f"no estimator of this probe applies at {listed(patterns or ())}")

    def switch_sites(self, patterns: tuple[str, ...] | None) -> None:
        """Measure other sites from the next step on: what is missing in a step reads NaN there."""
        self.patterns = patterns
        estimators = self._estimators_at(patterns)
        parameters = estimator_parameters(estimators.values())
        later = [identifier for identifier in estimators if identifier not in self.attributes["estimators"]]
        self._records.note_estimators({name: parameters.get(name, {}) for name in later})

    def note(self, notes: Iterable[str]) -> None:
        """Keep what the reader of the numbers should know."""
        self._records.note(notes)

    @property
    def notes(self) -> list[str]:
        """What is noted in the run, by this process or by those that it resumed."""
        return self._records.notes

    # Measuring

    @contextmanager
    def step(self, step: int) -> Iterator[bool]:
        """Measure the forward passes inside the block, if ``step`` is due; yields whether it is.

        Outside of due steps nothing is attached. If the block raises, nothing is recorded for the step.
        A compiled model runs eagerly inside a due step. Where only its blocks are compiled and they are under
        non-reentrant activation checkpointing, call ``backward`` inside the block too: after it, compiled
        code recomputes what eager code saved, and torch raises ``CheckpointError``.

        With ``gradients`` the block has to hold the backward passes too.

        Passes of other threads are neither seen nor changed, but that a compiled model runs eagerly in them
        too.

        Raises
        ------
        CaptureError : another thread probes the model, no forward pass ran, or none reached a site; gradients
            are asked for and none came
        """
        if self._control is not None and is_distributed():
            self._control.between_steps(step)
        if not self.due(step):
            yield False
            return
        started = time.perf_counter()
        with self.collect() as collector:
            yield True
        self._record(step, collector, started)

    def measure(
        self, step: int, batches: Iterable[Mapping[str, Any]], *, whole_sequences: bool = False
    ) -> None:
        """Run the model on held-out batches of keyword arguments, in evaluation mode without gradients.

        The same tokens at every step make curves that show the model and not the data. The training flags
        are put back afterwards. Ctrl-C records what was measured so far and is raised again.

        ``whole_sequences`` says that no batch goes on with the cache of one before it.

        Raises
        ------
        UsageError : gradients are asked for, and here there are none
        """
        self.settings.check_held_out()
        started = time.perf_counter()
        collector = self._collector(whole_sequences=whole_sequences)
        interruption: KeyboardInterrupt | None = None
        try:
            with evaluation_mode(self.model), self._attached(collector), torch.no_grad():
                for batch in batches:
                    self.model(**batch)
        except KeyboardInterrupt as raised:
            interruption = raised
            collector.forget_unfinished()
        # Ranks that Ctrl-C reached at different moments would wait for one another for ever.
        # In somebody's training it may be LayerDrop; of batches of our own nothing would ever come.
        is_first = not self._records.steps and not is_distributed()
        if interruption is None and is_first and collector.forward_passes > 0 and not collector.states:
            raise CaptureError(
                f"step {step}: the model ran but no site was reached; if it is compiled or scripted in a way "
                "that bypasses hooks, probe the original module"
            )
        if interruption is None or (collector.forward_passes > 0 and not is_distributed()):
            self._record(step, collector, started)
        if interruption is not None:
            raise interruption

    @contextmanager
    def collect(self) -> Iterator[Collector]:
        """Fold the forward passes inside the block into states, recording nothing: the device's share."""
        collector = self._collector()
        with self._attached(collector):
            yield collector
        collector.finish()
        if collector.gradients is not None:
            collector.gradients.close()

    def _collector(self, *, whole_sequences: bool = False) -> Collector:
        settings = self.settings
        takes_snapshots = settings.snapshot_tokens > 0 and not any(
            group.startswith("snapshot/") for group in self._records.static
        )
        linear_inputs = [site for site in self.site_map.sites if site.startswith(LINEAR_INPUT)]
        pictured = tuple(filter(self.measures_site, (*SNAPSHOT_SITES, *linear_inputs)))
        snapshots = Snapshots(settings.snapshot_tokens, sites=pictured) if takes_snapshots else None
        rank, ranks = rank_of_all()
        return Collector(
            self.measures_site,
            estimators=self.estimators,
            delimiter_ids=self.delimiter_ids,
            token_kinds=self.token_kinds,
            tokens_first=self.site_map.tokens_first,
            vocabulary=self.vocabulary,
            compiled=self.compiled,
            whole_sequences=whole_sequences,
            asks_for_cuts=not self._records.steps,
            snapshots=snapshots,
            groups=TokenGroups(settings.token_groups, rank=rank, ranks=ranks)
            if settings.token_groups
            else None,
            output_projections={
                tap.layer: unwrap(self.model).get_submodule(tap.module)
                for tap in self.site_map.taps
                if tap.site == "attention_output" and tap.side == "input"
            },
            expert_projections={
                layer: [unwrap(self.model).get_submodule(down) for _, down in experts]
                for layer, experts in self.site_map.expert_modules.items()
            },
            up_projections={
                tap.layer: (unwrap(self.model).get_submodule(tap.module), tap.fused)
                for tap in self.site_map.taps
                if tap.site == f"{PROJECTION_WEIGHT}up"
            },
            loss_scale=self.loss_scale if settings.gradients else None,
        )

    @contextmanager
    def _attached(self, collector: Collector) -> Iterator[None]:
        taps = tuple(tap for tap in self.site_map.taps if collector.needs(tap))
        capture = SiteCapture(
            self.model,
            taps,
            self.site_map.block_paths,
            collector.on_activation,
            on_start=collector.start,
            on_stop=collector.stop,
            on_weight=collector.on_weight,
            on_stream=collector.on_stream,
            on_product=collector.on_product,
            on_state=collector.on_state,
            on_gradient=collector.on_gradient if self.settings.gradients else None,
            prefix=self.site_map.prefix,
            entries=self.site_map.entries,
            channels_first=self.site_map.channels_first,
            streams_in_a_row=self.site_map.streams_in_a_row,
        )
        heads = (ATTENTION, CROSS_ATTENTION, *HEAD_SITES)
        sites = self.site_map
        names = dict(unwrap(self.model).named_modules())
        crossing = {layer: names[path] for layer, path in sites.cross_attention.items()}
        with ExitStack() as stack:
            if is_compiled(self.model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(unfused(unwrap(self.model)))
            stack.enter_context(capture)
            if self.site_map.expert_layers and any(map(self.measures_site, ("mlp_hidden", ROUTER))):
                stack.enter_context(self._experts(collector, capture))
            if (sites.attention_layers or crossing) and any(self.measures_site(site) for site in heads):

                def on_call(call: Any) -> None:
                    layer = capture.current.layer if capture.current else None
                    if layer is not None and call.module is not None and call.module is crossing.get(layer):
                        copies = sites.cross_key_copies.get(layer, 1)
                        call = call.of_first_stream(sites.streams_in_a_row)
                        collector.on_cross_attention(call.with_distinct_keys(copies), layer)
                    # A router's softmax over as many experts as tokens looks like attention.
                    elif layer in sites.attention_layers and not call.crosses:
                        copies = self.site_map.key_copies.get(layer, 1)
                        collector.on_attention(call.with_distinct_keys(copies), layer)

                stack.enter_context(
                    AttentionCapture(
                        unwrap(self.model),
                        on_call,
                        capture.active,
                        cached=True,
                        crossing=bool(crossing),
                        streams=self.site_map.streams_in_a_row,
                    )
                )
            yield

    @contextmanager
    def _experts(self, collector: Collector, capture: SiteCapture) -> Iterator[None]:
        def failed(layer: int) -> None:
            reason = "the experts' products were not recognised in their implementation"
            if self.measures_site("mlp_hidden"):
                collector.skipped["mlp_hidden"] = reason
            if self.measures_site(ROUTER):
                choice_unknown(reason)

        def choice_unknown(reason: str) -> None:
            collector.notes.setdefault(
                "what each expert gives is not measured, nor its load where the router does not hand over "
                f"its choice: {reason}"
            )

        def on_rows(layer: int, rows: torch.Tensor, slots: int) -> None:
            if self.measures_site("mlp_hidden"):
                collector.on_routed(layer, rows, slots)

        def on_choice(layer: int, experts: torch.Tensor | None, peaks: torch.Tensor | None) -> None:
            if experts is None or peaks is None:
                choice_unknown("the experts' products do not tell whose weights they multiply by")
            else:
                collector.on_choice(layer, experts, peaks, self.site_map.expert_counts[layer])

        model = unwrap(self.model)
        hooks = (capture.active, on_rows, failed, on_choice if self.measures_site(ROUTER) else None)
        layers, modules = self.site_map.expert_layers, self.site_map.expert_modules
        stacked = {layer: path for layer, path in layers.items() if layer not in modules}
        with (
            ExpertCapture(model, stacked, *hooks),
            ExpertModuleCapture(model, layers, modules, *hooks),
        ):
            yield

    # Keeping

    def _record(self, step: int, collector: Collector, started: float) -> None:
        collector.finish()
        if collector.forward_passes == 0 and not is_distributed():
            raise CaptureError(
                f"step {step}: no forward pass of the probed model ran inside the block, so there is nothing "
                "to record; call the very model that was given to Probe (or a wrapper of it)"
            )
        if collector.gradients is not None:
            collector.skipped |= collector.gradients.absent
        absent = collector.skipped.copy()
        labelled = self._labelled(step, collector, absent)
        datasets = self.beside() if self.beside is not None else {}
        # What is deferred must not change with what it was made from.
        beside = {group: dataset.copy(deep=self.deferred) for group, dataset in datasets.items()}
        self.absent |= collector.skipped
        self._records.note(collector.notes)
        self._records.step(step, lambda: labelled() | beside, absent)
        self._keep_snapshots(collector)
        self._keep_vocabulary()
        self.append_series(step, {"probe_seconds": time.perf_counter() - started})

    def _check_gradients(
        self, step: int, states: Collection[tuple[Any, ...]], reasons: Mapping[str, str]
    ) -> None:
        """Refuse a step of which gradients are asked for and none came, on every rank alike."""
        if states and not any(key[0].startswith(GRADIENT) for key in states):
            nothing = "no backward pass reached a site within the step; call backward inside the block"
            why = next(iter(reasons.values()), nothing)
            raise CaptureError(f"step {step}: gradients are asked for and none came: {why}")

    def _labelled(self, step: int, collector: Collector, absent: dict[str, str]) -> Callable[[], ProbedStep]:
        """Bring what all ranks measured to the host; what is returned makes a step of it, on every rank.

        ``absent`` is then told what was measured and has no room in the run.
        """
        apart = {} if collector.groups is None else collector.groups.states
        states, layouts = {**collector.states, **apart}, dict(collector.layouts)
        if is_distributed():

            def fields(key: tuple[Any, ...], layout: Layout) -> Mapping[str, Field]:
                return collector.suites_at(key[0])[key[2]].fields(layout)

            layouts |= {key: layouts[key[:3]] for key in apart}
            states, layouts = merge_over_ranks(states, layouts, fields)
        if collector.gradients is not None:
            self._check_gradients(step, states, collector.gradients.absent)
        states = with_super_weights(states, self._down_projections())
        on_host = to_host(states)
        self._records.note(padding_note(on_host))
        # Not the collector itself, which holds the device's memory.
        suites = {key[0]: collector.suites_at(key[0]) for key in on_host}
        idle = self.site_map.idle_layers(collector.block_runs)
        idle |= {f"{GRADIENT}{site}": layers for site, layers in idle.items()}
        keep_raw, token_groups, labels = self.settings.keep_raw, self.settings.token_groups, self._labels

        def labelled() -> ProbedStep:
            of_sites = {key: state for key, state in on_host.items() if len(key) == 3}
            groups = labelled_groups(
                suites.__getitem__,
                of_sites,
                layouts,
                keep_raw=keep_raw,
                labels=labels,
                idle=idle,
                left_out=absent,
            )
            self.absent |= absent
            note = window_note(of_sites)
            if note is not None and not any(n.startswith(BEGINNING) for n in self.attributes["notes"]):
                self.attributes["notes"].append(note)
            if token_groups:
                apart = {key: state for key, state in on_host.items() if len(key) == 4}
                groups |= token_group_states(suites.__getitem__, apart, layouts, token_groups, labels)
            return groups

        return labelled

    def _down_projections(self) -> dict[int, nn.Module]:
        model = unwrap(self.model)
        return {
            tap.layer: model.get_submodule(tap.module)
            for tap in self.site_map.taps
            if tap.site == DOWN_WEIGHT and tap.side == "product"
        }

    def _keep_snapshots(self, collector: Collector) -> None:
        if collector.snapshots is None or not is_first_rank():
            return
        for group, dataset in snapshot_datasets(collector.snapshots).items():
            self.write_static(group, dataset)
        if dropped := sorted(collector.snapshots.dropped):
            places = ", ".join(f"{site} of layer {layer}" for site, layer in dropped)
            self._records.note([f"raw activations too large to keep for pictures: {places}"])

    def _keep_vocabulary(self) -> None:
        """The texts of all token ids, where some statistic of the first step names tokens."""
        if self._vocabulary_settled:
            return
        # Here and not behind the caller: the loop may be using the same tokenizer.
        if VOCABULARY not in self._records and name_tokens(self.latest.values()):
            self.write_static(VOCABULARY, vocabulary_dataset(self.tokenizer, self.vocabulary or 0))
        self._vocabulary_settled = True

    # What was recorded: all but append_… and note wait for a deferred step, and all raise what failed in it

    @property
    def latest(self) -> ProbedStep:
        """The datasets recorded last, by group and without the step; on every rank."""
        return self._records.latest

    @property
    def static(self) -> Mapping[str, xr.Dataset]:
        """The datasets that do not depend on the step, by group."""
        return self._records.static

    def write_static(self, group: str, dataset: xr.Dataset) -> None:
        """Keep a dataset that does not depend on the step, as a snapshot; a resumed run keeps its own."""
        self._records.write_static(group, dataset)

    def append_series(
        self,
        step: int,
        values: Mapping[str, float],
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Keep scalars of a step (loss, learning rate …) beside the probes.

        ``attributes`` (name → units, long_name, definition) are kept when a name is first seen.
        """
        self._records.append_series(step, values, attributes)

    def append_logged(self, step: int, groups: Mapping[str, xr.Dataset]) -> None:
        """Keep labelled arrays of a step beside its scalars (group name → Dataset of floats, no step)."""
        self._records.append_logged(step, groups)

    def flush(self) -> None:
        """Commit what was recorded: a training loop does so before it saves a checkpoint."""
        self._records.flush()

    def truncate_after(self, step: int) -> None:
        """Drop what was recorded after ``step``: a training loop that resumes from a checkpoint does so."""
        self._records.truncate_after(step)

    @property
    def run(self) -> Run:
        """What was measured so far."""
        return self._records.run()

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write what was measured in memory as a run."""
        self._records.save(Path(path), overwrite=overwrite)

    def close(self) -> None:
        """Write what is buffered and release the run."""
        if self._control is not None:
            self._control.close()
        self._records.close()

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _meaning(site: str) -> str:
    if site.startswith(PROJECTION_WEIGHT):
        return "weights of this projection: statistics of a matrix, not of tokens"
    if site.startswith(GRADIENT):
        return f"gradient of the loss with respect to {site.removeprefix(GRADIENT)}"
    return SITES.get(site, "input of this projection")
