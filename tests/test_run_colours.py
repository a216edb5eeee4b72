"""That the colours of runs can be told apart by everybody, on a light page and on a dark one."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from osp_diag.figures.live._look import STYLES
from osp_diag.figures.live._pictures import Shown
from osp_diag.figures.styles import RUN_COLOURS, load_style

# Machado, Oliveira and Fernandes 2009, severity 1, of linear RGB.
EYES = {
    "trichromat": np.eye(3),
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanope": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# Ottosson 2020.
TO_CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
TO_LAB = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


def linear(colour):
    value = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    return np.array(TO_LAB) @ np.cbrt(np.array(TO_CONES) @ np.clip(rgb, 0, 1))


def contrast(first, second):
    """WCAG's ratio."""
    light, dark = sorted(
        (float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05 for colour in (first, second)), reverse=True
    )
    return light / dark


@pytest.mark.parametrize("eye", EYES)
def test_every_eye_tells_every_pair_apart(eye):
    seen = [oklab(np.array(EYES[eye]) @ linear(colour)) for colour in RUN_COLOURS]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 0.12


def test_all_stand_out_from_the_grounds_of_our_pages():
    grounds = re.findall(r"--paper: (#\w{6})", STYLES)
    assert len(grounds) == 2
    assert min(contrast(colour, ground) for colour in RUN_COLOURS for ground in grounds) >= 2.99


def test_a_run_has_one_colour_on_all_pages():
    assert load_style("paper").colours_of_runs(6) == RUN_COLOURS
    assert tuple(Shown(place, "run").colour for place in range(6)) == RUN_COLOURS
    static = Path(__file__).parents[1] / "figures" / "report" / "static"
    assert "DATA.colours.runs" in (static / "plots.js").read_text()
    assert len(set(load_style("paper").colours_of_runs(9))) == 9
