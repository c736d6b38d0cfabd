"""Planted faults: each of these mistakes, put in on purpose, makes a test fail.

A test that cannot fail proves nothing. So every fault here is one that a person could have made,
and the check that has to find it is the one the other tests use, unchanged.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import moec
import oracle
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "lib" / "Runtime"
PROGRAMS = ROOT / "test" / "Runtime"

# --- the runtime: C text with one mistake, against test/Runtime/*.c and probe.py -----------------

# (what went wrong, what finds it, file, text as it is, text with the mistake)
RUNTIME_FAULTS = [
    (
        "rounds to bf16 by cutting off",
        "pack",
        "Pack.c",
        "return (uint16_t)((b + 0x7fffu + (b >> 16 & 1)) >> 16);",
        "return (uint16_t)(b >> 16);",
    ),
    (
        "rounds halves away from zero",
        "pack",
        "Pack.c",
        "_mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))",
        "_mm256_set1_epi32(0x8000)",
    ),
    (
        "forgets the padding in k",
        "pack",
        "Pack.c",
        "return layout == MOEC_VECTOR32 ? cols : (cols + 31) / 32 * 32;",
        "return layout == MOEC_VECTOR32 ? cols : (cols + 7) / 8 * 8;",
    ),
    (
        "swaps the two neighbours in k",
        "pack",
        "Pack.c",
        "unit |= convert(s, t->row + l, 2 * u + 1, to, &bad) << 16;",
        "unit = unit << 16 | convert(s, t->row + l, 2 * u + 1, to, &bad);",
    ),
    (
        "starts every chunk at the first token",
        "probe",
        "Run.c",
        "f->x = t->x.data + first * t->x.stride",
        "f->x = t->x.data + 0 * t->x.stride",
    ),
    (
        "drops the last stage where there is no gang",
        "probe",
        "CpuTarget.c",
        "for (c->stage = 0; c->stage < entry->stage_count; ++c->stage)",
        "for (c->stage = 0; c->stage + 1 < entry->stage_count; ++c->stage)",
    ),
    (
        "keeps the counters of the chunk before",
        "probe",
        "CpuTarget.c",
        "memset(c->frame.counters, 0, sizeof c->frame.counters);",
        "(void)0;",
    ),
    (
        "reads weights of the first chunk only",
        "probe",
        "CpuTarget.c",
        "const int64_t from = (r0 + r) * v->stride;",
        "const int64_t from = r * v->stride;",
    ),
    (
        "packs up where gate belongs",
        "probe",
        "Weight.c",
        "const int64_t skip = t.part < 0 ? p * d->rows * stride[1] : 0;",
        "const int64_t skip = t.part < 0 ? (1 - p) * d->rows * stride[1] : 0;",
    ),
    (
        "accepts infinity as a weight",
        "pack",
        "Pack.c",
        "const uint32_t limit = dtype == MOEC_DT_F32 ? 0x7f7fffffu : 0x7f7f7fffu;",
        "const uint32_t limit = 0x7f800000u;",
    ),
    (
        "takes the last expert id for a foreign one",
        "call",
        "CpuTarget.c",
        "if (id < -1 || id >= E)",
        "if (id < -1 || id >= E - 1)",
    ),
    (
        "reads ids without their row stride",
        "call",
        "CpuTarget.c",
        "const int64_t i = row * v->stride + slot;",
        "const int64_t i = row * 3 + slot;",
    ),
    (
        "forgets to add to what is there",
        "call",
        "Run.c",
        "f->accumulate = (call->flags & MOEC_ACCUMULATE) != 0;",
        "f->accumulate = 0;",
    ),
    (
        "keeps the counts of the call before",
        "call",
        "Run.c",
        "target->clear(c, t.counts_out.data, counts, counts, 1);",
        "(void)counts;",
    ),
    (
        "leaves y unwritten when there are no slots",
        "call",
        "Run.c",
        "else if (t.T && !(call->flags & MOEC_ACCUMULATE))",
        "else if (0)",
    ),
    (
        "takes one overlap of two",
        "call",
        "CheckCall.c",
        "if (i != j && k->regions[i].output && (j > i || !k->regions[j].output) &&",
        "if (j > i && k->regions[i].output &&",
    ),
]


class Runtime:
    """The runtime's C files and the test programs, compiled once; one file again for each fault."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.objects = {f.name: self.compile(f, folder / f"{f.stem}.o") for f in self.sources()}
        self.mock = self.compile(PROGRAMS / "mock.c", folder / "mock.o")
        self.programs = {
            name: self.compile(PROGRAMS / f"{name}.c", folder / f"{name}_main.o")
            for name in ("call", "pack")
        }

    @staticmethod
    def sources():
        return sorted(RUNTIME.glob("*.c"))

    def compile(self, source: Path, target: Path) -> Path:
        include = [f"-I{ROOT / 'include'}", f"-I{RUNTIME}", f"-I{PROGRAMS}"]
        command = ["cc", "-std=gnu11", "-O0", "-fPIC", "-c", *include, "-D_GNU_SOURCE"]
        subprocess.run([*command, source, "-o", target], check=True)
        return target

    def outcome(self, name: str, replaced: dict[str, Path]) -> str:
        """What a program says of the runtime with some files replaced; nothing if it passes."""
        objects = [replaced.get(name, path) for name, path in self.objects.items()]
        if name == "probe":
            return self.probe(objects)
        program = self.folder / name
        link = ["cc", self.programs[name], self.mock, *objects, "-o", program]
        subprocess.run([*link, "-lm", "-lpthread", "-ldl"], check=True)
        return self.run([program])

    @staticmethod
    def run(command, **kwargs) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, **kwargs)
        except subprocess.TimeoutExpired:
            return "hangs"
        return done.stderr or str(done.returncode) if done.returncode else ""

    def probe(self, objects: list[Path]) -> str:
        library, mock = self.folder / "libmoec.so.1", self.folder / "mock.moec"
        mock.mkdir(exist_ok=True)
        link = ["cc", "-shared", "-Wl,-soname,libmoec.so.1", *objects, "-o", library]
        subprocess.run([*link, "-lm", "-lpthread", "-ldl"], check=True)
        link = ["cc", "-shared", self.mock, "-o", mock / "libmock.so", "-lm"]
        subprocess.run(link, check=True)
        command = [sys.executable, ROOT / "test" / "python" / "probe.py", mock]
        return self.run(command, env={**os.environ, "LD_LIBRARY_PATH": str(self.folder)})


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    built = Runtime(tmp_path_factory.mktemp("runtime"))
    for name in ("call", "pack", "probe"):
        assert not built.outcome(name, {}), f"{name} fails without any fault"
    return built


@pytest.mark.parametrize("fault", RUNTIME_FAULTS, ids=[f[0] for f in RUNTIME_FAULTS])
def test_runtime_faults_are_found(runtime, tmp_path, fault):
    _, finder, file, right, wrong = fault
    text = (RUNTIME / file).read_text()
    assert text.count(right) >= 1, "the text to spoil is gone: choose another"
    (tmp_path / file).write_text(text.replace(right, wrong))
    spoilt = runtime.compile(tmp_path / file, tmp_path / "spoilt.o")
    assert runtime.outcome(finder, {file: spoilt}), f"{finder} did not find it"


# --- the compiler: its IR with one mistake, against the checks of the other tests -----------------

# (what went wrong, phase after which it is put in, pattern, replacement). The model is
# mixtral-gelu: H = 36, F = 50, E = 5, K = 3, gelu, weights divided by their sum.
COMPILER_FAULTS = [
    ("takes gelu by its tanh form", "import", r"activation = gelu>", "activation = gelu_tanh>"),
    ("takes silu for gelu", "import", r"activation = gelu>", "activation = silu>"),
    ("does not renormalize", "import", r", renormalize = sum", ""),
    ("scales by a thousandth too much", "import", r"top_k = 3, ", "top_k = 3, scale = 1.001, "),
    (
        "reads gate and up the wrong way round",
        "canonical",
        r"(\^bb0\()(%\w+)(: f32, )(%\w+)",
        r"\1\4\3\2",
    ),
    ("has a constant with too few digits", "canonical", r"0\.707106769", "0.70710"),
    (
        "leaves the first expert out of the plan",
        "tile",
        r"%c0 (to %c5 step %c1 iter_args\(%\w+ = %c0\))",
        r"%c1 \1",
    ),
    (
        "does not advance in the sort",
        "tile",
        r"(%\w+ = arith\.addi %\w+, )%c1_i32( : i32\s+memref\.store %\w+, %alloc_\d+\[)",
        r"\1%c0_i32\2",
    ),
    (
        "gathers the rows of another token",
        "tile",
        r"(moe\.pack_rows .*via\(%\w+, )%c3\b",
        r"\1%c2",
    ),
    (
        "combines into another token",
        "tile",
        r"(via\(%\w+, %\w+ slots )%c3\b",
        r"\1%c2",
    ),
    (
        "reads the first panel for every one",
        "tile",
        r"(moe\.gemm_tile .*weight\(%arg6\[%\w+, )%\w+\]",
        r"\1%c0]",
    ),
    (
        "reads the first expert's weights for all",
        "tile",
        r"(moe\.gemm_tile .*weight\(%arg7\[)%\w+,",
        r"\1%c0,",
    ),
    ("shares a counter between two stages", "tile", r"counter\(1\)", "counter(0)"),
    (
        "takes two panels and does one",
        "tile",
        r"counter\(2\) count\(%c1\)",
        "counter(2) count(%c2)",
    ),
    ("adds to what was in the scratch", "tile", r"\n *moe\.begin_panels .*", ""),
    ("does not store the last panels", "tile", r"\n *moe\.end_panels .*", ""),
    (
        "ignores accumulate",
        "tile",
        r"(\n *)(moe\.begin_panels .*accumulate\()%\w+\)",
        r"\1%no = arith.constant false\1\2%no)",
    ),
    (
        "adds the experts in descending order",
        "tile",
        r"(scf\.for (%\w+) = %c0 to (%\w+) step %c1 \{\n)(\s*%\w+ = memref\.load %\w+\[)\2"
        r"(, %c0\].*\n.*\n.*\[)\2(, %c1\].*\n.*\n.*\[)\2(, %c2\])",
        r"\1%last = arith.subi \3, %c1 : index\n%back = arith.subi %last, \2 : index\n"
        r"\4%back\5%back\6%back\7",
    ),
    (
        "loses the rows of a block that is not full",
        "tile",
        r"(%\w+ = arith\.addi %\w+, )%c2( : index\s+%\w+ = arith\.divui %\w+, %c3 : index)",
        r"\1%c0\2",
    ),
]


def examine(layer_of, checkpoint) -> None:
    """The checks of the other tests on one library; raises at the first that fails."""
    block = checkpoint.blocks[0]
    layer = layer_of(threads=1)
    unit = 2e-6 if checkpoint.dtype == "f32" else 6 * 2**-9
    for count in (1, 2, 17, 64):
        x = oracle.tokens(count, block.hidden, checkpoint.dtype)
        oracle.check_layer(layer, block, x, checkpoint.dtype, f"T={count}")
        before = oracle.tokens(count, block.hidden, checkpoint.dtype, seed=1)
        y = layer(x, out=before.clone(), accumulate=True)
        assert oracle.relative(y, oracle.wide(before) + block.reference()(x)) < unit
    y = layer(x)
    assert torch.equal(torch.cat([layer(x[:1]), layer(x[1:])]), y)
    assert torch.equal(layer_of(threads=moec.Serial(3))(x), y)
    fine = oracle.tokens(3, block.hidden, "f32")
    assert torch.equal(layer(fine).to(x.dtype), layer(fine.to(x.dtype)))
    oracle.check_combine(layer, block, x[:5], checkpoint.dtype, "combine")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint, and its IR after each phase that a fault is put in."""
    from conftest import driver, moec_command

    driver()
    folder = tmp_path_factory.mktemp("compiler")
    checkpoint = oracle.make_checkpoint("mixtral-gelu", "f32", folder / "checkpoint")
    texts = {}
    for phase in sorted({fault[1] for fault in COMPILER_FAULTS}):
        file = folder / f"{phase}.mlir"
        levels = ["--cpu", "x86-64-v3", "--compile-to", phase]
        moec_command("compile", checkpoint.path, *levels, "-o", file)
        texts[phase] = file.read_text()
    return folder, checkpoint, texts


def compile_text(checkpoint, phase, text, folder):
    """The library of IR after a phase; None where the compiler itself refuses it."""
    from conftest import moec_command

    (folder / "fault.mlir").write_text(text)
    options = ["--compile-from", phase, "--checkpoint", checkpoint.path, "--cpu", "x86-64-v3"]
    out = folder / "out.moec"
    done = moec_command(
        "compile", folder / "fault.mlir", *options, "-o", out, "--quiet", check=False
    )
    if done.returncode:
        return None, done.stderr
    return (lambda **kwargs: moec.load(out, **kwargs).layers[0]), ""


@pytest.mark.parametrize("phase", sorted({fault[1] for fault in COMPILER_FAULTS}))
def test_ir_without_a_fault_passes(model, tmp_path, phase):
    layer_of, said = compile_text(model[1], phase, model[2][phase], tmp_path)
    assert layer_of is not None, said
    examine(layer_of, model[1])


def _examined(layer_of, checkpoint):
    """In a child: a fault may as well crash, hang or spoil memory, and then it is found, too."""
    torch.set_num_threads(1)
    faulthandler.disable()  # a crash is an answer, not news
    try:
        examine(layer_of, checkpoint)
    except (AssertionError, moec.Error, ValueError, IndexError):
        os._exit(3)
    os._exit(0)


@pytest.mark.parametrize("fault", COMPILER_FAULTS, ids=[f[0] for f in COMPILER_FAULTS])
def test_compiler_faults_are_found(model, tmp_path, fault):
    _, phase, pattern, replacement = fault
    text, count = re.subn(pattern, replacement, model[2][phase])
    assert count, "the text to spoil is gone: choose another"
    assert_found(model[1], phase, text, tmp_path)


def assert_found(checkpoint, phase, text, folder):
    """Asserts that a library made of this text fails a check."""
    layer_of, said = compile_text(checkpoint, phase, text, folder)
    # A mistake that the verifier refuses would prove nothing about the tests.
    assert layer_of is not None, said
    child = multiprocessing.get_context("fork").Process(
        target=_examined, args=(layer_of, checkpoint)
    )
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
        child.join()
    assert child.exitcode != 0, "no check found it"
