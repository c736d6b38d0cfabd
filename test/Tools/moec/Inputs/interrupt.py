"""Runs a command without a terminal, interrupts it after a second: exit 130 within two more."""

import signal
import subprocess
import sys
import time


def heed():
    """A runner in the background may have told us to ignore interrupts; the tool would as well."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


process = subprocess.Popen(
    sys.argv[1:],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    preexec_fn=heed,
)
time.sleep(1)
assert process.poll() is None, (process.returncode, process.stderr.read())
begin = time.monotonic()
process.send_signal(signal.SIGINT)
_, errors = process.communicate(timeout=30)
assert process.returncode == 130, (process.returncode, errors)
assert time.monotonic() - begin < 2
assert "\r" not in errors and "\033" not in errors, errors  # no bar where there is no terminal
