"""`morsr ablation`: train every row of a ladder for several seeds, and say which differences are real."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morsr.errors import ConfigError
from morsr.files import user_path, write_text

if TYPE_CHECKING:
    from morsr.evaluation.ablation import Ablation

HELP = "Train every row of an ablation for several seeds and compare them over seeds and images."

RECORD = "ablation.json"
PREFIX = re.compile(r"^ablation_(tiny|sd21)_")
_PLACES = ("--config=", "--trainer.logger.init_args.save_dir=")  # where things lie, not what is trained


@dataclass(frozen=True)
class Row:
    """One row of the table: its name, its config, and what it overrides."""

    name: str
    config: Path
    overrides: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name as a folder."""
        return re.sub(r"[^A-Za-z0-9._=-]+", "_", self.name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("rows", nargs="+", metavar="[NAME=]CONFIG.yaml", help="a row of the table each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: 0 to 4)")
    parser.add_argument("--out", type=user_path, default=Path("runs/ablation"), help="folder (default: %(default)s)")
    parser.add_argument("--reference", metavar="NAME", help="row that the others are compared with (default: the last)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override in all rows, repeatable"
    )
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B,…",
        help="make a row of every row and value; repeatable, all combinations are run; commas in brackets do not part",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=0, help="trainings at once (default: 1 on an accelerator, else one per core)"
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing; the table of what is finished")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace finished trainings that were made with other settings"
    )


def run(options: argparse.Namespace) -> int:
    """Train what is not finished yet, then write and print the table; 1 if a training failed."""
    rows = list(expand(parse_rows(options.rows), options.sweep, options.set))
    check_folders(rows)
    if options.jobs < 0:
        raise ConfigError(f"--jobs: expected 1 or more, or 0 for the default, got {options.jobs}")
    if len(set(options.seeds)) != len(options.seeds):
        raise ConfigError(f"--seeds: expected different numbers, got {options.seeds}")
    reference = options.reference or rows[-1].name
    if reference not in {row.name for row in rows}:
        raise ConfigError(f"--reference: no row {reference!r}; rows: {', '.join(row.name for row in rows)}")
    failed = []
    if not options.report_only:
        failed = train(rows, options.seeds, options.out, jobs=options.jobs, overwrite=options.overwrite)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    table = collect(rows, options.seeds, options.out, reference)
    files = table.save(options.out)
    print(f"\n{table.to_markdown()}\nwritten to {files['md']} and {files['json']}")
    return 1 if failed else 0


def parse_rows(given: Sequence[str]) -> list[Row]:
    """Rows from NAME=CONFIG.yaml, or CONFIG.yaml, whose name is then the file's without its prefix.

    Names and paths may hold equals signs: the file that exists decides.

    Raises:
        ConfigError: no such file, or a name twice.
    """
    rows = []
    for text in given:
        signs = [place for place, letter in enumerate(text) if letter == "="]
        splits = [("", text), *((text[:place], text[place + 1 :]) for place in reversed(signs))]
        found = [(name, Path(path)) for name, path in splits if Path(path).is_file()]
        if not found:
            raise ConfigError(f"{text.rpartition('=')[2]}: no such config; rows are [NAME=]CONFIG.yaml")
        name, config = found[0]
        rows.append(Row(name or PREFIX.sub("", config.stem), config))
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise ConfigError(f"rows: expected different names, got {', '.join(names)}")
    return rows


def expand(rows: Sequence[Row], sweeps: Sequence[str], settings: Sequence[str]) -> Iterator[Row]:
    """Every row with every combination of the swept values, and the settings that hold for all."""
    fixed = tuple(f"--{text}" for text in settings if _pair(text, "--set"))
    swept = [_pair(text, "--sweep") for text in sweeps]
    keys = [key for key, _ in swept]
    if len(set(keys)) != len(keys):
        raise ConfigError(f"--sweep: expected every key once, with all its values, got {', '.join(keys)}")
    last = [key.rsplit(".", 1)[-1] for key in keys]
    labels = [short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)]
    for row in rows:
        for values in product(*(_values(value) for _, value in swept)):
            suffix = "".join(f", {label}={value}" for label, value in zip(labels, values, strict=True))
            chosen = (f"--{key}={value}" for key, value in zip(keys, values, strict=True))
            yield Row(row.name + suffix, row.config, (*fixed, *chosen))


def check_folders(rows: Sequence[Row]) -> None:
    """Refuse rows that would share a folder, or have none of their own below --out.

    Raises:
        ConfigError: equal names, names that are equal as folders, or a name that is . or .. as a folder.
    """
    owners: dict[str, str] = {}
    for row in rows:
        other = owners.get(row.slug)
        if row.slug in (".", ".."):
            raise ConfigError(f"rows: expected a name that can be a folder's, got {row.name!r}")
        if other == row.name:
            raise ConfigError(f"rows: expected different names, got {row.name!r} twice")
        if other is not None:
            raise ConfigError(
                f"rows: {other!r} and {row.name!r} would share the folder {row.slug}; expected names that differ in "
                "A-Z, a-z, 0-9 and . _ = -"
            )
        owners[row.slug] = row.name


def _values(text: str) -> list[str]:
    """The values of a sweep: parted by the commas that stand outside brackets."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if depth < 0:
            break
        if letter == "," and not depth:
            values.append("")
        else:
            values[-1] += letter
    if depth:
        raise ConfigError(f"--sweep: expected values whose brackets close, got {text!r}")
    return values


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.removeprefix("--").partition("=")
    if not equals or not key or not value:
        raise ConfigError(f"{option}: expected KEY=VALUE, got {text!r}")
    return key, value


def train(rows: Sequence[Row], seeds: Sequence[int], out: Path, *, jobs: int, overwrite: bool = False) -> list[str]:
    """Run `morsr fit` for every row and seed that is not finished; return one line per training that failed.

    Seeds go in the outer loop, so that a table of all rows can be had early. A folder with a finished training of other
    settings fails, unless `overwrite` is set.
    """
    jobs = jobs or _jobs()
    wanted = [(row, seed) for seed, row in product(seeds, rows)]
    waiting = [(row, seed) for row, seed in wanted if not _finished(row, seed, out)]
    waiting.sort(key=lambda item: not _record(item[0], item[1], out).get("finished"))  # what is refused is told at once
    print(f"{len(wanted)} trainings, {len(wanted) - len(waiting)} finished before, {jobs} at once; logs in {out}")
    failed: list[str] = []
    processes: set[subprocess.Popen[bytes]] = set()
    pool = ThreadPoolExecutor(max_workers=jobs)
    try:
        pending: set[Future[tuple[bool, str]]] = {
            pool.submit(_train_one, row, seed, out, jobs, processes, overwrite) for row, seed in waiting
        }
        done = 0
        while pending:
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                done += 1
                good, line = future.result()
                print(f"[{done}/{len(waiting)}] {line}", flush=True)
                failed += [] if good else [line]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(processes):
            process.terminate()
        pool.shutdown()
    return failed


def _train_one(
    row: Row, seed: int, out: Path, jobs: int, processes: set[subprocess.Popen[bytes]], overwrite: bool
) -> tuple[bool, str]:
    """Train one row with one seed; whether it worked, and a line about it."""
    folder, arguments = out / row.slug / f"seed_{seed}", _arguments(row, seed, out)
    if folder.exists():
        if not (folder / RECORD).is_file():
            return False, f"{row.name}, seed {seed}: {folder} exists and holds no training of this command"
        if _record(row, seed, out).get("finished") and not overwrite:
            return False, (
                f"{row.name}, seed {seed}: {folder} holds a finished training with other settings; --overwrite "
                "replaces it, another --out keeps it"
            )
        shutil.rmtree(folder)  # cut off, or to be replaced
    settings = {"arguments": arguments, "config": _config(row)}  # as it was when the training began
    write_text(folder / RECORD, json.dumps({**settings, "finished": False}) + "\n")
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    start = time.perf_counter()
    log = folder / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "morsr", *arguments],
            stdout=stream, stderr=subprocess.STDOUT, env={"OMP_NUM_THREADS": threads, **os.environ},
        )  # fmt: skip
        processes.add(process)
        code = process.wait()
        processes.discard(process)
    seconds = time.perf_counter() - start
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return False, f"{row.name}, seed {seed}: exit code {code}; {''.join(last)} ({log})"
    record = {**settings, "finished": True, "seconds": round(seconds, 1)}
    write_text(folder / RECORD, json.dumps(record) + "\n")
    return True, f"{row.name}, seed {seed}: {seconds:.0f} s"


def _arguments(row: Row, seed: int, out: Path) -> list[str]:
    logger = {"save_dir": str(out), "name": row.slug, "version": f"seed_{seed}"}
    return [
        "fit", f"--config={row.config}", f"--seed_everything={seed}", f"--model.seed={seed}", f"--data.seed={seed}",
        *(f"--trainer.logger.init_args.{key}={value}" for key, value in logger.items()), *row.overrides,
    ]  # fmt: skip


def _record(row: Row, seed: int, out: Path) -> dict[str, Any]:
    path = out / row.slug / f"seed_{seed}" / RECORD
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


def _finished(row: Row, seed: int, out: Path) -> bool:
    """Whether this training is there, with these overrides and with the config's content as it is now."""
    record = _record(row, seed, out)
    same = _compared(record.get("arguments") or []) == _compared(_arguments(row, seed, out))
    return bool(record.get("finished")) and same and record.get("config") == _config(row)


def _compared(arguments: Sequence[str]) -> list[str]:
    """The arguments without the paths, which may be written in more than one way."""
    return [argument for argument in arguments if not argument.startswith(_PLACES)]


def _config(row: Row) -> Any:
    """The row's config with everything that it extends, as a record keeps it."""
    from morsr.training.config_files import read_config

    return json.loads(json.dumps(read_config(row.config), default=str))


def _jobs() -> int:
    """One on an accelerator, which all would share; else one per core, since small networks gain little from more."""
    import torch

    return 1 if torch.accelerator.is_available() else (os.cpu_count() or 1)


def collect(rows: Sequence[Row], seeds: Sequence[int], out: Path, reference: str) -> Ablation:
    """The table of the trainings that are finished with these settings; rows without any are left out.

    Raises:
        InputError: nothing is finished.
        ConfigError: the reference is not.
    """
    from morsr.evaluation.ablation import Ablation, read_run

    found = {}
    for row in rows:
        runs = []
        for seed in seeds:
            if _finished(row, seed, out):
                folder, seconds = out / row.slug / f"seed_{seed}", float(_record(row, seed, out)["seconds"])
                runs.append(read_run(folder, seed=seed, ranks=_ranks(folder), seconds=seconds))
        if runs:
            found[row.name] = runs
    return Ablation(found, reference)


def _ranks(folder: Path) -> int:
    """Ranks per layer by the config that the run left, where the adapters' settings may stand under init_args."""
    import yaml

    adapters = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]["adapters"]
    return int(adapters.get("init_args", adapters)["num_ranks"])
