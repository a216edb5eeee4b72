"""The states of a run's sites while it is measured: which estimators apply where, and merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from osp_diag.capture.token_groups import GROUPED_FIELDS, TokenGroups
from osp_diag.estimators import applies_to, default_estimators
from osp_diag.estimators.base import Estimator, Layout, Observes, State, Suite, merge_states
from osp_diag.schema import (
    ATTENTION,
    CROSS_ATTENTION,
    DOWN_WEIGHT,
    GATE_WEIGHT,
    GRADIENT,
    HEAD_SITES,
    MIXER_STATE,
    PROJECTION_WEIGHT,
    ROUTER,
)
from osp_diag.sites.names import matches

__all__ = ["EstimatorChoice", "Key", "SiteStates", "is_weight", "suites_of"]

Key = tuple[str, int, str]
"""(site, layer, what is observed there, as an estimator's ``observes`` says it)"""

GROWING = ("key_position", "token_position")
"""Dimensions whose length is the sequence's: shorter sequences are padded when states are merged."""

EstimatorChoice = Sequence[Estimator] | Mapping[str, Sequence[Estimator]] | None
"""Estimators for every site, for the sites that match a pattern, or (None) the default ones of each site."""


def is_weight(site: str) -> bool:
    """Whether a site is the weights of projections."""
    return site in (DOWN_WEIGHT, GATE_WEIGHT) or site.startswith(PROJECTION_WEIGHT)


def suites_of(site: str, estimators: EstimatorChoice) -> dict[str, Suite]:
    """The estimators that apply at a site, by what they observe.

    Of gradients, those that are meant for them, or else the default ones.
    """
    if isinstance(estimators, Mapping):
        matching = [group for pattern, group in estimators.items() if matches(site, (pattern,))]
        estimators = matching[0] if matching else ()
    if site.startswith(GRADIENT):
        estimators = [e for e in estimators or () if applies_to(e, site)] or None
    kinds: tuple[Observes, ...] = ("activation",)
    if site in (ATTENTION, CROSS_ATTENTION):
        kinds = ("attention",)
    elif site == ROUTER:
        kinds = ("routing",)
    elif site == MIXER_STATE:
        kinds = ("state",)
    elif site == GATE_WEIGHT:
        kinds = ("gate",)
    elif is_weight(site):
        kinds = ("weight", "product")
    elif site in HEAD_SITES:
        kinds = ("activation", "heads")
    suites: dict[str, Suite] = {}
    for kind in kinds:
        applicable: Sequence[Estimator] = default_estimators(observes=kind, site=site)
        if estimators is not None:
            applicable = [estimator for estimator in estimators if estimator.observes == kind]
        if applicable:
            suites[kind] = Suite(applicable)
    return suites


class SiteStates:
    """One small state for every (site, layer, kind), into which increments are merged.

    Parameters
    ----------
    estimators : the estimators to use; None for the default ones of each site
    groups : keeps some sums apart by group of forward passes, or None
    """

    def __init__(self, estimators: EstimatorChoice, groups: TokenGroups | None) -> None:
        self.estimators, self.groups = estimators, groups
        self.layouts: dict[Key, Layout] = {}
        self._suites: dict[str, dict[str, Suite]] = {}
        self._states: dict[Key, State] = {}
        self._stacks: dict[tuple[Key, ...], State] = {}
        self._before: tuple[dict[Key, State], dict[tuple[Key, ...], State], dict[Key, Layout]] | None = None

    def __contains__(self, key: Key) -> bool:
        return key in self._states

    def suites_at(self, site: str) -> dict[str, Suite]:
        """The estimators that apply at a site, by what they observe."""
        if site not in self._suites:
            self._suites[site] = suites_of(site, self.estimators)
        return self._suites[site]

    def begin(self, forward_pass: int) -> None:
        """Forward pass number ``forward_pass`` begins, which may have to be forgotten."""
        if self.groups is not None:
            self.groups.start(forward_pass)
        self._before = (dict(self._states), dict(self._stacks), dict(self.layouts))

    def end(self, *, forget: bool) -> None:
        """The pass has ended; ``forget`` what it added."""
        if forget and self._before is not None:
            self._states, self._stacks, self.layouts = self._before
            if self.groups is not None:
                self.groups.forget()
        self._before = None

    @property
    def whole(self) -> dict[Key, State]:
        """The state of every (site, layer, kind) that was observed."""
        states = {key: dict(state) for key, state in self._states.items()}
        for keys, stack in self._stacks.items():
            for index, key in enumerate(keys):
                part = {name: value[index] for name, value in stack.items()}
                state = states.setdefault(key, {})
                fields = self.suites_at(key[0])[key[2]].fields(self.layouts[key])
                # A site that was read twice in a pass, or stacked otherwise in another, is one site.
                twice = {name: fields[name] for name in part if name in state}
                state |= part | (merge_states(twice, state, part) if twice else {})
        return states

    def merge(self, key: Key, suite: Suite, layout: Layout, increment: State) -> None:
        """Add an increment to the state of ``key``."""
        first_layout = self.layouts.setdefault(key, layout)
        if self.groups is not None:
            self.groups.add(key, suite, layout, increment)
        if key not in self._states:
            self._states[key] = suite.opening(increment)
            return
        state = self._states[key]
        if layout.tokens != first_layout.tokens:
            longest = layout if layout.tokens > first_layout.tokens else first_layout
            state, increment = (_padded(suite, part, longest) for part in (state, increment))
            self.layouts[key] = longest
        fields = suite.fields(layout)
        self._states[key] = merge_states({name: fields[name] for name in increment}, state, increment)

    def merge_stack(self, keys: tuple[Key, ...], suite: Suite, layout: Layout, increment: State) -> None:
        """As :meth:`merge`, for many keys at once; what is measured so has no axis over positions."""
        for index, key in enumerate(keys):
            self.layouts.setdefault(key, layout)
            if self.groups is not None:
                part = {name: increment[name][index] for name in GROUPED_FIELDS if name in increment}
                self.groups.add(key, suite, layout, part)
        fields = suite.fields(layout)
        if keys not in self._stacks:
            self._stacks[keys] = suite.opening(increment)
        else:
            increment_fields = {name: fields[name] for name in increment}
            self._stacks[keys] = merge_states(increment_fields, self._stacks[keys], increment)


def _padded(suite: Suite, state: State, layout: Layout) -> State:
    """``state`` with its position axes extended to the layout's length by the identity of merging."""
    out = {}
    fields = suite.fields(layout)
    for name, value in state.items():
        spec = fields[name]
        for axis, dim in enumerate(spec.dims):
            missing = layout.tokens - value.shape[axis] if dim in GROWING else 0
            if missing > 0:
                shape = list(value.shape)
                shape[axis] = missing
                value = torch.cat([value, value.new_full(shape, spec.identity)], dim=axis)
        out[name] = value
    return out
