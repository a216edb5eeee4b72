"""The activation statistics once more, token by token in float64 with NumPy and SciPy: slow and plain.

Shares no code with osp_diag. What a new statistic should be stands in its own test file, as a function
``expected(oracle)`` that gives its outputs by name; it is found there, and held on every backend and input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from runpy import run_path

import numpy as np
from scipy import stats

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def mean(values: list[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else np.nan


def lower_median(values: np.ndarray) -> float:
    return float(np.sort(values.ravel())[(values.size - 1) // 2])


def fisher(token: np.ndarray) -> float:
    return 0.0 if np.ptp(token) == 0 else float(stats.kurtosis(token / np.abs(token).max()))


def osp(token: np.ndarray) -> float:
    if np.ptp(token) == 0:
        return 0.0
    z = token / np.abs(token).max()
    return max(0.0, np.mean(z**4) / np.var(z, ddof=1) ** 2 - 3)


def pooled(elements: np.ndarray) -> float:
    if np.ptp(elements) == 0:
        return 0.0
    centred = elements - elements.mean()
    return float(np.mean(centred**4) / (np.std(elements, ddof=1) ** 4 + 1e-6))


def gini(energy: np.ndarray) -> float:
    """Half the relative mean difference between all pairs."""
    return float(np.abs(energy[:, None] - energy[None, :]).mean() / (2 * energy.mean()))


@cache
def oracles_of_test_files(
    folder: Path = Path(__file__).parent,
) -> list[Callable[[Oracle], dict[str, np.ndarray]]]:
    """``expected`` of every test file that defines one; the others are not imported."""
    return [
        run_path(str(path))["expected"]
        for path in sorted(folder.glob("test_*.py"))
        if "\ndef expected(" in path.read_text(encoding="utf-8")
    ]


class Oracle:
    """Expected outputs for x (batch, token, channel) and strata (stratum, batch, token)."""

    def __init__(self, x: np.ndarray, strata: np.ndarray) -> None:
        self.x = x.astype(np.float64)
        self.present = strata[0] > 0
        self.keep = (strata > 0) & np.isfinite(self.x).all(-1)
        self.d = x.shape[-1]
        self.rows = [self.x[keep] for keep in self.keep]
        self.sequences = [[x[k] for x, k in zip(self.x, keep, strict=True) if k.any()] for keep in self.keep]
        self.whole = self.sequences[0]

    def over_tokens(self, value: Callable[[np.ndarray], float]) -> np.ndarray:
        return np.array([mean([value(token) for token in rows]) for rows in self.rows])

    def top_of_tokens(self, value: Callable[[np.ndarray], float]) -> np.ndarray:
        return np.array([max((value(token) for token in rows), default=np.nan) for rows in self.rows])

    def over_sequences(self, value: Callable[[np.ndarray], float]) -> np.ndarray:
        return np.array([mean([value(s) for s in sequences]) for sequences in self.sequences])

    def quantiles(self, value: Callable[[np.ndarray], float]) -> np.ndarray:
        per = [[value(token) for token in rows] for rows in self.rows]
        return np.array(
            [
                np.quantile(v, QUANTILES, method="inverted_cdf") if v else [np.nan] * len(QUANTILES)
                for v in per
            ]
        )

    def expected(self) -> dict[str, np.ndarray]:
        outputs = self.kurtoses() | self.magnitudes() | self.channels() | self.outliers()
        for expected in oracles_of_test_files():
            outputs |= expected(self)
        return outputs

    def kurtoses(self) -> dict[str, np.ndarray]:
        return {
            "osp_excess_kurtosis": self.over_tokens(osp),
            "osp_excess_kurtosis_max": self.top_of_tokens(osp),
            "osp_excess_kurtosis_of_ceiling": self.over_tokens(osp) / (self.d - 3),
            "fisher_kurtosis": self.over_tokens(fisher),
            "fisher_kurtosis_max": self.top_of_tokens(fisher),
            "pearson_kurtosis": self.over_tokens(fisher) + 3,
            "pooled_kurtosis": self.over_sequences(pooled),
        }

    def magnitudes(self) -> dict[str, np.ndarray]:
        def top(rank: int) -> Callable[[np.ndarray], float]:
            return lambda s: float(np.sort(np.abs(s).ravel())[-rank])

        def scales(s: np.ndarray) -> np.ndarray:
            return np.abs(s).max(-1)

        medians = [lower_median(np.abs(s)) for s in self.whole]
        peaks = [np.abs(s).max() for s in self.whole]
        middle = [lower_median(scales(s)) for s in self.whole]
        maxima = [np.abs(rows).max() if len(rows) else np.nan for rows in self.rows]
        return {
            "max_median_ratio": self.ratio(lambda token: np.abs(token)),
            "centred_max_median_ratio": self.ratio(lambda token: np.abs(token - token.mean())),
            "top_magnitude": np.stack([self.over_sequences(top(rank)) for rank in (1, 2, 3)], -1),
            "median_magnitude": np.array(mean(medians)),
            "peak_median_ratio": np.array(
                mean([p / m for p, m in zip(peaks, medians, strict=True) if m > 0])
            ),
            "infinity_norm": self.over_sequences(top(1)),
            "absolute_maximum": np.array(maxima),
            "token_norm": self.over_tokens(lambda token: float(np.linalg.norm(token))),
            "token_count": np.array([float(len(rows)) for rows in self.rows]),
            "glu_spike_ratio": np.array(mean([p / m for p, m in zip(peaks, middle, strict=True) if m > 0])),
            "tweo_penalty": self.over_tokens(lambda token: float(np.mean((np.abs(token) / 3.000001) ** 4))),
        }

    def ratio(self, magnitude: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        out = []
        for rows in self.rows:
            pairs = [(m.max(), lower_median(m)) for m in map(magnitude, rows)]
            out.append(mean([peak / middle for peak, middle in pairs if middle > 0]))
        return np.array(out)

    def channels(self) -> dict[str, np.ndarray]:
        def per_channel(value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
            return np.stack([value(rows) if len(rows) else np.full(self.d, np.nan) for rows in self.rows])

        def energies(centre: bool) -> list[np.ndarray | None]:
            found: list[np.ndarray | None] = []
            for rows in self.rows:
                part = rows - rows.mean(-1, keepdims=True) if centre else rows
                energy = (part**2).mean(0) if len(rows) else None
                found.append(np.ones(self.d) if energy is not None and not energy.any() else energy)
            return found

        def each(value: Callable[[np.ndarray], float], centre: bool = False) -> np.ndarray:
            return np.array([np.nan if e is None else value(e) for e in energies(centre)])

        def share(top: int) -> Callable[[np.ndarray], float]:
            return lambda e: float(np.sort(e)[::-1][:top].sum() / e.sum())

        return {
            "channel_rms": per_channel(lambda rows: np.sqrt((rows**2).mean(0))),
            "channel_mean": per_channel(lambda rows: rows.mean(0)),
            "channel_absolute_maximum": per_channel(lambda rows: np.abs(rows).max(0)),
            "channel_fourth_power": per_channel(lambda rows: (rows**4).mean(0)),
            "outlier_feature_fraction": per_channel(lambda rows: (np.abs(rows) >= 6).mean(0)),
            "neuron_kurtosis": each(lambda e: float((e**2).mean() / e.mean() ** 2)),
            "neuron_kurtosis_variance": each(lambda e: float(np.var(e / e.mean(), ddof=1)), centre=True),
            "participation_ratio": each(lambda e: float(e.sum() ** 2 / (e**2).sum())),
            "channel_share": np.stack([each(share(top)) for top in (1, 2, 4, 8, 16)], -1),
            "channel_gini": each(gini),
            "channel_entropy": each(lambda e: float(stats.entropy(e) / np.log(self.d))),
            "channel_max_to_mean": each(lambda e: float(np.sqrt(e).max() / np.sqrt(e).mean())),
            "channels_above_six": np.array(
                [float((np.abs(r) > 6).any(0).sum()) if len(r) else np.nan for r in self.rows]
            ),
        }

    def outliers(self) -> dict[str, np.ndarray]:
        massive, sigma, systematic = (np.zeros(self.x.shape, bool) for _ in range(3))
        for b, keep in enumerate(self.keep[0]):
            if not keep.any():
                continue
            x, counted = self.x[b], self.x[b][keep]
            magnitude = np.abs(counted)
            massive[b] = (np.abs(x) > 100) & (np.abs(x) >= 1000 * lower_median(magnitude))
            deviation = np.std(counted, ddof=1)
            if np.ptp(counted) > 0:
                sigma[b] = np.abs(x - counted.mean()) >= 6 * deviation
            systematic[b, :, 0] = np.abs(x).max(-1) > 1000 * magnitude.mean()
        number = np.array([float(len(sequences)) or np.nan for sequences in self.sequences])
        tokens = np.array([float(len(rows)) or np.nan for rows in self.rows])

        def by_stratum(found: np.ndarray) -> np.ndarray:
            return np.array([found[keep].sum() for keep in self.keep], float)

        counted_sigma = sigma & self.keep[0][..., None]
        return {
            "massive_activation_count": by_stratum(massive) / number,
            "massive_activation_channel_count": massive[self.keep[0]].sum(0) / number[0],
            "systematic_outlier_token_count": by_stratum(systematic) / number,
            "systematic_outlier_token_fraction": by_stratum(systematic) / tokens,
            "six_sigma_fraction": by_stratum(sigma) / (tokens * self.d),
            "six_sigma_channel_count": counted_sigma.sum((0, 1)) / number[0],
            "six_sigma_position_count": counted_sigma.sum((0, 2)) / number[0],
        }
