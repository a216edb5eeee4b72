"""Questions asked of runs. Each takes runs that ``osp_diag`` wrote and returns labelled arrays.

May import ``osp_diag``; never ``figures`` or ``trainer``.
"""

if __name__ != "osp_diag.analyses":
    raise ImportError(
        f"{__file__} is osp_diag's own folder, seen because Python was started beside it; write "
        "osp_diag.analyses for ours, or start Python elsewhere for the package that is called analyses"
    )
