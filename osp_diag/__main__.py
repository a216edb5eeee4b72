"""``python -m osp_diag`` is the command ``osp-diag``; ``torchrun … -m osp_diag`` needs this form."""

from __future__ import annotations

import sys

from osp_diag.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
