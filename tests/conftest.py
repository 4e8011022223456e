"""What every test runs under: one torch thread, because several are slower on small tensors, hypothesis without a deadline, random numbers
that do not depend on which tests ran before in the same process, and without a GPU Triton's interpreter, which has to be asked for before
anything imports triton.
"""

import os
import random
import zlib

import hypothesis
import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
hypothesis.settings.register_profile("pack", deadline=None, max_examples=50)
hypothesis.settings.load_profile("pack")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before fixtures of a whole file, too."""
    seed = zlib.crc32(item.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


@pytest.fixture
def poison():
    """What is read before it was written is no number, and sums on a GPU come out alike."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
