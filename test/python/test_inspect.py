"""The notebook form of usage files: the same picture as the driver's, the same refusals."""

import os
import subprocess
import sys
from pathlib import Path

import moec
import numpy as np
import pytest
from moec.inspect import read_usage

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(os.environ.get("MOE_BUILD_DIR", ROOT / "build")) / "bin/moec"


@pytest.fixture
def usage_file(tmp_path):
    path = tmp_path / "usage.safetensors"
    script = ROOT / "test/Tools/moec/Inputs/usage.py"
    subprocess.run([sys.executable, script, path], check=True)
    return path


def test_values(usage_file):
    usage = read_usage(usage_file)
    assert usage.model == "tiny"
    assert [layer.layer for layer in usage.layers] == ["model.layers.2.mlp", "model.layers.10.mlp"]
    even, one = usage.layers
    assert even.counts.tolist() == [2, 2, 2, 2]
    assert np.isclose(even.entropy, 1) and even.imbalance == 1
    assert one.entropy == 0 and one.imbalance == 4
    assert one.experts.shape == (4, 2) and one.weights.dtype == np.float32


def test_picture_is_the_drivers(usage_file, tmp_path):
    picture = tmp_path / "usage.svg"
    command = [DRIVER, "inspect", "--usage", usage_file, "--svg", picture]
    subprocess.run(command, check=True, capture_output=True)
    usage = read_usage(usage_file)
    assert usage.svg() == picture.read_text()
    assert usage._repr_svg_() == usage.svg() and usage.svg() in usage._repr_html_()


def test_refusals(usage_file, tmp_path):
    with pytest.raises(moec.Error, match="E-IO"):
        read_usage(tmp_path / "none")
    other = tmp_path / "other"
    for content in (b"", b"x" * 7, b"\xff" * 64, b"\x02" + bytes(7) + b"{}"):
        other.write_bytes(content)
        with pytest.raises(moec.Error, match="E-FILE-FORMAT"):
            read_usage(other)
    data = usage_file.read_bytes()
    other.write_bytes(data[:-8])
    with pytest.raises(moec.Error, match="E-FILE-FORMAT"):
        read_usage(other)
    other.write_bytes(data.replace(b'"schema": "1"', b'"schema": "2"'))
    with pytest.raises(moec.Error, match="E-ABI"):
        read_usage(other)
