"""The fault rig in its short form (make faults is the long one): two kills of each kind, a piece of each corpus."""

import sys

from conftest import command


def test_short_rig():
    flags = "--kills 2 --verbs 12 --malformed 0.12 --piece 1/6"
    done = command(sys.executable, "-m", "tests.faults", *flags.split(), check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert '"lost": 0' in done.stdout
