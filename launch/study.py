"""Amos beside tuned AdamW and others, on small tasks, by one plan: docs/quality.md.

`python launch/study.py`: goes on where it stopped, then writes the page's tables and figures. `--quick`: 15 minutes.
"""

import argparse
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import study_report
from study_plan import ENTRIES, Study
from study_runs import Store, Workers, alone, devices, worker
from study_tasks import TASKS, corpus, prepare

ROOT = Path(__file__).resolve().parent.parent
STANDARD, QUICK = ROOT / "docs" / "quality", ROOT / "out" / "quality_quick"
HOURS = 6.0
QUICK_MINUTES, QUICK_STEPS = 15.0, 4  # a quick study has so many times fewer steps
QUICK_ENTRIES = ("amos_rule", "adamw_tuned", "adamw", "amos_int8")
REPORT_EVERY = 20  # runs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a quarter of the steps, few optimizers, small models; about 15 minutes")
    add("--hours", type=float, metavar="H", help=f"start no run after that many ({HOURS:g}; {QUICK_MINUTES:g} minutes)")
    add("--out", type=Path, help="folder of the data and figures (docs/quality; out/quality_quick)")
    add("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)}")
    add("--entries", nargs="+", choices=ENTRIES, metavar="ENTRY", help=f"of {', '.join(ENTRIES)}")
    add("--steps", type=int, metavar="N", help="of every task, in place of its own: other runs, in another --out")
    add("--data", type=Path, help="folder with train.npy and validation.npy, bytes (made from Python's sources)")
    add("--workers", type=int, metavar="N", help="processes on the CPU, of one thread each (2)")
    add("--report", action="store_true", help="run nothing: tables and figures from the data that is there")
    add("--plan", action="store_true", help="run nothing: say what is missing")
    add("--worker", metavar="DEVICE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = (args.out or (QUICK if args.quick else STANDARD)).resolve()
    if args.out == STANDARD and (args.quick or args.steps or args.data) and not args.worker:
        parser.error("--quick, --steps and --data make other runs than those of docs/quality. Give another --out")
    if args.hours is not None and not args.hours > 0:
        parser.error("--hours is a number above 0")
    return args


def study_of(args: argparse.Namespace, store: Store) -> Study:
    entries = args.entries or (QUICK_ENTRIES if args.quick else list(ENTRIES))
    chosen = [TASKS[name] for name in args.tasks or TASKS]
    if args.quick and not args.tasks:
        chosen = [task for task in chosen if not task.if_named]
    shorter = {task.name: args.steps or task.steps // (QUICK_STEPS if args.quick else 1) for task in chosen}
    tasks = [
        replace(task, steps=shorter[task.name], seconds=task.seconds * shorter[task.name] / task.steps)
        for task in chosen
    ]
    return Study(tasks, [ENTRIES[name] for name in entries], store.runs)


def main() -> int:
    args = arguments()
    if args.worker:
        worker(args.worker, args.data)
        return 0
    for asked in (signal.SIGINT, signal.SIGTERM):  # nohup and & would have the first ignored
        signal.signal(asked, signal.default_int_handler)
    # The page beside docs/quality is written by hand but for its tables; elsewhere the tables are a file of their own.
    page = ROOT / "docs" / "quality.md" if args.out == STANDARD else args.out / "tables.md"
    hours = args.hours or (QUICK_MINUTES / 60 if args.quick else HOURS)
    try:
        with nullcontext() if args.report or args.plan else alone(args.out):
            store = Store(args.out / "runs")
            study = study_of(args, store)
            places = devices(args.workers)
            left = sum(study.left(*pair) for pair in study.pairs())
            print(
                f"{study.planned()} runs, {left} to go; all of them take about {study.seconds() / 3600:.1f} hours of a "
                f"core, {study.seconds() / 3600 / len(places):.1f} on {len(places)} workers. At most {hours:.2g} hours "
                f"now.\nData and figures: {args.out}",
                flush=True,
            )
            if args.plan:
                print(study_report.progress(study))
                return 0
            try:
                failed = {} if args.report else execute(study, store, places, hours, page, args.data or corpus())
            finally:  # whatever ends it
                study_report.write(study, page, args.out)
    except ValueError as wrong:
        sys.exit(f"error: {wrong}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on from here. Tables so far: {page}")
    for key, error in failed.items():
        print(f"failed: {key}\n{error}", file=sys.stderr)
    print(f"tables: {page}")
    return 1 if failed else 0


def execute(study: Study, store: Store, places: list[str], hours: float, page: Path, text: Path) -> dict[str, str]:
    """Runs what is missing, and brings the page up to date now and then. Returns what failed."""
    prepare(text, study.tasks)
    count = len(store.runs)

    def each() -> None:
        if (len(store.runs) - count) % REPORT_EVERY == 0:
            study_report.write(study, page, store.folder.parent)

    return Workers(study, store, places, text, time.monotonic() + 3600 * hours, each).run_all()


if __name__ == "__main__":
    sys.exit(main())
