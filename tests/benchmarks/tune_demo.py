"""Learning rates of the demo, chosen on problems and seeds that are never reported: DPO and ALLO tuned alike.

    python tests/benchmarks/tune_demo.py OUT [--seeds 11 12] [--dpo 1e-5 2e-5] [--allo 1e-5/5e-5 2e-5/1e-4]

For each seed one ordinary demo run makes samples, mask and token scores; every setting then reuses those. `--allo`
takes forget-lr/improve-lr. Prints accuracy on each seed's own fresh problems, and the means.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train  # noqa: E402
from allo_mini.log import table  # noqa: E402


def accuracy(out: Path, argv: list[str], model: str) -> float:
    if train.main([*argv, "--out", str(out)]):
        raise SystemExit(1)
    return json.loads((out / "results.json").read_text())["results"][model]["accuracy"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    parser.add_argument("--dpo", nargs="*", default=["2e-5", "3e-5", "4e-5", "5e-5"])
    parser.add_argument("--allo", nargs="*", default=["4e-5/2e-5", "4e-5/6e-5", "8e-5/2e-5", "8e-5/6e-5"])
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further train.py flags for every run")
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    for seed in args.seeds:
        base, own = args.out / f"base-{seed}", []
        common = ["--seed", str(seed), "--test-limit", "1000", *args.more]
        if train.main(["--seed", str(seed), "--out", str(base), "--no-eval", "--method", "allo", *args.more]):
            raise SystemExit(1)
        own = ["--samples", str(base / "samples.jsonl"), "--mask", str(base / "mask.safetensors"),
               "--token-weights-file", str(base / "token_weights.jsonl")]
        for setting in args.dpo:
            out = args.out / f"dpo-{seed}-{setting}"
            found.setdefault(f"DPO  {setting}", []).append(
                accuracy(out, [*common, *own, "--dpo-lr", setting, "--method", "dpo"], "DPO"))
        for setting in args.allo:
            forget, improve = setting.split("/")
            out = args.out / f"allo-{seed}-{forget}-{improve}"
            found.setdefault(f"ALLO {setting}", []).append(
                accuracy(out, [*common, *own, "--forget-lr", forget, "--improve-lr", improve, "--method", "allo"], "ALLO"))
        rows = [[name, *(f"{100 * a:.1f}" for a in values), f"{100 * sum(values) / len(values):.1f}"]
                for name, values in found.items() if len(values) == len(found[next(iter(found))])]
        print(table(["setting", *map(str, args.seeds[:len(rows[0]) - 2]), "mean"], rows), flush=True)


if __name__ == "__main__":
    main()
