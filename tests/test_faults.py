"""The fault rig in its short form (make faults is the long one)."""

import sys

from conftest import command


def test_short_rig():
    done = command(
        sys.executable, "-m", "tests.faults", "--kills", "2", "--verbs", "2", "--malformed", "0.02", check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert '"lost": 0' in done.stdout
