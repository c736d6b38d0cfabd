"""Assembles the PTX of a gpu.binary (stdin) with ptxas and checks what came out.

usage: ptxas.py ARCH MODULE. Prints one line per kernel: registers, spills, and how often the
instructions occur that the kernel is built from, as they are in the machine code.
"""

import collections
import re
import struct
import subprocess
import sys
import tempfile

# Lowest 12 bits of an instruction, from Volta on.
OPCODES = {0x23C: "HMMA", 0x83B: "LDSM", 0xFAE: "LDGSTS", 0xB1D: "BAR"}
# HGMMA with its left operand in registers.
HOPPER_OPCODES = {0xDF0: "HGMMA", 0x5B4: "UTMALDG"}


def ptx_of(text, module):
    found = re.search(
        r"gpu\.binary @" + module + r'\b.*?assembly = "((?:[^"\\]|\\.)*)"', text, re.S
    )
    if not found:
        sys.exit(f"expected gpu.binary @{module}, but got none")
    code = re.sub(r"\\([0-9A-F]{2})", lambda m: chr(int(m[1], 16)), found[1])
    return code.replace('\\"', '"').replace("\\\\", "\\").rstrip("\0")


def opcodes(cubin):
    """Counts of instructions per kernel: every instruction has 16 bytes."""
    offset = struct.unpack_from("<Q", cubin, 40)[0]
    count, names = struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + 64 * i) for i in range(count)]
    result = {}
    for section in sections:
        begin = sections[names][4] + section[0]
        name = cubin[begin : cubin.index(b"\0", begin)].decode()
        if name.startswith(".text."):
            words = range(section[4], section[4] + section[5], 16)
            counts = collections.Counter(
                struct.unpack_from("<H", cubin, i)[0] & 0xFFF for i in words
            )
            result[name[6:]] = {text: counts[code] for code, text in OPCODES.items()}
    return result


arch, module = sys.argv[1:]
if arch == "sm_90a":
    OPCODES |= HOPPER_OPCODES
ptx = ptx_of(sys.stdin.read(), module)
# Anything else would be a variable of its own that overlaps others.
assert ".extern .shared .align 1024 .b8 shared[];" in ptx, "shared memory is not dynamic"
assert ptx.count(".shared .align") == 1, "expected one shared variable"
with tempfile.TemporaryDirectory() as folder:
    with open(f"{folder}/k.ptx", "w") as file:
        file.write(ptx)
    log = subprocess.run(
        ["ptxas", f"-arch={arch}", "-v", f"{folder}/k.ptx", "-o", f"{folder}/k.cubin"],
        capture_output=True,
        text=True,
        check=False,
    )
    # A product that ptxas waits for at once is a note, not an error.
    if log.returncode or "serialized" in log.stderr:
        sys.exit(log.stderr)
    with open(f"{folder}/k.cubin", "rb") as file:
        counts = opcodes(file.read())
for name, registers in re.findall(
    r"Compiling entry function '(\w+)'.*?Used (\d+) registers", log.stderr, re.S
):
    part = log.stderr[log.stderr.index(f"entry function '{name}'") :]
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
    ).groups()
    ptx_mma = re.search(r"\.entry " + name + r"\b.*?\n}", ptx, re.S)[0].count("mma.sync")
    # Several times where a loop is unrolled.
    times = counts[name]["HMMA"] // max(ptx_mma, 1)
    assert ptx_mma * times == counts[name]["HMMA"], f"{name}: {ptx_mma} mma.sync, {counts[name]}"
    assert times or not ptx_mma, f"{name}: {ptx_mma} mma.sync, but no HMMA"
    numbers = " ".join(f"{key} {value}" for key, value in counts[name].items())
    print(f"{name}: stack {stack} spills {stores} {loads} {numbers} registers {registers}")
