"""Measure the table's rows one after the other, each in a process of its own, and write the page."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import sys
import time
from typing import Any

import torch

from benchmarks.models.cases import Case, all_cases
from benchmarks.models.measuring import Row, measure
from benchmarks.models.page import PAGE, RESULTS, headline, page, read_results

LIMIT_SECONDS = 60
MEMORY = 6 * 2**30


def main() -> int:
    """Read the command line, measure, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("names", nargs="*", help="rows to measure anew")
    parser.add_argument("--all", action="store_true", help="measure every row anew")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the page is out of date")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds for one model")
    options = parser.parse_args()
    if options.check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page(read_results()):
            return 0
        print("docs/models.md is out of date: run `python -m benchmarks.models`", file=sys.stderr)
        return 1
    cases = all_cases()
    if unknown := [name for name in options.names if name not in cases]:
        print(f"no such row: {', '.join(unknown)}", file=sys.stderr)
        return 2
    if options.all:
        RESULTS.write_text("", encoding="utf-8")
    present = read_results()
    names = options.names or [name for name in cases if name not in present]
    _prepare(cases)
    for number, name in enumerate(names, 1):
        started = time.perf_counter()
        row = in_process(cases[name], options.limit)
        with RESULTS.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
        errors = f"{row['kurtosis_error']} {row['attention_error']}"
        print(f"{number}/{len(names)} {name}: {row['state']} {row['reason'] or errors} "
              f"({time.perf_counter() - started:.0f} s)", flush=True)  # fmt: skip
    results = read_results()
    ordered = [results[name] for name in cases if name in results]
    RESULTS.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ordered), encoding="utf-8")
    PAGE.write_text(page({row["name"]: row for row in ordered}), encoding="utf-8")
    print(f"README's sentence: {headline(results)}")
    return 0


def _prepare(cases: dict[str, Case]) -> None:
    """Do once, before there are children, what every first measurement does: above all, import."""
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    measure(cases["llama"])


def in_process(case: Case, limit: float) -> dict[str, Any]:
    """A row, whatever the model does to its process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(case, sender))
    process.start()
    sender.close()
    row = Row(case.name, case.kind, case.model, "not built").as_json()
    try:
        if receiver.poll(limit):
            return receiver.recv()
        row["reason"] = f"not done within {limit:g} s"
    except EOFError:
        process.join()
        row |= {"state": "raised", "reason": f"the process of this row ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return row


def _child(case: Case, sender: Any) -> None:
    soft = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, soft))
    sender.send(measure(case).as_json())


if __name__ == "__main__":
    sys.exit(main())
