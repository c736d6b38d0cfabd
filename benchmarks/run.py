"""The weighing room: moec and other libraries on the same layer, interleaved in one run.

    python benchmarks/run.py --quick          one shape, about four minutes
    python benchmarks/run.py --full           the configuration of record: config/full.json

Every peer runs in a process of its own (serve.py) with equal threads; blocks of calls take turns,
with a pause in which pools that spin fall asleep. All use the same weights, inputs and routing.
Sets of weights rotate where one is smaller than twice the last-level cache, and inputs rotate
always. The figure is the median over blocks; a ratio is taken block by block. Roofs come from
`moec doctor`, measured before and after in the same run. A peer's output is compared with a float64
reference, so that a fast wrong answer cannot pass.

Writes results/DATE-CPU-CONFIG.json; plots.py draws it. Peers come from MOEC_PEERS=DIR, which
setup_peers.sh makes; those that are not there are reported as absent, with the line that installs
them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from layer import Layer  # noqa: E402

PEERS = {  # name: module of peers/; "moec@LEVEL" is moec held to a CPU level
    "moec": "moec_peer",
    "moec-dense": "moec_peer",
    "hf-grouped": "torch_peer",
    "hf-eager": "torch_peer",
    "torch-dense": "torch_peer",
    "vllm": "vllm_peer",
    "vllm-vec": "vllm_peer",
    "kt": "kt_peer",
    "onnxruntime": "onnx_peer",
    "ggml": "ggml_peer",
    "read": "read_peer",
}
DENSE = {"moec-dense", "torch-dense"}
LEVEL_FLOPS = {  # instructions that a level has
    "x86-64-v3": ("fma_f32_128", "fma_f32_256"),
    "x86-64-v4": ("fma_f32_128", "fma_f32_256", "fma_f32_512"),
    "avx512-bf16": ("fma_f32_128", "fma_f32_256", "fma_f32_512", "dpbf16_256", "dpbf16_512"),
}
UNCHECKED = DENSE | {"read"}
PAUSE_S = 0.05  # libgomp and onnxruntime spin for some milliseconds after a call
BLOCK_S = 0.1
CHECKED_TOKENS = 4
# Relative error (norm over norm) that arithmetic in the dtype explains; more is a wrong layer.
MOST_ERROR = {"f32": 1e-4, "bf16": 2e-2}


class Server:
    """One peer's process."""

    def __init__(self, name: str, run: dict, python: str):
        environment = dict(os.environ, OMP_NUM_THREADS=str(run["threads"]))
        self.name = name
        self.process = subprocess.Popen(
            [python, HERE / "serve.py", name, json.dumps(run | {"module": module_of(name)})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not os.environ.get("MOEC_BENCH_DEBUG") else None,
            text=True,
            env=environment,
        )

    def read(self) -> dict:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"absent": "its process ended", "install": ""}

    def ask(self, **request) -> dict:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        return self.read()

    def close(self):
        self.process.kill()
        self.process.wait()


def module_of(name: str) -> str:
    return PEERS[name.partition("@")[0]]


def quartiles(values) -> dict:
    ordered = sorted(values)
    n = len(ordered)
    return {
        "q1": ordered[n // 4],
        "median": statistics.median(ordered),
        "q3": ordered[n - 1 - n // 4],
    }


def doctor(moec: str, threads: int) -> dict:
    done = subprocess.run(
        [moec, "doctor", "--save", "-", "--threads", str(threads)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"expected constants from {moec} doctor, but got: {done.stderr.strip()}")
    return json.loads(done.stdout)


def roof_seconds(layer: Layer, inputs, tokens: int, peer: str, machine: dict) -> float:
    """The larger of reading the weights that are needed and multiplying with them."""
    names = [n for n in machine["flops"] if layer.dtype == "bf16" or n.startswith("fma_f32")]
    level = peer.partition("@")[2]
    peak = max(machine["flops"][n] for n in names if n in LEVEL_FLOPS.get(level, names))
    used = (
        layer.K if peer in DENSE else statistics.mean(len(np.unique(ids)) for _, ids, _ in inputs)
    )
    read = max(machine["read"].values())
    return max(used * layer.expert_bytes / read, layer.flops_per_token * tokens / peak)


def merge_best(first: dict, second: dict) -> dict:
    """Roofs of the run: the better of the two measurements of every rate."""
    out = dict(first)
    for key in ("flops", "flops_one", "read", "read_one"):
        out[key] = {name: max(first[key][name], second[key].get(name, 0)) for name in first[key]}
    return out


def measure(run: dict, servers: list[Server], blocks: int, log) -> list[dict]:
    layer = Layer(run)
    rows = []
    errors = check(layer, servers, log)
    for tokens in run["tokens"]:
        calls = {}
        for server in servers:
            first = server.ask(tokens=tokens, calls=1)["seconds"]
            warm = max(2, min(16, int(0.3 / max(first, 1e-6))))
            seconds = server.ask(tokens=tokens, calls=warm)["seconds"]
            calls[server.name] = max(1, math.ceil(BLOCK_S / seconds))
        times = {server.name: [] for server in servers}
        for block in range(blocks):
            for server in servers:
                time.sleep(PAUSE_S)
                n = calls[server.name]
                answer = server.ask(tokens=tokens, calls=n, first=block * n)
                times[server.name].append(answer["seconds"])
        for server in servers:
            name = server.name
            row = {key: run[key] for key in ("shape", "H", "F", "E", "K", "dtype", "routing")}
            row |= {"tokens": tokens, "peer": name, "version": server.version}
            row |= {"note": server.note, "banks": layer.banks, "blocks": blocks}
            row |= {"calls": calls[name], "error": errors.get(name)}
            row["ms"] = {k: v * 1e3 for k, v in quartiles(times[name]).items()}
            row["gflops"] = layer.flops_per_token * tokens / row["ms"]["median"] / 1e6
            if "moec" in times and name != "moec":
                pairs = zip(times[name], times["moec"], strict=True)
                row["over_moec"] = quartiles([a / b for a, b in pairs])
            rows.append(row)
            low, mid, high = (row["ms"][q] for q in ("q1", "median", "q3"))
            ratio = f", {row['over_moec']['median']:.2f} x moec" if "over_moec" in row else ""
            log(f"  T={tokens:<5} {name:12} {mid:10.3f} ms ({low:.3f}-{high:.3f}){ratio}")
    return rows


def check(layer: Layer, servers: list[Server], log) -> dict:
    """Relative errors against float64; a peer that is wrong is taken out."""
    x, ids, weights = layer.inputs(CHECKED_TOKENS)[0]
    expected = layer.reference(x, ids, weights)
    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        for server in list(servers):
            if server.name in UNCHECKED:
                continue
            path = f"{folder}/{server.name}.npy"
            answer = server.ask(tokens=CHECKED_TOKENS, check=path)
            if "done" not in answer:
                error = math.inf
            else:
                got = np.load(path).astype(np.float64)
                error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
            errors[server.name] = error
            if not error <= MOST_ERROR[layer.dtype]:
                log(f"  {server.name}: wrong result (relative error {error:.1e}), left out")
                server.close()
                servers.remove(server)
    return errors


def start(run: dict, python: str, wanted, levels, absent: list[dict], log) -> list[Server]:
    chosen = [name for name in run["peers"] if not wanted or name in wanted]
    servers, ready = [], []
    for name in chosen:
        level = name.partition("@")[2]
        if not level or level in levels:
            servers.append(Server(name, run, python))
            continue
        why = f"this processor does not run {level}"
        absent.append(
            {"peer": name, "shape": run["shape"], "dtype": run["dtype"], "why": why, "install": ""}
        )
        log(f"  {name}: absent: {why}")
    for server in servers:
        answer = server.read()
        if answer.get("ready"):
            server.version, server.note = answer["version"], answer["note"]
            ready.append(server)
            continue
        server.close()
        entry = {"peer": server.name, "shape": run["shape"], "dtype": run["dtype"]}
        absent.append(entry | {"why": answer["absent"], "install": answer["install"]})
        hint = f" (install: {answer['install']})" if answer["install"] else ""
        log(f"  {server.name}: absent: {answer['absent']}{hint}")
    return ready


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="config/quick.json")
    parser.add_argument("--full", action="store_true", help="config/full.json")
    parser.add_argument("--config", type=Path, help="another configuration file")
    parser.add_argument("--peers", help="only these, separated by commas")
    parser.add_argument("--blocks", type=int, help="blocks of calls (default: the configuration's)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--moec", default=str(HERE.parent / "build/bin/moec"), help="the driver")
    parser.add_argument("--out", type=Path, help="result file (default results/DATE-CPU.json)")
    options = parser.parse_args()
    if sum((options.quick, options.full, options.config is not None)) != 1:
        parser.error("expected one of --quick, --full and --config")
    config_path = options.config or HERE / f"config/{'quick' if options.quick else 'full'}.json"
    config = json.loads(config_path.read_text())
    wanted = set(options.peers.split(",")) if options.peers else None
    if wanted and not {name.partition("@")[0] for name in wanted} <= set(PEERS):
        parser.error(f"expected peers of {', '.join(PEERS)}, but got {options.peers}")
    venv = Path(os.environ.get("MOEC_PEERS", "/nonexistent")) / "venv/bin/python"
    python = str(venv) if venv.exists() else sys.executable
    os.environ.setdefault("MOEC_COMPILER", options.moec)

    def log(text):
        print(text, file=sys.stderr, flush=True)

    begin = time.time()
    machine = doctor(options.moec, options.threads)
    cache = machine["caches"]["l3_total"]
    rows, absent = [], []
    for run in config["runs"]:
        run = run | {"threads": options.threads}
        size = 3 * run["H"] * run["F"] * run["E"] * (4 if run["dtype"] == "f32" else 2)
        run["banks"] = max(1, math.ceil(2 * cache / size))
        log(f"{run['shape']} {run['dtype']} {run['routing']}, {run['banks']} bank(s):")
        servers = start(run, python, wanted, machine["levels"], absent, log)
        try:
            rows += measure(run, servers, options.blocks or config["blocks"], log)
        finally:
            for server in servers:
                server.close()
    after = doctor(options.moec, options.threads)
    best = merge_best(machine, after)
    for row in rows:
        layer = Layer(row)
        inputs = layer.inputs(row["tokens"])
        roof = roof_seconds(layer, inputs, row["tokens"], row["peer"], best)
        row["roof_ms"], row["roof_share"] = roof * 1e3, roof * 1e3 / row["ms"]["median"]
    date = time.strftime("%Y-%m-%d", time.gmtime(begin))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE
    ).stdout.strip()
    result = {
        "schema": 1,
        "kind": "moec-benchmarks",
        "date": date,
        "seconds": round(time.time() - begin),
        "config": config_path.stem,
        "commit": commit,
        "threads": options.threads,
        "machine": best,
        "absent": absent,
        "rows": rows,
    }
    cpu = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    out = options.out or HERE / f"results/{date}-{cpu}-{config_path.stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rounded(result), indent=1) + "\n")
    log(f"wrote {out}")
    return 0


def rounded(value):
    """Four digits: the fifth of a time means nothing."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
