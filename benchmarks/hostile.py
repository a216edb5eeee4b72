"""Hostile and damaged files by the thousand: what survives, by format.

    python -m benchmarks.hostile --cases 1000 --seed 0
    python -m benchmarks.hostile --only gguf --case 17 --seed 0     # one case again, with what it says

Each case damages a copy of a small whole file (a byte, an entry of its JSON, a pipe or a link in its place)
and hands it to the verbs that read it, in a process of its own. It survives if the command ends by itself
with exit code 0, 1 or 2, says nothing of a defect, a traceback or a panic, sends no escape sequence, and
takes less than 60 s and 1 GB beyond what the imports have.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, BYTES = 60, 10**9
UNSAID = ("osp-diag: unexpected", "defect of osp-diag", "Traceback", "panicked", "\x1b", "Segmentation")
"""What no message may contain."""


@dataclass(frozen=True)
class Format:
    """A kind of file: how a whole one is made, how it is damaged, and what reads it."""

    make: Callable[[Path], Any]
    damage: Callable[[Path, random.Random], None]
    commands: Callable[[Path], list[list[str]]]


# Making whole files. Imports are in the functions: the parent of all cases starts no thread.


def _make_checkpoint(folder: Path) -> None:
    from tests.tiny_checkpoints import byte_tokenizer, llama, save

    save(llama(), folder / "model", byte_tokenizer())


def _make_pickle(folder: Path) -> None:
    import torch

    from tests.tiny_checkpoints import llama, save

    model = llama()
    save(model, folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "model" / "pytorch_model.bin")


def _make_gguf(folder: Path) -> None:
    from tests.hostile_files import gguf_file

    gguf_file(folder / "model.gguf")


def _make_run(folder: Path) -> None:
    from tests.growing_runs import grown_run

    grown_run(folder / "run.zarr")


def _make_packed(folder: Path) -> None:
    from osp_diag.runs.packed import pack

    _make_run(folder)
    pack(folder / "run.zarr", folder / "run.zip")
    shutil.rmtree(folder / "run.zarr")


def _make_training(folder: Path) -> None:
    from osp_diag.trainer.loop import train
    from tests.training_runs import minute

    train(minute(steps=1, probe__sites=("residual_post",), checkpoint__every=0), folder / "run.zarr")


def _make_text(folder: Path) -> None:
    import gzip
    import json

    lines = [
        json.dumps({"text": f"Document {number}: " + "some words in a row. " * 20}) for number in range(50)
    ]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    with gzip.open(folder / "text.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")


# Damaging them


def _damage_file(path: Path, dice: random.Random, special: float = 0.0) -> None:
    from tests.hostile_files import damage_bytes, damage_json, replace_by_special

    if dice.random() < special:
        replace_by_special(path, dice)
    elif path.suffix == ".json" and dice.random() < 0.7:
        path.write_text(damage_json(path.read_text(), dice), errors="surrogatepass")
    else:
        path.write_bytes(damage_bytes(path.read_bytes(), dice))


def damage_one_of(*patterns: str, special: float = 0.0) -> Callable[[Path, random.Random], None]:
    """Damage one of the files that match, each pattern as often as another."""

    def damage(folder: Path, dice: random.Random) -> None:
        files = sorted(file for file in folder.glob(dice.choice(patterns)) if file.is_file())
        _damage_file(dice.choice(files), dice, special)

    return damage


def damage_header(folder: Path, dice: random.Random) -> None:
    """The header of a safetensors file: its JSON, whose length goes before it."""
    from tests.hostile_files import damage_bytes, damage_json

    path = folder / "model" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if dice.random() < 0.6:
        header = damage_json(header.decode(), dice).encode(errors="surrogatepass")
    else:
        header = damage_bytes(header, dice)
    announced = len(header) if dice.random() < 0.9 else dice.choice([0, 2**63, 10**9, length])
    path.write_bytes(announced.to_bytes(8, "little") + header + data[8 + length :])


def damage_packed(folder: Path, dice: random.Random) -> None:
    """The zip itself, or a file in it that is damaged and zipped anew, perhaps as a bomb."""
    from tests.hostile_files import damage_bytes, damage_json

    path = folder / "run.zip"
    if dice.random() < 0.4:
        path.write_bytes(damage_bytes(path.read_bytes(), dice))
        return
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = dice.choice(["zarr.json", *entries])
    if dice.random() < 0.2:
        entries[dice.choice([name, "../mine", "/etc/mine", "a\\b"])] = bytes(10**8)
    elif name == "zarr.json":
        entries[name] = damage_json(entries[name].decode(), dice).encode(errors="surrogatepass")
    else:
        entries[name] = damage_bytes(entries[name], dice)
    kind = dice.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def damage_text(folder: Path, dice: random.Random) -> None:
    """Lines of JSON, or the gzip around them, perhaps of a bomb."""
    import gzip

    path = folder / dice.choice(["text.jsonl", "text.jsonl.gz"])
    if path.suffix == ".gz" and dice.random() < 0.3:
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(64):
                file.write(b"a" * 2**22)
    else:
        _damage_file(path, dice)
    for other in set(folder.iterdir()) - {path}:
        other.unlink()


# Reading them


def _probing(name: str) -> Callable[[Path], list[list[str]]]:
    def commands(folder: Path) -> list[list[str]]:
        options = ["--tokens", "64", "--seq-len", "32", "--batch-size", "2", "--overwrite"]
        return [["probe", str(folder / name), "--out", str(folder / "probed.zarr"), *options]]

    return commands


def _reading_run(folder: Path) -> list[list[str]]:
    run = str(folder / "run.zarr")
    return [["watch", run, "--once"], ["report", run, "--out", str(folder / "report.html")]]


def _reading_packed(folder: Path) -> list[list[str]]:
    file = str(folder / "run.zip")
    return [
        ["report", file, "--out", str(folder / "report.html")],
        ["pack", file, "--unpack", "--out", str(folder / "again.zarr")],
    ]


def _exporting(folder: Path) -> list[list[str]]:
    return [["export", str(folder / "run.zarr"), "--out", str(folder / "model")]]


def _training(folder: Path) -> list[list[str]]:
    file = next(folder.glob("text.*"))
    changes = ["steps=1", "batch_size=2", "data.source=jsonl", f"data.path={file}", "checkpoint.every=0"]
    options = [word for change in changes for word in ("--set", change)]
    return [["train", "tiny", "--out", str(folder / "trained.zarr"), *options]]


FORMATS: dict[str, Format] = {
    "config": Format(_make_checkpoint, damage_one_of("model/config.json"), _probing("model")),
    "tokenizer": Format(
        _make_checkpoint,
        damage_one_of("model/tokenizer.json", "model/tokenizer_config.json"),
        _probing("model"),
    ),
    "safetensors": Format(_make_checkpoint, damage_header, _probing("model")),
    "pickle": Format(_make_pickle, damage_one_of("model/pytorch_model.bin"), _probing("model")),
    "gguf": Format(_make_gguf, damage_one_of("model.gguf"), _probing("model.gguf")),
    "run": Format(_make_run, damage_one_of("run.zarr/zarr.json", special=0.05), _reading_run),
    "chunk": Format(
        _make_run, damage_one_of("run.zarr/**/c.*", "run.zarr/*/c.0", special=0.15), _reading_run
    ),
    "packed": Format(_make_packed, damage_packed, _reading_packed),
    "training": Format(
        _make_training,
        damage_one_of("*/step-*/.metadata", "*/step-*/state.json", "*/step-*/*.distcp", special=0.1),
        _exporting,
    ),
    "text": Format(_make_text, damage_text, _training),
}


# One case


def run_case(name: str, base: Path, number: int, seed: int, told: Path) -> int:
    """Damage a copy of the whole file and read it; the process of the case."""
    dice = random.Random(f"{name} {number} {seed}")
    form = FORMATS[name]
    with tempfile.TemporaryDirectory(dir=base.parent) as place:
        folder = Path(place) / "case"
        shutil.copytree(base, folder)
        form.damage(folder, dice)
        os.environ["OSP_DIAG_CACHE"] = str(Path(place) / "cache")
        from osp_diag.cli.main import main

        with told.open("w", errors="backslashreplace") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                codes = []
                for words in form.commands(folder):
                    print("$", words[0], flush=True)
                    codes.append(main(words))
    return 0 if set(codes) <= {0, 1, 2} else 3


def in_a_process(function: Callable[[], int | None], seconds: float) -> tuple[str, float, int]:
    """How a forked process that calls the function ended ("" is well), its seconds, and its largest RSS."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 99
        try:
            code = function() or 0
        except BaseException as error:
            print(f"Traceback of {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ended = ""
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > seconds:
            ended = f"took more than {seconds:.0f} s"
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(status)
    if not ended and code:
        ended = f"ended with {'signal' if code < 0 else 'exit code'} {abs(code)}"
    return ended, time.monotonic() - started, usage.ru_maxrss * 1024


def judged(name: str, base: Path, number: int, seed: int, told: Path, resident: int) -> str:
    """Why a case did not survive; empty if it did."""
    told.unlink(missing_ok=True)
    ended, _, largest = in_a_process(lambda: run_case(name, base, number, seed, told), SECONDS)
    text = told.read_text(errors="replace") if told.exists() else ""
    said = next((word for word in UNSAID if word in text), None)
    if ended or said is not None:
        lines = [line for line in text.splitlines() if said is None or said in line or "osp-diag:" in line]
        return f"{ended or f'says {said!r}'}: {' | '.join(lines)[:240]}"
    if largest - resident > BYTES:
        return f"took {(largest - resident) / 1e9:.1f} GB"
    return ""


def main() -> int:
    """Try the cases and print how many survived, by format."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="in all, each format as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=FORMATS, action="append")
    parser.add_argument("--case", type=int, help="this one alone, with what it says")
    options = parser.parse_args()
    names = options.only or list(FORMATS)
    _import_everything()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tried = survived = 0
    print(f"{'format':<12} {'tried':>6} {'survived':>9} {'seconds':>8}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            base, told = Path(place) / name, Path(place) / "told"
            base.mkdir()
            ended, _, _ = in_a_process(lambda base=base, name=name: FORMATS[name].make(base), 120)
            if ended:
                raise SystemExit(f"the whole file of {name} could not be made: it {ended}")
            started, failures = time.monotonic(), []
            each = -(-options.cases // len(names))
            numbers = range(each) if options.case is None else [options.case]
            for number in numbers:
                problem = judged(name, base, number, options.seed, told, resident)
                failures += [f"  {name} --case {number}: {problem}"] if problem else []
            seconds = time.monotonic() - started
            print(
                f"{name:<12} {len(numbers):>6} {len(numbers) - len(failures):>9} {seconds:>8.0f}", flush=True
            )
            print(*failures, sep="\n", end="\n" if failures else "", flush=True)
            tried, survived = tried + len(numbers), survived + len(numbers) - len(failures)
            if options.case is not None:
                print(told.read_text(errors="backslashreplace"))
    print(f"{'all':<12} {tried:>6} {survived:>9}")
    return int(survived < tried)


def _import_everything() -> None:
    """What every case would import anew, but for what starts threads."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_OFFLINE"] = "1"
    import importlib

    modules = (
        "osp_diag.cli.main", "osp_diag.cli.options", "osp_diag.cli.probe", "osp_diag.cli.train",
        "osp_diag.cli.report", "osp_diag.cli.watch", "osp_diag.cli.export", "osp_diag.probing.checkpoint",
        "osp_diag.checkpoints.pretrained", "osp_diag.checkpoints.gguf", "osp_diag.trainer.loop",
        "osp_diag.trainer.exporting", "osp_diag.figures.report", "tests.tiny_checkpoints",
        "tests.growing_runs", "tests.training_runs", "transformers.models.llama.modeling_llama",
        "zarr", "xarray", "gguf",
    )  # fmt: skip
    for module in modules:
        importlib.import_module(module)


if __name__ == "__main__":
    sys.exit(main())
