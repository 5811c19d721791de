"""The fault rig in its short form (make faults is the long one): a kill or two of each kind, a piece of each corpus."""

import sys

from conftest import command


def test_short_rig():
    flags = "--kills 2 --verbs 3 --malformed 0.003"
    done = command(sys.executable, "-m", "tests.faults", *flags.split(), check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
