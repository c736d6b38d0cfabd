"""Rows per expert around every block size of every level, and skewed routing.

Every output starts as NaN. A token's result must be close to float64 in its own row (a block whose
last rows are skipped would hardly move the norm of the whole), and equal in bits to what the token
gets alone, where every expert has one row.
"""

import numpy as np
import oracle
import pytest
import sizes
import torch
from conftest import driver, moec_command
from oracle import poisoned, wide

# Around 1, 14, 16, 32, 64 and 128 rows: blocks, tiles, and the chunks of a wide layer.
ROWS = (1, 15, 16, 17, 31, 32, 33, 48, 64, 65, 127, 128, 129)
E = len(ROWS) + 1  # the last expert gets nothing
# H and F of whole panels, and of neither whole panels nor whole vectors.
SHAPES = ((64, 96), (72, 41))
BOUND = {"f32": 1e-5, "bf16": 0.03}  # relative error of one row


@pytest.fixture(scope="module", params=sizes.DTYPES)
def layers(request, tmp_path_factory):
    """(dtype, folder of the compiled layers, reference of each)."""
    driver()
    dtype, folder = request.param, tmp_path_factory.mktemp(f"rows-{request.param}")
    specs = [
        sizes.layer_spec((h, f, E, 1, "silu", 0), f"moe{i}", i) for i, (h, f) in enumerate(SHAPES)
    ]
    weights = {s["name"]: sizes.make_weights(s, dtype, i) for i, s in enumerate(specs)}
    spec = sizes.write(folder, sizes.model_spec(specs, dtype), weights)
    out = folder / "out.moec"
    moec_command("compile", spec, "--checkpoint", folder / "checkpoint", "-o", out, "--quiet")
    blocks = [oracle.block_of(s, weights[s["name"]]) for s in specs]
    return dtype, out, [block.reference() for block in blocks]


def experts(layers, level, ids, threads=2):
    """Checks every layer on tokens whose experts are `ids` [T, k]."""
    import moec

    dtype, path, references = layers
    library = moec.load(path, cpu_level=level, threads=threads, max_tokens=len(ids))
    for layer, reference in zip(library.layers, references, strict=True):
        assert layer.info.level == level
        x = oracle.tokens(len(ids), layer.info.H, dtype)
        w = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) + 0.25
        y = layer.experts(x, ids, w, out=poisoned(x.shape, x.dtype))
        exact = np.asarray(reference.experts(x, ids, w))
        error = np.linalg.norm(wide(y) - exact, axis=1) / np.linalg.norm(exact, axis=1)
        worst = int(np.nanargmax(np.where(np.isnan(error), np.inf, error)))
        assert error[worst] < BOUND[dtype], (
            f"H={layer.info.H}: token {worst} of expert {ids[worst].tolist()}: {error[worst]}"
        )
        for t in {*range(0, len(ids), 37), len(ids) - 1}:
            alone = layer.experts(x[t : t + 1], ids[t : t + 1], w[t : t + 1])
            assert torch.equal(alone[0], y[t]), f"H={layer.info.H}: token {t} alone"


def test_every_number_of_rows(layers, level):
    ids = torch.repeat_interleave(torch.arange(len(ROWS)), torch.tensor(ROWS))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    experts(layers, level, ids[:, None].int())


@pytest.mark.parametrize("skew", ["one-expert", "zipf", "half-empty"])
def test_skew(layers, level, skew):
    """Two experts a token; shares of the experts from all of the rows to none."""
    random = np.random.default_rng(0)
    shares = {
        "one-expert": np.eye(E)[3] + 1e-9,
        "zipf": 1 / np.arange(1, E + 1) ** 1.2,
        "half-empty": (np.arange(E) % 2) + 1e-9,
    }[skew]
    # Gumbel noise on the logarithms: the two best are drawn without replacement.
    keys = np.log(shares) + random.gumbel(size=(300, E))
    ids = np.argsort(-keys, axis=1)[:, :2].astype(np.int32)
    counts = np.bincount(ids.ravel(), minlength=E)
    assert counts.max() == 300 if skew == "one-expert" else counts.max() > 60
    experts(layers, level, torch.from_numpy(ids))
