"""Every attribute that the CPU computes, on a GPU that is none: the layers of test_attributes.py on
the SIMT executor, against float64.
"""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import oracle
import pytest
import sizes
from conftest import driver, moec_command
from gpu_layers import bf16_bits, from_bf16
from moec.reference import reference
from test_attributes import CHANGES, E, H, bound, clear_tokens, source, spec_of, weights_of

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build")) / "bin" / "moe-simt"

# One small tile a level: what differs between tiles is tested in test_gpu_simt.py and
# test_gpu_wgmma.py.
TILES = {
    "sm_80": "cols = 64, rows = 8, k = 32, stages = 2, warps_cols = 2, warps_rows = 1",
    "sm_90a": "cols = 128, rows = 8, k = 64, stages = 2, warps_cols = 8, warps_rows = 1, "
    "unit = wgmma",
}
both_levels = pytest.mark.parametrize("gpu", TILES)
T = 23
# Routers that round as their model's own code does in bf16: where.
ROUNDED = {
    "sigmoid": "model_dtype",
    "deepseek_v3": "upcast_logits",
    "logit_softcap": "model_dtype",
    "router_x": "upcast_logits",
    "sparse_mixer": "model_dtype",
}


def compile_layers(specs, weights, folder):
    """The IR of layers as imported; {name of a layer: numbers of its functions, roles}."""
    layers = [
        {**s, "weights": {role: source(s, role) for role in weights[s["name"]]}} for s in specs
    ]
    spec = {"schema": 1, "name": "attributes", "dtype": "bf16", "layers": layers}
    path = sizes.write(folder, spec, weights)
    moec_command(
        "compile", path, "--checkpoint", "none", "--compile-to", "import", "-o", folder / "ir.mlir"
    )
    text = (folder / "ir.mlir").read_text()
    entries = {}
    for line in text.splitlines():
        if found := re.match(
            r'\s*moe\.layer @\w+ "([^"]+)".* forward = @f(\d+).* weights\((.*)\)', line
        ):
            roles = re.findall(r"@\w+\.(\w+)|@\w+::@(\w+)", found[3])
            entries[found[1]] = int(found[2]), [a or b for a, b in roles]
    return folder / "ir.mlir", entries


class Layers:
    def __init__(self, folder):
        driver()
        self.specs = {name: spec_of(name, i) for i, name in enumerate(CHANGES)}
        for name, arithmetic in ROUNDED.items():
            spec = {**self.specs[name], "name": f"{name}_rounded", "index": len(self.specs)}
            rounds = {"precision": "model", "model_arithmetic": arithmetic}
            spec["router"] = {**spec["router"], **rounds}
            self.specs[spec["name"]] = spec
        self.weights = {name: weights_of(s, "bf16") for name, s in self.specs.items()}
        self.ir, self.entries = compile_layers(self.specs.values(), self.weights, folder)


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    return Layers(tmp_path_factory.mktemp("gpu_attributes"))


def stored(weight, role):
    """As [experts, parts, rows, columns] of floats: all that moe-simt asks for is the order."""
    return oracle.wide(weight).astype(np.float32)


def run(
    layers,
    name,
    entry,
    folder,
    *options,
    gpu="sm_80",
    given=None,
    x=None,
    router_x=None,
    start=None,
):
    """One call; what it wrote."""
    number, roles = layers.entries[name]
    spec = layers.specs[name]
    slots = spec["K"] if given is None else given[0].shape[1]
    for i, role in enumerate(roles):
        stored(layers.weights[name][role], role).tofile(folder / f"w{i}.bin")
    for file, values in {"x": x, "router_x": router_x, "y": start}.items():
        if values is not None:
            bf16_bits(oracle.wide(values)).tofile(folder / f"{file}.bin")
    if given is not None:
        given[0].astype(np.int32).tofile(folder / "experts.bin")
        given[1].astype(np.float32).tofile(folder / "weights.bin")
    command = [TOOL, layers.ir, f"--function={entry}{number}", f"--gpu={gpu}"]
    command += [f"--tiles=[#moe.gpu_tile<{TILES[gpu]}>]", *options]
    command += ["--accumulate"] * (start is not None) + [f"{folder}:{len(x)}:{slots}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{name}: {done.stderr}"

    def read(file, dtype, width):
        return np.fromfile(folder / f"{file}.out", dtype).reshape(len(x), width)

    out = {
        "experts": read("experts", np.int32, slots),
        "weights": read("weights", np.float32, slots),
    }
    if entry == "r":
        out["logits"] = read("logits", np.float32, E)
    else:
        out["y"] = from_bf16(read("y", np.uint16, H)).reshape(len(x), H)
    return out


def inputs(spec):
    x = oracle.tokens(T, H, "bf16")
    extra = {}
    if spec["router"].get("router_x"):
        extra["router_x"] = oracle.tokens(T, H, "bf16", seed=4)
    return x, extra


def check_routing(out, routing, clear, name):
    order, exact_order = np.argsort(out["experts"], -1), np.argsort(routing.experts, -1)
    ids = np.take_along_axis(out["experts"], order, -1)[clear]
    exact = np.take_along_axis(routing.experts, exact_order, -1)[clear]
    np.testing.assert_array_equal(ids, exact, name)
    got = np.take_along_axis(out["weights"], order, -1)[clear]
    exact = np.take_along_axis(routing.weights, exact_order, -1)[clear]
    np.testing.assert_allclose(got, exact, rtol=2e-5, atol=1e-7, err_msg=name)


@both_levels
@pytest.mark.parametrize("name", CHANGES)
def test_forward(name, gpu, layers, tmp_path):
    spec = layers.specs[name]
    ref = reference(spec, layers.weights[name])
    x, extra = inputs(spec)
    out = run(layers, name, "f", tmp_path, "--order=shuffled:3", gpu=gpu, x=x, **extra)
    routing = ref.routing(extra.get("router_x", x))
    clear = clear_tokens(routing)
    assert clear.mean() > 0.8
    check_routing(out, routing, clear, name)
    error = oracle.relative(out["y"][clear], ref(x, **extra)[clear])
    assert error <= bound("bf16"), error


SUMS = [name for name, change in CHANGES.items() if "combine" in change]


@both_levels
@pytest.mark.parametrize("name", SUMS)
def test_experts_given(name, gpu, layers, tmp_path):
    """With ids that are missing, the routed sum alone, added to something; then the whole."""
    spec = layers.specs[name]
    ref = reference(spec, layers.weights[name])
    x, start = oracle.tokens(T, H, "bf16"), oracle.tokens(T, H, "bf16", seed=3)
    rng = np.random.default_rng(1)
    given = rng.integers(-1, E, (T, 4)), rng.random((T, 4)).astype(np.float32)
    out = run(layers, name, "e", tmp_path, "--routed-only", gpu=gpu, x=x, given=given, start=start)
    exact = oracle.wide(start) + ref.experts(x, *given)
    assert oracle.relative(out["y"], exact) <= bound("bf16")


ROUTERS = ["logit_bias", "logit_softcap", "rms_norm", "router_x"]


@pytest.mark.parametrize("name", ROUTERS)
def test_route(name, layers, tmp_path):
    """Logits are those before the transform."""
    spec = layers.specs[name]
    ref = reference(spec, layers.weights[name])
    x, extra = inputs(spec)
    out = run(layers, name, "r", tmp_path, "--padding=3", "--shift=1", x=x, **extra)
    routing = ref.routing(extra.get("router_x", x))
    check_routing(out, routing, clear_tokens(routing), name)
    np.testing.assert_allclose(out["logits"], routing.logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_routers(name, layers, tmp_path):
    """router.precision = model. A sum that lies between two bf16 may round to either."""
    name = f"{name}_rounded"
    spec = layers.specs[name]
    x, extra = inputs(spec)
    out = run(layers, name, "f", tmp_path, x=x, **extra)
    ref = reference(spec, layers.weights[name], rounding="bf16")
    routing = ref.routing(extra.get("router_x", x))
    same = (out["experts"] == routing.experts).all(1)
    assert same.mean() > 0.7
    np.testing.assert_allclose(out["weights"][same], routing.weights[same], rtol=2.0**-6)
    np.testing.assert_array_equal(from_bf16(bf16_bits(out["weights"])), out["weights"])


@both_levels
@pytest.mark.parametrize("name", ["plain", "deepseek_v3", "llama4", "shared_scaled"])
def test_atomic(name, gpu, layers, tmp_path):
    """gpu_combine = "atomic": the same sums in whatever order blocks come."""
    spec = layers.specs[name]
    ref = reference(spec, layers.weights[name])
    x, extra = inputs(spec)
    clear = clear_tokens(ref.routing(x))
    for order in ("forward", "reverse"):
        out = run(layers, name, "f", tmp_path, "--atomic", f"--order={order}", gpu=gpu, x=x)
        assert oracle.relative(out["y"][clear], ref(x, **extra)[clear]) <= bound("bf16")
