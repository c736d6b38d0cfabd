"""Planted faults in the vector code: IR after `kernels` and later with one mistake, against the
checks of the other tests (see test_faults.py).
"""

from __future__ import annotations

import re

import oracle
import pytest
from test_faults import assert_found, compile_text, examine

FMA = r"%(\d+) = vector\.fma (%\w+), (%\w+), (%\w+) : vector<8xf32>"
FIRST_LANES = r"dense<\[0, 1, 2, 3, 4, 5, 6, 7\]>"
LANES_ONE_LATE = "dense<[1, 2, 3, 4, 5, 6, 7, 8]>"

# (what went wrong, dtype, phase after which it is put in, functions, pattern, replacement). The
# model is mixtral-gelu as in test_faults.py, at x86-64-v3: tiles of 1, 2 or 3 rows.
FAULTS = [
    (
        "has an erf with one digit of a coefficient wrong",
        "f32",
        "kernels",
        r"moe_gemm_.*_blocked2",
        r"-1\.127040e\+00",
        "-1.127140e+00",
    ),
    (
        "has an exp with a short logarithm of 2",
        "f32",
        "kernels",
        r"moe_select",
        r"-0\.693145751",
        "-0.6931",
    ),
    (
        "rounds products before it adds them, in tiles of one row",
        "f32",
        "kernels",
        r"moe_gemm_v3_r1_",
        FMA,
        r"%p\1 = arith.mulf \2, \3 : vector<8xf32>\n%\1 = arith.addf %p\1, \4 : vector<8xf32>",
    ),
    (
        "masks the last column of h",
        "f32",
        "kernels",
        r"moe_gemm_.*_blocked2",
        FIRST_LANES,
        LANES_ONE_LATE,
    ),
    (
        "takes the last of the largest logits, not the first",
        "f32",
        "kernels",
        r"moe_select",
        r"vector\.reduction <minsi>, (%\w+)",
        r"vector.reduction <maxsi>, \1",
    ),
    (
        "skips the first 16 columns of the rows, in tiles of two",
        "f32",
        "kernels",
        r"moe_gemm_v3_r2_",
        r"(scf\.for %\w+ = )%c0_i64( to %arg2 )",
        r"\1%c1_i64\2",
    ),
    (
        "reads the first row for the second",
        "f32",
        "kernels",
        r"moe_gemm_v3_r2_.*_blocked2",
        r"(llvm\.getelementptr %\w+\[)64(\] .*\n.* -> f32\n)",
        r"\g<1>0\2",
    ),
    (
        "stores one row twice",
        "f32",
        "kernels",
        r"moe_gemm_v3_r2_",
        r"(llvm\.store %\w+)#4,",
        r"\1#0,",
    ),
    (
        "weights rows by their place, not by their pair",
        "f32",
        "kernels",
        r"moe_gemm_.*_combine1",
        r"(getelementptr %arg6\[)(%\d+)(\](?:.*\n){1,12}?.*getelementptr %arg7\[)%\d+",
        r"\1\2\3\2",
    ),
    (
        "stores a row where it has to be added",
        "f32",
        "kernels",
        r"moe_gemm_.*_combine1",
        FMA + r"(\s+llvm\.store)",
        r"%\1 = arith.mulf \2, \3 : vector<8xf32>\5",
    ),
    (
        "does not mark the expert that was taken",
        "f32",
        "kernels",
        r"moe_select",
        r"\n *llvm\.store %c-2147483648_i32, .*",
        "",
    ),
    (
        "sums two of three scores",
        "f32",
        "kernels",
        r"moe_select",
        r"dense<\[true, true, true, false",
        "dense<[true, true, false, false",
    ),
    (
        "gathers by slot, not by token",
        "f32",
        "kernels",
        r"moe_pack_.*_gather",
        r"arith\.divui (%\w+, %\w+ : i32)",
        r"arith.remui \1",
    ),
    (
        "loses a column where the width is no multiple of 16",
        "f32",
        "kernels",
        r"moe_pack_",
        r"(scf\.for %\w+ = )%c0_i64( to %\w+ step %c1_i64 .*\n.*%c4_i64 : i64\n.*\n.*\n"
        r".* -> vector<1xf32>)",
        r"\1%c1_i64\2",
    ),
    (
        "does not store the columns beyond the last whole panel",
        "f32",
        "kernels",
        r"moe_end_panels_",
        r"(arith\.cmpi slt, %\w+, )%c32_i64",
        r"\1%c1_i64",
    ),
    (
        "adds to what is there unless it was asked to",
        "f32",
        "kernels",
        r"moe_begin_panels_",
        r"arith\.cmpi ne, %arg8",
        "arith.cmpi eq, %arg8",
    ),
    (
        "does not round rows before they are weighted",
        "bf16",
        "kernels",
        r"moe_gemm_.*_combine1_bf16",
        r"(= vector\.bitcast )(%\d+)( : vector<8xf32> to vector<8xi32>(?:\n(?!.*bitcast %\d+ : "
        r"vector<8xf32>).*)+?\n.*vector\.fma %\w+, )%\d+(, %\d+ : vector<8xf32>\s+llvm\.store)",
        r"\1\2\3\2\4",
    ),
    (
        "cuts rows off instead of rounding them",
        "bf16",
        "kernels",
        r"moe_gemm_.*_combine1_bf16",
        r"dense<32767>",
        "dense<0>",
    ),
    (
        "cuts x off instead of rounding it",
        "bf16",
        "kernels",
        r"moe_pack_v3_f32_round",
        r"dense<32767>",
        "dense<0>",
    ),
    (
        "lays two scratches over each other",
        "f32",
        "outline",
        r"\w+_stage\d",
        r"(memref\.view %\w+\[)%\w+(\]\[%\w+\] : memref<\?xi8> to memref<\?xf32>)",
        r"\1%c0\2",
    ),
    (
        "takes rows of x for aligned",
        "f32",
        "codegen",
        r"moe_pack_",
        r"(llvm\.load %\w+ \{alignment = )4( : i64\} : !llvm\.ptr -> vector<8xf32>)",
        r"\g<1>32\2",
    ),
]


def in_functions(text: str, names: str, pattern: str, replacement: str) -> tuple[str, int]:
    """re.subn in the functions whose name begins as `names` says."""
    parts = re.split(r"(?m)^(?=  (?:llvm|func)\.func )", text)
    count = 0
    for i, part in enumerate(parts):
        if re.match(rf"  \w+\.func .*?@(?:{names})", part):
            parts[i], n = re.subn(pattern, replacement, part)
            count += n
    return "".join(parts), count


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints by dtype, and their IR by dtype and phase."""
    from conftest import driver, moec_command

    driver()
    checkpoints, texts = {}, {}
    for dtype, phase in sorted({fault[1:3] for fault in FAULTS}):
        folder = tmp_path_factory.mktemp(f"{dtype}-{phase}")
        if dtype not in checkpoints:
            checkpoints[dtype] = oracle.make_checkpoint("mixtral-gelu", dtype, folder / "model")
        options = ["--cpu", "x86-64-v3", "--compile-to", phase, "-o", folder / "ir.mlir"]
        moec_command("compile", checkpoints[dtype].path, *options)
        texts[dtype, phase] = (folder / "ir.mlir").read_text()
    return checkpoints, texts


@pytest.mark.parametrize(("dtype", "phase"), sorted({fault[1:3] for fault in FAULTS}))
def test_ir_without_a_fault_passes(models, tmp_path, dtype, phase):
    checkpoints, texts = models
    layer_of, said = compile_text(checkpoints[dtype], phase, texts[dtype, phase], tmp_path)
    assert layer_of is not None, said
    examine(layer_of, checkpoints[dtype])


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_kernel_faults_are_found(models, tmp_path, fault):
    _, dtype, phase, names, pattern, replacement = fault
    checkpoints, texts = models
    text, count = in_functions(texts[dtype, phase], names, pattern, replacement)
    assert count, "the text to spoil is gone: choose another"
    assert_found(checkpoints[dtype], phase, text, tmp_path)
