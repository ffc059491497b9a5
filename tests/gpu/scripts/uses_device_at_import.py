"""A module that starts the device when it is imported, so that no process may be forked after it."""

import torch

AT_IMPORT = torch.ones(2, device="cuda" if torch.cuda.is_available() else "cpu")
