"""The devices of tests that several processes make something on: CPUs over Gloo, and where there are two GPUs, these over NCCL."""

import pytest
import torch

TWO_GPUS = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")]
DEVICES = ["cpu", pytest.param("cuda", marks=TWO_GPUS)]
