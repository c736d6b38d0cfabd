"""Where the compiler is, and the console command `moec` that starts it."""

import os
import sys


def driver_path():
    """Path of the compiler driver inside this package; None where it was not installed."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bin", "moec")
    return path if os.access(path, os.X_OK) else None


def main():
    """Replaces this process by the driver, with the same arguments."""
    path = driver_path()
    if path is None:
        sys.exit(
            "E-IO: moec: expected the compiler inside the package "
            f"({os.path.dirname(os.path.abspath(__file__))}/bin/moec), but got none; "
            "this package was installed without it"
        )
    # `moec verify` is Python again: this interpreter, which has the package.
    os.environ.setdefault("MOEC_PYTHON", sys.executable)
    os.execv(path, ["moec", *sys.argv[1:]])
