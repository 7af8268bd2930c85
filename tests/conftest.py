"""Settings for all tests."""

import signal
import threading

import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background job: the tests send it to commands
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tests' networks and batches are too small to share among threads


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Tests, their fixtures and the commands they start see no GPU, so that they do the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", threading.excepthook)  # the scripts' main() changes it
        if not item.get_closest_marker("gpu"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for commands
        return (yield)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
