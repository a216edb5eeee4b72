"""When outliers rose, where, who wrote them, why, and what to do.

Judged from a run and from what its laboratory (:mod:`osp_diag.laboratory`) answers.
"""
