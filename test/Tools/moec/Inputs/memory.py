"""Compares the memory that `moec compile --dry-run` foretells with what the compiler takes."""

import resource
import subprocess
import sys

command = ["moec", "compile", *sys.argv[1:], "--cpu", "x86-64-v3"]
plan = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True).stdout
number, unit = plan.split("memory")[1].split()[1:3]
foretold = float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]
subprocess.run([*command, "--quiet", "--force", "-o", "memory.moec"], check=True)
taken = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(f"foretold {foretold / 1e6:.0f} MB, taken {taken / 1e6:.0f} MB")
assert taken <= foretold <= 2 * taken
