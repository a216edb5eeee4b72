"""Definitions of outlier and sink statistics, each published number under its own name.

An estimator is ``init / update / merge / finalise`` over a small state of sums; the same body runs on
NumPy, torch (eager and compiled) and JAX (eager and jitted). Importing this package imports neither
torch nor JAX.

Examples
--------
>>> import numpy as np
>>> from osp_diag.estimators import ActivationObservation, Suite, get_estimator
>>> suite = Suite([get_estimator("osp_excess_kurtosis")])
>>> x = np.random.default_rng(0).standard_normal((1, 64, 512)).astype(np.float32)
>>> strata = np.ones((4, 1, 64), np.float32)
>>> strata[1:3] = 0
>>> observation = ActivationObservation(x, strata)
>>> state = suite.update(suite.init(observation.layout, x), observation)
>>> float(suite.finalise(state, observation.layout)["osp_excess_kurtosis"].values[0]) < 0.2
True
"""

from __future__ import annotations

from osp_diag.estimators.activation import GENERIC, ActivationObservation, Reductions
from osp_diag.estimators.base import (
    Estimator,
    Field,
    Layout,
    Measurement,
    Output,
    Source,
    State,
    Suite,
    merge_states,
)
from osp_diag.estimators.channel_concentration import ChannelConcentration, top_channel_overlap
from osp_diag.estimators.channel_moments import ChannelMoments
from osp_diag.estimators.magnitude_outliers import (
    ChannelsAboveSix,
    InfinityNorm,
    OutlierFeatures,
    SixSigmaOutliers,
    outlier_features,
)
from osp_diag.estimators.massive import (
    MassiveActivations,
    PeakMedianRatio,
    SystematicOutlierTokens,
    TopMagnitude,
)
from osp_diag.estimators.max_median import CentredMaxMedianRatio, MaxMedianRatio
from osp_diag.estimators.neuron_kurtosis import NeuronKurtosis, NeuronKurtosisVariance
from osp_diag.estimators.nonfinite import NonFinite
from osp_diag.estimators.pooled_kurtosis import PooledKurtosis
from osp_diag.estimators.registry import (
    all_estimators,
    applies_to,
    default_estimators,
    describe_outputs,
    estimator_parameters,
    estimators_named,
    get_estimator,
)
from osp_diag.estimators.token_kurtosis import (
    FisherKurtosis,
    OspExcessKurtosis,
    PearsonKurtosis,
    RotatedPearsonKurtosis,
    gaussian_floor,
)
from osp_diag.estimators.token_scale import GluSpikeRatio, TokenScale, TweoPenalty
from osp_diag.schema import STRATA

__all__ = [
    "GENERIC",
    "STRATA",
    "ActivationObservation",
    "CentredMaxMedianRatio",
    "ChannelConcentration",
    "ChannelMoments",
    "ChannelsAboveSix",
    "Estimator",
    "Field",
    "FisherKurtosis",
    "GluSpikeRatio",
    "InfinityNorm",
    "Layout",
    "MassiveActivations",
    "MaxMedianRatio",
    "Measurement",
    "NeuronKurtosis",
    "NeuronKurtosisVariance",
    "NonFinite",
    "OspExcessKurtosis",
    "OutlierFeatures",
    "Output",
    "PeakMedianRatio",
    "PearsonKurtosis",
    "PooledKurtosis",
    "Reductions",
    "RotatedPearsonKurtosis",
    "SixSigmaOutliers",
    "Source",
    "State",
    "Suite",
    "SystematicOutlierTokens",
    "TokenScale",
    "TopMagnitude",
    "TweoPenalty",
    "all_estimators",
    "applies_to",
    "default_estimators",
    "describe_outputs",
    "estimator_parameters",
    "estimators_named",
    "gaussian_floor",
    "get_estimator",
    "merge_states",
    "outlier_features",
    "top_channel_overlap",
]
