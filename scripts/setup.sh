#!/usr/bin/env bash
# Installs what is missing and builds: Debian packages, .venv with the Python packages, build/.
# Nothing outside this folder is written except by apt-get. Run again at any time.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(libmlir-22-dev mlir-22-tools llvm-22-dev llvm-22-tools clang-22 lld-22 liblld-22-dev
  libclang-rt-22-dev clang-format-22 cmake ninja-build g++ libxxhash-dev ccache git binutils
  pkg-config python3-dev python3-venv)
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
    missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
  sudo=
  if [ "$(id -u)" -ne 0 ]; then
    sudo=sudo
    command -v sudo >/dev/null || {
      echo "expected root or sudo to install packages, but got neither; as root run:" >&2
      echo "  apt-get install ${missing[*]}" >&2
      exit 1
    }
  fi
  echo "Installing ${missing[*]}"
  $sudo apt-get update -q
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q "${missing[@]}"
fi

# Packages that the machine's Python already has are used; the rest goes into .venv alone.
[ -x .venv/bin/python ] || python3 -m venv --system-site-packages .venv
.venv/bin/python -m pip install -q --disable-pip-version-check -r test/requirements.txt

mkdir -p build
cmake -G Ninja -S . -B build -C cmake/caches/release.cmake -DMOE_ENABLE_PYTHON=ON \
  -DPython_EXECUTABLE="$PWD/.venv/bin/python" >build/configure.log 2>&1 || {
  cat build/configure.log >&2
  exit 1
}
ninja -C build
