"""Other frameworks: the only modules, beside tests, that import torch."""
