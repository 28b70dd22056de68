"""Settings every test shares: one thread, no network, and the same examples on each run."""

import os

# Before any Hugging Face import: no test may reach the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import torch
from hypothesis import settings

# Tiny tensors: more threads would only wait for each other, and sums could be split differently from run to run.
torch.set_num_threads(1)

# A warning that torch gives once per process would fail whichever test happens to come first; so each one counts.
torch.set_warn_always(True)

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=40)
settings.load_profile("repeatable")
