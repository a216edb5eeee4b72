"""OSP pre-training: models, optimizers and data that grow outliers, or don't.

May import ``osp_diag``; never ``analyses`` or ``figures``.
"""
