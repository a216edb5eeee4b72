"""OSP pre-training: models, optimizers and data that grow outliers, or don't.

May import ``osp_diag``; never ``analyses`` or ``figures``.
"""

if __name__ != "osp_diag.trainer":
    raise ImportError(
        f"{__file__} is osp_diag's own folder, seen because Python was started beside it; write "
        "osp_diag.trainer for ours, or start Python elsewhere for the package that is called trainer"
    )
