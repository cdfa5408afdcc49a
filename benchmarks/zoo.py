"""Take every classifier of torchvision, one or more of each family of timm, and 70 networks for other tasks through
pruning and all of its proofs.

    python benchmarks/zoo.py [--jobs 2 --out results/zoo.csv --names timm:resnet10t --keep same --limit-s 300]

A network a process, `jobs` of them at once; each row is written as soon as it is there, so that a run may be stopped
and taken up again. Weights are random and seeded, nothing is downloaded. Exit status 1 if any output was wrong.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
import tyro
from tqdm.auto import tqdm
from zoo_models import Case, cases
from zoo_row import COLUMNS, Row
from zoo_table import markdown

from obc_tools.errors import UnknownNameError

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        out: the table; rows that are there already may be kept.
        names: run these ("timm:resnet10t", "torchvision:resnet18") in this order; all by default.
        keep: rows to keep: those of the same code, those that passed whatever the code was, or none.
        onnx: export those networks that are marked for it (most of their time).
        jobs: networks at once, one core each.
        limit_s: seconds of computing that a network may take; a wait of four times as many ends it too.
        memory_gb: memory a network's process may take.
        table: print the table of results/README.md of the rows that are there, and run nothing.
    """

    out: Path = ROOT / "results" / "zoo.csv"
    names: tuple[str, ...] = ()
    keep: Literal["same", "passed", "none"] = "same"
    onnx: bool = True
    jobs: int = 2
    limit_s: float = 300
    memory_gb: float = 12
    table: bool = False


def code_version() -> str:
    """Return a digest of the library's sources and of the versions of the libraries that networks come from."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "obc_tools").rglob("*.py")):
        digest.update(path.read_bytes())
    digest.update(
        " ".join(version(name) for name in ("torch", "torchvision", "timm", "torch-pruning", "transformers")).encode()
    )
    return digest.hexdigest()[:10]


def _child(connection: Connection, case: Case, limit_s: float, memory_gb: float) -> None:
    memory, seconds = int(memory_gb * 2**30), int(limit_s)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    # At the hard limit the signal would be the one by which a system out of memory kills.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 60))
    torch.set_num_threads(1)
    connection.send(Row(case).fill())


def _forkserver() -> multiprocessing.context.BaseContext:
    """Return the way to start processes: from one that has imported everything and done nothing."""
    # The server finds modules by the environment's path, not by ours.
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))
    context = multiprocessing.get_context("forkserver")
    # The last for what all of its library's networks import, slowly; it may be missing.
    context.set_forkserver_preload(["zoo_row", "transformers.models.llama.modeling_llama"])
    return context


def run_case(case: Case, limit_s: float, memory_gb: float) -> dict[str, object]:
    """Return a network's row, made in a process of its own, or one that says how the process ended."""
    context = _forkserver()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, case, limit_s, memory_gb))
    process.start()
    theirs.close()
    blank = dict.fromkeys(COLUMNS, "") | {"source": case.source, "model": case.name, "reduced": case.reduced}
    try:
        if ours.poll(4 * limit_s):
            return ours.recv()
        raise EOFError
    except EOFError:
        process.join(10)
        late = process.exitcode in (None, -signal.SIGXCPU)
        reason = f"refused: time: not done after {limit_s:g} s of computing" if late else "unclear: its process died"
        return blank | {"seconds": limit_s if late else "", "ok": False, "reason": reason}
    finally:
        process.kill()
        process.join()


def run_cases(todo: Sequence[Case], options: Options) -> Iterator[dict[str, object]]:
    """Yield the rows of networks as they come, several made at once."""
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            futures = [pool.submit(run_case, case, options.limit_s, options.memory_gb) for case in todo]
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def kept_rows(table: pd.DataFrame, keep: str, code: str) -> pd.DataFrame:
    """Return the rows of an earlier table that need not be made again."""
    if keep == "none":
        return table[:0]
    return table[table["code"] == code] if keep == "same" else table[table["ok"].astype(str) == "True"]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a source: networks, those that pass everything, their share, those refused, unclear and wrong."""
    passed = table["ok"].astype(str) == "True"
    kinds = table["reason"].astype(str).str.extract(r"^(refused|unclear|WRONG)")[0]
    counts = pd.crosstab(table["source"], kinds).reindex(columns=["refused", "unclear", "WRONG"], fill_value=0)
    frame = pd.DataFrame({"networks": table.groupby("source").size(), "pass": passed.groupby(table["source"]).sum()})
    frame["share"] = (frame["pass"] / frame["networks"]).map("{:.1%}".format)
    return frame.join(counts).fillna(0)


def write(rows: Iterable[dict[str, object]], path: Path) -> pd.DataFrame:
    """Write the table, torchvision's networks first, by name; return it."""
    table = pd.DataFrame(rows, columns=[*COLUMNS, "code"])
    table = table.sort_values(["source", "model"], ascending=[False, True])
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return table


def chosen(everything: list[Case], names: tuple[str, ...]) -> list[Case]:
    """Return the networks of these names; raise ValueError for one that the zoo does not have."""
    by_name = {case.id: case for case in everything}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise UnknownNameError("network of the zoo", unknown[0], list(by_name))
    return [by_name[name] for name in names] if names else everything


def main(options: Options) -> int:
    everything, code = cases(), code_version()
    known = {(case.source, case.name) for case in everything}
    if options.table:
        print(markdown(pd.read_csv(options.out, dtype=str, keep_default_na=False), len(everything)))
        return 0
    rows = {}
    if options.out.exists():
        earlier = kept_rows(pd.read_csv(options.out, dtype=str, keep_default_na=False), options.keep, code)
        rows = {key: row for row in earlier.to_dict("records") if (key := (row["source"], row["model"])) in known}
    todo = [case for case in chosen(everything, options.names) if (case.source, case.name) not in rows]
    todo = [replace(case, onnx=case.onnx and options.onnx) for case in todo]
    for row in tqdm(run_cases(todo, options), total=len(todo), desc="zoo"):
        rows[row["source"], row["model"]] = row | {"code": code}
        write(rows.values(), options.out)
    table = write(rows.values(), options.out)
    print(summary(table).to_string())
    return int(table["reason"].astype(str).str.startswith("WRONG").any())


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
