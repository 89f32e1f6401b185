"""python -m amos_dist info: what was built, and if something is missing, why."""

from __future__ import annotations

import argparse
import json
import platform

from .ops import build_info


def info(as_json: bool) -> None:
    facts = build_info()
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    archs = ", ".join(facts["cuda_archs"]) or f"none: {facts['cuda_reason']}"
    print(f"amos_dist {facts['version']}, Python {platform.python_version()}, torch {facts['torch']}")
    if not facts["extension"]:
        print(f"extension     missing: {facts['reason']}; the slower pure-torch step is used")
        print("              install it with: pip install --no-build-isolation .")
        return
    print(f"extension     built against torch {facts['torch_built']}")
    print(f"CPU kernels   {facts['cpu_instruction_set']} (built: {', '.join(facts['cpu_instruction_sets'])})")
    print(f"CUDA kernels  {archs}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m amos_dist", description="The Amos optimizer.")
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("info", help="what was built, and if something is missing, why")
    shown.add_argument("--json", action="store_true", help="for programs")
    bench = commands.add_parser("bench", help="CPU or GPU time of one step, beside torch's own optimizers")
    bench.add_argument("--model", default="gpt2", choices=("gpt2", "tiny"), help="whose shapes")
    bench.add_argument("--repeat", type=int, default=5)
    bench.add_argument("--device", default=None, help="cpu or cuda; default: cuda if there is one")
    arguments = parser.parse_args()
    if arguments.command == "info":
        info(arguments.json)
    else:
        from .bench import main as run_bench

        run_bench(arguments.model, arguments.repeat, arguments.device)


if __name__ == "__main__":
    main()
