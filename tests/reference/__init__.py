"""Every model a second time in plain PyTorch, as a specification: a folder or a file each.

Each has `network(config)`, `timed(config)`, `train`, `forward` and `predict`, by which `benchmark`
knows it.
"""
