"""reentry.py PHASE-TEST MOE-OPT INPUT PREFIX: leaves and enters at every phase."""

import subprocess
import sys
from pathlib import Path

phase_test, moe_opt, source, prefix = sys.argv[1:5]
# One level and one type: the doors do not depend on how many clones go through them.
FEW = ["--levels=x86-64-v4", "--types=bf16"]
NAMES = "canonical fuse target strategy bufferize tile kernels outline codegen".split()


def run(*command):
    subprocess.run(command, check=True)


run(phase_test, source, *FEW, "--emit=obj", "-o", f"{prefix}.o")
whole = Path(f"{prefix}.o").read_bytes()
before = source
for i, name in enumerate(NAMES):
    here = f"{prefix}.{name}.mlir"
    run(phase_test, before, *FEW, f"--from={name}", f"--to={name}", "-o", here)
    text = subprocess.run(
        [phase_test, *FEW, f"--print-pipeline={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()
    by_opt = f"{prefix}.{name}.opt.mlir"
    run(moe_opt, before, f"--pass-pipeline={text}", "--mlir-disable-threading", "-o", by_opt)
    rest = [f"--from={NAMES[i + 1]}"] if i + 1 < len(NAMES) else ["--to="]
    run(phase_test, here, *FEW, *rest, "--emit=obj", "-o", f"{prefix}.{name}.o")
    code = "same object" if Path(f"{prefix}.{name}.o").read_bytes() == whole else "OTHER OBJECT"
    ir = (
        "same pipeline"
        if Path(by_opt).read_text() == Path(here).read_text() + "\n"
        or Path(by_opt).read_text() == Path(here).read_text()
        else "OTHER PIPELINE"
    )
    print(f"{name}: {code}, {ir}")
    before = here
