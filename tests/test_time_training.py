"""The script that times the training: it goes through the recipe's whole training."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "time_training.py"


def test_prints_bits_seconds_and_memory():
    sizes = {"layers": 2, "heads": 1, "head-dim": 16, "samples": 512, "iterations": 2, "device": "cpu"}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    what = "cpu: 2 layers x 1 heads x 16, 4 bits, 512 samples"
    cost = r"[\d.]+ s, host 0\.\d\d GiB, device 0\.00 GiB\n"
    assert re.fullmatch(f"{what}: {cost}", done.stdout), done.stdout
