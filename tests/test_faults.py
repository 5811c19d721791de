"""The fault rig in its short form (make faults is the long one): a kill or two of each kind, a piece of each corpus."""

import sys

from conftest import command


def test_short_rig():
    flags = "--parts train2 collect calls dies full hostile malformed --kills 2 --verbs 2 --malformed 0.002"
    done = command(sys.executable, "-m", "tests.faults", *flags.split(), check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
