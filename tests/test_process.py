"""What a process of the project is set to."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
from img2prompt.core.process import settle
settle()
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_memory_that_was_freed_is_not_asked_for_anew():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, again = map(int, done.stdout.split())
    assert again < first / 10
