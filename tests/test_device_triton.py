"""The Triton kernels against the torch ops, exactly; on a CPU, Triton's interpreter runs them.

In a process of its own, because how kernels run is settled when Triton is imported.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from devices import DEVICES

HERE = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("device", DEVICES)
def test_triton_kernels_equal_the_torch_ops(device):
    chosen = {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), **chosen}
    command = [sys.executable, str(HERE / "triton_child.py"), device]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert child.stdout == "equal\n", child.stderr
