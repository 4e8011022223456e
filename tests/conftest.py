"""What every test runs under: one torch thread, because several are slower on small tensors, and hypothesis without
a deadline.
"""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("pack", deadline=None, max_examples=50)
hypothesis.settings.load_profile("pack")
