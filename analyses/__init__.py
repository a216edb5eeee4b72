"""Questions asked of runs. Each takes runs that ``osp_diag`` wrote and returns labelled arrays.

May import ``osp_diag``; never ``figures`` or ``trainer``.
"""
