"""Configuration of the lit tests.

Features: x86-64-v3, x86-64-v4 (what the CPU can run), avx512f, avx512bf16, amx, python (numpy).
MOE_ROUND_TRIP=1 in the environment prints and re-reads the IR between all passes of every
moe-opt call of the suite.
"""

import os
import shutil
import sys

import lit.formats
from lit.llvm import llvm_config

config.name = "moec"
config.test_format = lit.formats.ShTest(not llvm_config.use_lit_shell)
config.suffixes = [".mlir", ".test", ".ll"]
config.excludes = ["Inputs", "CMakeLists.txt", "lit.cfg.py", "lit.site.cfg.py", "python"]
config.test_source_root = os.path.dirname(__file__)
config.test_exec_root = os.path.join(config.moe_obj_root, "test")

llvm_config.with_system_environment(["HOME", "TMP", "TEMP", "MOEC_CPU"])
llvm_config.use_default_substitutions()
llvm_config.with_environment("PATH", config.moe_tools_dir, append_path=True)
llvm_config.with_environment("PATH", config.llvm_tools_dir, append_path=True)


def cpu_flags():
    """The flags of the first CPU in /proc/cpuinfo, as a set; empty where there are none."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


flags = cpu_flags()
V3 = {"avx2", "fma", "bmi1", "bmi2", "f16c", "movbe", "abm"}
V4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
if V3 <= flags:
    config.available_features.add("x86-64-v3")
    if V4 <= flags:
        config.available_features.add("x86-64-v4")
if "avx512f" in flags:
    config.available_features.add("avx512f")
if "avx512_bf16" in flags:
    config.available_features.add("avx512bf16")
if {"amx_tile", "amx_bf16"} <= flags:
    config.available_features.add("amx")
if config.moe_sanitize:
    config.available_features.add("sanitizer")

python = os.environ.get("MOE_PYTHON", sys.executable)
config.substitutions.append(("%python", f'"{python}"'))
config.substitutions.append(("%moe_src_root", config.moe_src_root))
config.substitutions.append(("%moe_obj_root", config.moe_obj_root))
config.substitutions.append(("%moe_libs", config.moe_libs_dir))
llvm_libs = os.path.join(os.path.dirname(config.llvm_tools_dir), "lib")
for library in ("mlir_c_runner_utils", "mlir_runner_utils"):
    config.substitutions.append(("%" + library, os.path.join(llvm_libs, f"lib{library}.so")))
config.substitutions.append(("%host_cxx", config.host_cxx))
config.substitutions.append(("%host_cc", config.host_cc))

tools = ["moec", "moe-phase-test", "moe-opt", "moe-reduce", "moe-lsp-server"]
for tool in tools:
    path = os.path.join(config.moe_tools_dir, tool)
    if not os.path.exists(path):
        continue
    if tool == "moe-opt" and os.environ.get("MOE_ROUND_TRIP") == "1":
        path += " --verify-roundtrip"
    config.substitutions.append((r"(?<![\w/.-])" + tool + r"(?![\w/.-])", path))
if shutil.which("ptxas"):
    config.available_features.add("ptxas")
if shutil.which("objdump"):
    config.available_features.add("objdump")
