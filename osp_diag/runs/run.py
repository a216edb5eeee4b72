"""Reading a run: labelled arrays, lazily, from the Zarr hierarchy that :mod:`osp_diag.runs.writer` writes."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import xarray as xr

from osp_diag.errors import MissingError, StoreError
from osp_diag.runs.damage import without_damaged
from osp_diag.runs.declared import unmeasured
from osp_diag.runs.display import run_as_html, run_as_text
from osp_diag.runs.folder import FORMAT_KEY, FORMAT_VERSION, is_packed, read_packed_root, read_root
from osp_diag.runs.format import METADATA, jsonable
from osp_diag.runs.reduction import Reduction
from osp_diag.runs.segments import Segment, joined_segments, joined_steps, parent_sentence, segments_of
from osp_diag.runs.tree import checked_path
from osp_diag.schema import (
    CHANNEL_WEIGHTS,
    LOGGED_STEP,
    RAW,
    SEAM_NOTE,
    SERIES,
    SNAPSHOT,
    TOKEN_GROUPS,
    TOKEN_UNIT,
    VOCABULARY,
    WEIGHT_MAP,
    group_path,
    in_site_order,
    is_site,
    site_of_path,
)
from osp_diag.wording import did_you_mean

if TYPE_CHECKING:
    from osp_diag.analyses.diagnosis.findings import Diagnosis
    from osp_diag.analyses.summary.summary import Summary
    from osp_diag.analyses.summary.verdict import Verdict

__all__ = ["Run", "open_run", "open_tree", "open_whole_part"]

_SUMMARY = (
    "model_name", "stack", "model_fingerprint", "architecture", "number_of_layers", "hidden_size",
    "tokenizer", "token_source", "token_fingerprint", "protocol", "bos", "sequence_length", "tokens",
    "dtype", "device", "created", "command",
)  # fmt: skip


def open_run(path: str | os.PathLike[str]) -> Run:
    """Open the run at ``path``, also while it is still being written, or packed (``osp-diag pack``).

    Only metadata and coordinates are read; numbers are when they are used. What is seen are the steps
    committed so far; :meth:`Run.refresh` looks again.

    Raises
    ------
    StoreError : nothing is there, it is no run, a newer format wrote it, it is damaged, or it is empty
    """
    return Run(open_tree(Path(path)), Path(path))


def open_whole_part(path: str | os.PathLike[str]) -> Run:
    """As :func:`open_run`, without what is damaged, which :attr:`Run.damage` tells. Every chunk is read.

    Raises
    ------
    StoreError : as :func:`open_run`; the metadata or the steps themselves are damaged
    """
    damage: dict[str, str] = {}
    return Run(open_tree(Path(path), damage), Path(path), tuple(damage.values()))


def open_tree(path: Path, damage: dict[str, str] | None = None) -> xr.DataTree:
    """Everything in the run at ``path``, read when it is used; raises as :func:`open_run`.

    If ``damage`` is given, every chunk is read, arrays that are damaged are left out, and it is told why.
    """
    packed = is_packed(path)
    root = read_packed_root(path) if packed else read_root(path)
    nodes = root["consolidated_metadata"]["metadata"]
    labels = (nodes.get("step"), nodes.get(f"{SERIES}/{LOGGED_STEP}"))
    if not any(entry["shape"] and entry["shape"][0] for entry in labels if entry):
        raise StoreError(
            f"the run at {path} is empty: no step is recorded yet; probe first, or wait for its writer"
        )
    from osp_diag.runs.reading import FolderFiles, PackedFiles, RunStore  # only here: it imports zarr

    store = RunStore(PackedFiles(path) if packed else FolderFiles(path), root)
    if damage is not None and (problems := store.damage()):
        damage |= problems
        store = RunStore(store.files, without_damaged(root, problems))
    try:
        # Nothing in a run is a date: units such as "seconds" are meant as units of plain numbers.
        tree = xr.open_datatree(
            store,  # type: ignore[arg-type]  # zarr's stores are taken too
            engine="zarr",
            consolidated=True,
            decode_times=False,
            decode_timedelta=False,
        )
        return joined_segments(tree)
    except StoreError as error:  # without what xarray adds of its own
        raise StoreError(str(error)) from error
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"the run at {path} is damaged ({error}); restore it from a copy") from error


class Run:
    """What a probe wrote, over steps or for one checkpoint.

    ``run["osp_excess_kurtosis"]`` is one statistic at every site that has it, ``run.at("residual_post")``
    every statistic of one site. ``run.tree`` is the whole as an :class:`xarray.DataTree`.
    """

    def __init__(self, tree: xr.DataTree, path: Path | None = None, damage: Sequence[str] = ()) -> None:
        self._tree: xr.DataTree | None = tree
        self.damage = tuple(damage)
        """What was left out because it is damaged, one sentence each; see :func:`open_whole_part`."""
        self.path = path
        """Where the run is on disk; None if it is in memory."""
        self._texts: dict[str, dict[str, xr.DataArray]] = {}

    @classmethod
    def in_memory(
        cls,
        steps: Sequence[tuple[int, Mapping[str, xr.Dataset]]],
        static: Mapping[str, xr.Dataset],
        attributes: Mapping[str, Any],
        series: Mapping[str, Mapping[int, float]] | None = None,
        logged: Mapping[str, Mapping[int, xr.Dataset]] | None = None,
    ) -> Run:
        """A run that is on no disk.

        Parameters
        ----------
        steps : (step, site or group → Dataset without the step), as for ``RunWriter.append``
        static : group → what does not grow, as for ``RunWriter.write_static``
        series : name → {step: scalar}
        logged : group → {step: Dataset without the step}, as for ``RunWriter.append_logged``
        """
        labels = np.asarray([step for step, _ in steps], dtype=np.int64)
        root = xr.Dataset(
            coords={"step": ("step", labels, {"long_name": "training step"})},
            attrs={FORMAT_KEY: FORMAT_VERSION} | jsonable(dict(attributes)),
        )
        nodes = {"/": root}
        examples: dict[str, xr.Dataset] = {}
        for _, groups in reversed(steps):
            examples |= {name: groups[name] for name in groups}
        for name, example in examples.items():
            parts = [
                (groups[name] if name in groups else _unmeasured(example)).expand_dims(step=[label])
                for label, groups in steps
            ]
            nodes[f"/{checked_path(name)}"] = joined_steps(parts, "step", "exact").drop_vars("step")
        for name, dataset in static.items():
            nodes[f"/{checked_path(name)}"] = dataset
        if rows := [*(series or {}).values(), *(logged or {}).values()]:
            labels = np.asarray(sorted({step for values in rows for step in values}), dtype=np.int64)
            columns = {
                name: (LOGGED_STEP, [float(values.get(step, np.nan)) for step in labels.tolist()])
                for name, values in (series or {}).items()
            }
            nodes[f"/{SERIES}"] = xr.Dataset(columns, coords={LOGGED_STEP: labels})
            for name, datasets in (logged or {}).items():
                parts = [dataset.expand_dims({LOGGED_STEP: [step]}) for step, dataset in datasets.items()]
                grown = joined_steps(parts, LOGGED_STEP, "exact")
                nodes[f"/{SERIES}/{name}"] = grown.reindex({LOGGED_STEP: labels})
        return cls(xr.DataTree.from_dict(nodes))

    # -- what is there ---------------------------------------------------------------------------------

    @property
    def tree(self) -> xr.DataTree:
        """The whole run."""
        assert self._tree is not None  # of a run that is followed alone
        return self._tree

    @property
    def attrs(self) -> dict[Hashable, Any]:
        """Everything that determines a number: model, tokens, protocol, estimators, versions."""
        return dict(self.tree.attrs)

    @property
    def summary_attributes(self) -> dict[str, Any]:
        """The attributes that say in a few lines what was measured, in reading order."""
        attrs = self.attrs
        return {key: attrs[key] for key in _SUMMARY if key in attrs}

    @property
    def steps(self) -> np.ndarray:
        """The probed steps, ascending."""
        return self.tree.coords["step"].values if "step" in self.tree.coords else np.empty(0, np.int64)

    @property
    def sites(self) -> list[str]:
        """The sites observed, in the order in which a token passes them."""
        declared = self.attrs.get("sites") or ()
        return in_site_order(name for name in self._groups if is_site(name, declared))

    @property
    def beside(self) -> list[str]:
        """Groups that are no sites, such as ``series`` or ``optimizer:update``; ``run[name]`` gives each."""
        sites = set(self.sites)
        return sorted(name for name in self._groups if name not in sites)

    @property
    def _groups(self) -> list[str]:
        return [site_of_path(node.path) for node in self.tree.subtree if node.path != "/" and node.data_vars]

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The stretches of steps between which the training changed; one where it did not."""
        return segments_of({str(key): value for key, value in self.attrs.items()})

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of the numbers should know."""
        notes = [str(note) for note in self.attrs.get("notes") or ()]
        parent = parent_sentence(self.segments[0].attributes)
        notes += [parent] if parent else []
        notes += [segment.sentence for segment in self.segments[1:]]
        return tuple(dict.fromkeys(note for note in notes if not note.startswith(SEAM_NOTE)))

    @property
    def declared_absent(self) -> dict[str, str] | None:
        """The sites that the model was found not to have, with the reason; None: the run does not say."""
        absent = self.attrs.get("absent_sites")
        return None if absent is None else {str(site): str(why) for site, why in absent.items()}

    @property
    def absent_sites(self) -> dict[str, str]:
        """Sites that were looked for and not observed, with the reason."""
        noted = {**(self.attrs.get("sites") or {}), **(self.declared_absent or {})}
        present = set(self.sites)
        return {site: str(note) for site, note in noted.items() if site not in present}

    @property
    def age(self) -> float | None:
        """Seconds since the run was last written; None of one that is in memory, or is not there."""
        if self.path is None or not (self.path / METADATA).exists():
            return None
        return max(0.0, time.time() - os.stat(self.path / METADATA).st_mtime)

    @property
    def layers(self) -> np.ndarray:
        """The layers that any site speaks of, ascending."""
        parts = [self.at(site)["layer"].values for site in self.sites if "layer" in self.at(site).coords]
        return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.int64)

    @property
    def estimators(self) -> list[str]:
        """Identifiers of the estimators that were run ("osp_excess_kurtosis/1")."""
        names = (*(self.attrs.get("estimators") or ()), *(self.attrs.get("later_estimators") or ()))
        return list(dict.fromkeys(names))

    @property
    def statistics(self) -> list[str]:
        """Names of everything that ``run[name]`` knows."""
        names = {str(name): None for site in self.sites for name in self.at(site).data_vars}
        return list(names)

    # -- the numbers -----------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        """One statistic over all sites that have it: a DataArray (site, step, layer, …).

        Layers, channels, heads that a site lacks are NaN there. ``floor`` and ``ceiling`` are
        coordinates along ``site`` where they depend on the site's width. The name of a site or group
        gives its Dataset instead, as :meth:`at` does.

        Raises
        ------
        StoreError : there is no such statistic, or sites hold it under different estimators, whose numbers
            do not belong into one array
        """
        datasets = {site: self.at(site) for site in self.sites}
        parts = {site: dataset[name] for site, dataset in datasets.items() if name in dataset.data_vars}
        if parts:
            return _stacked(self._of_one_estimator(name, parts))
        if name in (*self.sites, *self.beside) or name in self.tree.children:
            return self._dataset(name)
        raise MissingError(
            f"{self._subject} has no statistic {name!r}; "
            + did_you_mean(name, self.statistics, "run.statistics lists them")
        )

    def _of_one_estimator(self, name: str, parts: Mapping[str, xr.DataArray]) -> Mapping[str, xr.DataArray]:
        sites_of: dict[str, list[str]] = {}
        for site, values in parts.items():
            sites_of.setdefault(str(values.attrs.get("estimator", "no estimator")), []).append(site)
        if len(sites_of) > 1:
            origins = "; ".join(f"{origin} at {', '.join(sites)}" for origin, sites in sites_of.items())
            raise StoreError(
                f"{self._subject} holds {name!r} under different estimators ({origins}); read one site with "
                f"run.at(site)[{name!r}]"
            )
        return parts

    def __contains__(self, name: object) -> bool:
        return name in self.statistics

    def __iter__(self) -> Iterator[str]:
        return iter(self.statistics)

    def _ipython_key_completions_(self) -> list[str]:
        return self.statistics

    def at(self, site: str) -> xr.Dataset:
        """Every statistic of one site: a Dataset with dimensions (step, layer, …).

        Where a statistic names tokens and the run knows their texts, those are a coordinate
        (``top_key_token`` → ``top_key_token_text``).
        """
        dataset = self._find("", site, "site")
        if site not in self._texts:
            self._texts[site] = self._texts_of(dataset)
        return dataset.assign_coords(self._texts[site])

    def with_texts(self, dataset: xr.Dataset) -> xr.Dataset:
        """``dataset`` with the texts of the tokens that it names as coordinates, where the run knows them."""
        return dataset.assign_coords(self._texts_of(dataset))

    def _texts_of(self, dataset: xr.Dataset) -> dict[str, xr.DataArray]:
        naming = [n for n, v in dataset.data_vars.items() if v.attrs.get("units") == TOKEN_UNIT]
        if not naming or VOCABULARY not in self.tree.children:
            return {}
        vocabulary = self.tree.children[VOCABULARY].to_dataset()["token_text"]
        texts = np.append(np.asarray(vocabulary, dtype=object), "")
        coordinates = {}
        for name in naming:
            ids = dataset[name]
            inside = (ids.values >= 0) & (ids.values < len(texts) - 1)
            values = texts[np.where(inside, ids.values, len(texts) - 1)].astype(str)
            coordinates[f"{name}_text"] = xr.DataArray(
                values, dims=ids.dims, attrs={"long_name": "text of the token"}
            )
        return coordinates

    # -- one statistic over the steps ------------------------------------------------------------------
    # What a view of a growing run asks every second; see osp_diag.runs.following.

    def statistics_at(self, site: str) -> dict[str, tuple[str, ...]]:
        """What is recorded by step at a site or in a group beside the sites: name → dimensions without the
        step; empty if nothing is."""
        if not self._holds(site):
            return {}
        variables = self._dataset(site).data_vars.items()
        return {
            str(name): tuple(str(dim) for dim in values.dims[1:])
            for name, values in variables
            if values.dims[:1] == ("step",)
        }

    def _holds(self, group: str) -> bool:
        node = self.tree
        for part in group_path(group).split("/"):
            if part not in node.children:
                return False
            node = node.children[part]
        return bool(node.data_vars)

    def sites_with(self, statistic: str) -> list[str]:
        """The sites at which a statistic is recorded by step."""
        return [site for site in self.sites if statistic in self.statistics_at(site)]

    def labels(self, site: str, dimension: str) -> np.ndarray:
        """The labels along a dimension of a site, such as its strata; empty if there are none."""
        if not self._holds(site):
            return np.empty(0)
        dataset = self._dataset(site)
        return dataset[dimension].values if dimension in dataset.coords else np.empty(0)

    def values(
        self, site: str, statistic: str, select: Mapping[str, Any] | None = None, mean: Sequence[str] = ()
    ) -> xr.DataArray:
        """A statistic over all steps, as a DataArray (step, …).

        Parameters
        ----------
        select : dimension → label that is taken of it (``{"stratum": "all"}``)
        mean : dimensions over which the mean of what is finite is taken

        Raises
        ------
        StoreError : the run does not hold that statistic there, or the label
        """
        dims_of = self.statistics_at(site)
        if statistic not in dims_of:
            raise MissingError(f"{self._subject} has no {statistic!r} at {site!r} by step")
        places = tuple((dim, self._place(site, dim, label)) for dim, label in (select or {}).items())
        reduction = Reduction(("step", *dims_of[statistic]), places, tuple(mean))
        rows, attributes = self._reduced(site, statistic, reduction)
        labels = {dim: self.labels(site, dim) for dim in reduction.result_dims[1:]}
        return xr.DataArray(
            rows,
            dims=reduction.result_dims,
            coords={"step": self.steps[: len(rows)]} | {dim: of for dim, of in labels.items() if len(of)},
            attrs=attributes,
        )

    def rows(self, group: str, statistic: str, start: int = 0, stop: int | None = None) -> xr.DataArray:
        """A statistic of a site or group at the probed steps from place ``start`` to before ``stop``.

        Only these are read, and nothing is kept: for who goes over a long run once, or reads what is new.

        Returns
        -------
        (step, …) without labels but the steps'

        Raises
        ------
        StoreError : the run does not hold that statistic there by step
        """
        dims_of = self.statistics_at(group)
        if statistic not in dims_of:
            raise MissingError(f"{self._subject} has no {statistic!r} at {group!r} by step")
        steps = self.steps[start:stop]
        values, attributes = self._rows_between(group, statistic, start, start + len(steps))
        return xr.DataArray(values, {"step": steps}, ("step", *dims_of[statistic]), attrs=attributes)

    def _rows_between(
        self, group: str, statistic: str, start: int, stop: int
    ) -> tuple[np.ndarray, dict[Hashable, Any]]:
        values = self._dataset(group)[statistic]
        return values[start:stop].values, values.attrs

    def _reduced(
        self, site: str, statistic: str, reduction: Reduction
    ) -> tuple[np.ndarray, dict[Hashable, Any]]:
        """The numbers of :meth:`values`, and what the statistic says of itself."""
        values = self.at(site)[statistic]
        return reduction(values.values), values.attrs

    def _place(self, site: str, dimension: str, label: Any) -> int:
        labels = self.labels(site, dimension).tolist()
        places = [place for place, candidate in enumerate(labels) if _alike(candidate, label)]
        if not places:
            raise MissingError(
                f"{self._subject} has no {dimension} {label!r} at {site!r}; it has "
                f"{', '.join(map(str, labels)) or 'none'}"
            )
        return places[0]

    # -- what stands beside the sites ------------------------------------------------------------------

    def raw(self, site: str) -> xr.Dataset:
        """The raw sums of one site, named "measurement.field", from which statistics can be computed anew."""
        return self._find(f"{RAW}/", site, "raw sums of")

    def token_groups(self, site: str) -> xr.Dataset:
        """Some of the raw sums of one site by group of batches (dimension ``token_group``).

        Together the groups are the whole; how much they differ tells what is significant.
        """
        return self._find(f"{TOKEN_GROUPS}/", site, "token groups of")

    def snapshot(self, site: str) -> xr.Dataset:
        """Raw activations of the first sequence at one site, with ``token_text`` and ``token_id``."""
        dataset = self._find(f"{SNAPSHOT}/", site, "snapshot of")
        tokens = self.tree.children[SNAPSHOT].to_dataset()
        texts = {key: tokens[key] for key in ("token_text", "token_id") if key in tokens}
        fitting = {
            key: value for key, value in texts.items() if value.sizes["token"] == dataset.sizes.get("token")
        }
        return dataset.assign_coords(fitting)

    @property
    def weight_maps(self) -> list[str]:
        """The projections of which the run holds a map of |W|, by their path within a block."""
        group = self.tree.children.get(WEIGHT_MAP)
        return [] if group is None else list(group.children)

    def weight_map(self, name: str) -> xr.Dataset:
        """|W| of a projection: ``weight`` (layer, output_cell, input_cell), maxima of cells, and of every
        row and column exactly (:func:`osp_diag.capture.weight_maps.weight_maps`)."""
        if name not in self.weight_maps:
            raise MissingError(
                f"{self._subject} has no map of the weights {name!r}; "
                + did_you_mean(name, self.weight_maps, "run.weight_maps lists them")
            )
        return self.tree.children[WEIGHT_MAP].children[name].to_dataset(inherit=False)

    @property
    def channel_weights(self) -> xr.Dataset:
        """Norm gains and the embedding by channel of the residual stream
        (:func:`osp_diag.capture.channel_weights.channel_weights`); empty if none were kept."""
        group = self.tree.children.get(CHANNEL_WEIGHTS)
        return xr.Dataset() if group is None else group.to_dataset(inherit=False)

    @property
    def series(self) -> xr.Dataset:
        """Scalars by training step (loss, learning_rate, probe_seconds …); empty if none were recorded."""
        if SERIES not in self.tree.children:
            return xr.Dataset(coords={"step": np.empty(0, np.int64)})
        return self.tree.children[SERIES].to_dataset(inherit=False).rename({LOGGED_STEP: "step"})

    @property
    def logged_groups(self) -> list[str]:
        """The groups of labelled arrays that are recorded as often as the scalars of :attr:`series`."""
        group = self.tree.children.get(SERIES)
        if group is None or LOGGED_STEP not in group.coords:
            return []
        return [
            str(name)
            for name, part in group.children.items()
            if part.data_vars and all(LOGGED_STEP in values.dims for values in part.data_vars.values())
        ]

    def logged(self, name: str) -> xr.Dataset:
        """Labelled arrays by training step, as the scalars of :attr:`series`: what the trainer keeps in
        ``optimizer_settings`` and ``weight_sketch``. NaN at steps without them.

        Raises
        ------
        MissingError : the run has no such group; :attr:`logged_groups` lists them
        """
        if name not in self.logged_groups:
            raise MissingError(
                f"{self._subject} has no logged group {name!r}; "
                + did_you_mean(name, self.logged_groups, "run.logged_groups lists them")
            )
        group = self.tree.children[SERIES]
        arrays = group.children[name].to_dataset(inherit=False)
        labels = group.to_dataset(inherit=False)[LOGGED_STEP]
        return arrays.assign_coords({LOGGED_STEP: labels}).rename({LOGGED_STEP: "step"})

    def to_frame(self, name: str) -> Any:
        """One statistic as a long :class:`pandas.DataFrame`: a row per site, step, layer …"""
        array = self[name]
        extra = [key for key in array.coords if key not in array.dims]
        return array.drop_vars(extra).to_dataframe(name).dropna().reset_index()

    # -- what it says ----------------------------------------------------------------------------------

    def summary(self, *, step: int | None = None) -> Summary:
        """The numbers to know and the verdict in words: :func:`osp_diag.analyses.summarise`."""
        return cast("Summary", _offered("analyses", "summarise")(self, step=step))

    def verdict(self, *, step: int | None = None) -> Verdict:
        """What is wrong and where, by stated rules: :func:`osp_diag.analyses.verdict`."""
        return cast("Verdict", _offered("analyses", "verdict")(self, step=step))

    def diagnose(self, *, checkpoints: str | os.PathLike[str] | None = None, **options: Any) -> Diagnosis:
        """When outliers or the loss rose, where, why, and what to do: :func:`osp_diag.analyses.diagnose`.

        Of a run of ``osp-diag train``, the checkpoints beside it are read; of another loop's, those in the
        directory ``checkpoints``, or where the run says that they are.
        """
        laboratory = _offered("trainer.laboratory", "laboratory")(self, checkpoints=checkpoints)
        return cast("Diagnosis", _offered("analyses", "diagnose")(self, laboratory, **options))

    def draw(self, name: str, **options: Any) -> Any:
        """A figure of this run (:func:`osp_diag.figures.draw`): ``run.draw("sink_map", out="sinks.pdf")``."""
        return _offered("figures", "draw")(name, self, **options)

    def refresh(self) -> Run:
        """Look again at a run that is still growing; returns itself."""
        if self.path is not None:
            self._tree = open_tree(self.path)
            self._texts = {}
        return self

    def _find(self, prefix: str, site: str, kind: str) -> xr.Dataset:
        path = prefix + group_path(site)
        group = self.tree
        for part in path.split("/"):
            if part not in group.children:
                break
            group = group.children[part]
        else:
            if group.data_vars:
                return group.to_dataset()
        reason = self.absent_sites.get(site)
        if reason is not None:
            raise MissingError(f"{self._subject} has no {kind} {site!r}: {reason}")
        paths = {node.path.strip("/") for node in self.tree.subtree}
        present = [name for name in self.sites if prefix + group_path(name) in paths]
        raise MissingError(
            f"{self._subject} has no {kind} {site!r}; " + did_you_mean(site, present, "run.sites lists them")
        )

    def _dataset(self, name: str) -> xr.Dataset:
        return self.tree[group_path(name)].to_dataset()

    @property
    def _subject(self) -> str:
        return f"the run at {self.path}" if self.path is not None else "the run"

    def __repr__(self) -> str:
        return run_as_text(self)

    def _repr_html_(self) -> str:
        return run_as_html(self)


def _offered(package: str, name: str) -> Callable[..., Any]:
    """A function of a floor above, looked up when a user calls it: a run imports nothing of what reads it."""
    return cast("Callable[..., Any]", getattr(importlib.import_module(f"osp_diag.{package}"), name))


def _alike(label: Any, candidate: Any) -> bool:
    """Whether two labels are the same; those of real numbers may be rounded."""
    if isinstance(label, float) and isinstance(candidate, int | float):
        return math.isclose(label, candidate, rel_tol=1e-5, abs_tol=1e-8)
    return bool(label == candidate)


def _unmeasured(example: xr.Dataset) -> xr.Dataset:
    """A group at a step that does not have it."""
    values = {
        name: variable.copy(data=unmeasured(variable.shape, variable.dtype))
        for name, variable in example.data_vars.items()
    }
    return example.assign(values)


def _stacked(parts: Mapping[str, xr.DataArray]) -> xr.DataArray:
    sites = list(parts)
    arrays = list(parts.values())
    # Dimensions without labels can only be joined by position: give them their positions as labels.
    for dim in dict.fromkeys(dim for array in arrays for dim in array.dims):
        if len({array.sizes.get(dim) for array in arrays}) > 1:
            arrays = [
                array.assign_coords({dim: np.arange(array.sizes[dim])})
                if dim in array.dims and dim not in array.coords
                else array
                for array in arrays
            ]
    joined = xr.concat(
        arrays,
        dim=xr.DataArray(sites, dims="site", name="site"),
        join="outer",
        coords="minimal",
        compat="override",
        combine_attrs="drop_conflicts",
    )
    for bound in ("floor", "ceiling"):
        values = [array.attrs.get(bound) for array in arrays]
        if bound not in joined.attrs and any(isinstance(value, (int, float)) for value in values):
            numbers = [float(value) if value is not None else np.nan for value in values]
            joined = joined.assign_coords({bound: ("site", numbers)})
    return joined
