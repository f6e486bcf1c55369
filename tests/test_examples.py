"""The scripts in examples/, as they stand there."""

import re
import subprocess
import sys

from conftest import ROOT

SIZE = re.compile(r"^(\w+): ([\d.]+) MiB for", re.MULTILINE)


def test_python_api(smollm2):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "python_api.py", smollm2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^turbo4 says: \w+", done.stdout, re.MULTILINE)
    sizes = {name: float(size) for name, size in SIZE.findall(done.stdout)}
    assert list(sizes) == ["f16", "turbo4", "turbo2"]
    assert sizes["f16"] > sizes["turbo4"] > sizes["turbo2"]
