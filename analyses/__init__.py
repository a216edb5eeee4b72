"""Questions asked of runs. Each takes runs that ``osp_diag`` wrote and returns labelled arrays.

May import the library; never a model, ``osp_diag.figures`` or ``osp_diag.trainer``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from osp_diag.lazy import lazy_names

if TYPE_CHECKING:
    from osp_diag.analyses.ablation import ablation_table
    from osp_diag.analyses.channels.comparison import compare_channels
    from osp_diag.analyses.channels.hot import hot_channels
    from osp_diag.analyses.diagnosis.diagnose import diagnose
    from osp_diag.analyses.emergence.history import trace_emergence
    from osp_diag.analyses.few_bits import comparable_results, perplexity_at
    from osp_diag.analyses.sinks.implementation import sink_emergence, sink_implementation
    from osp_diag.analyses.summary.protocol_comparison import compare_protocols
    from osp_diag.analyses.summary.summary import summarise
    from osp_diag.analyses.summary.verdict import verdict

if __name__ != "osp_diag.analyses":
    raise ImportError(
        f"{__file__} is osp_diag's own folder, seen because Python was started beside it; write "
        "osp_diag.analyses for ours, or start Python elsewhere for the package that is called analyses"
    )

__all__ = [
    "ablation_table",
    "comparable_results",
    "compare_channels",
    "compare_protocols",
    "diagnose",
    "hot_channels",
    "perplexity_at",
    "sink_emergence",
    "sink_implementation",
    "summarise",
    "trace_emergence",
    "verdict",
]

# None is called like a module here: the import of the module would take the name.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ablation_table": "osp_diag.analyses.ablation",
        "comparable_results": "osp_diag.analyses.few_bits",
        "compare_channels": "osp_diag.analyses.channels.comparison",
        "compare_protocols": "osp_diag.analyses.summary.protocol_comparison",
        "diagnose": "osp_diag.analyses.diagnosis.diagnose",
        "trace_emergence": "osp_diag.analyses.emergence.history",
        "hot_channels": "osp_diag.analyses.channels.hot",
        "perplexity_at": "osp_diag.analyses.few_bits",
        "sink_emergence": "osp_diag.analyses.sinks.implementation",
        "sink_implementation": "osp_diag.analyses.sinks.implementation",
        "summarise": "osp_diag.analyses.summary.summary",
        "verdict": "osp_diag.analyses.summary.verdict",
    },
)
