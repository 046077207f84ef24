"""Golden outputs: what the PyTorch reference says of two scans, in float64.

    python tests/golden.py      # writes tests/golden.npz

They let the tests compare the network's numbers where PyTorch is not installed.
"""

import pathlib
from typing import Any

import numpy as np
from parity_network import CLASS_WEIGHTS, CONFIG, batch, draw

PATH = pathlib.Path(__file__).with_suffix(".npz")
TERMS = ("dice", "focal", "lesion_free", "cross_entropy", "task_aware", "loss")


def norms(tree: Any) -> np.ndarray:
    """The norm of every leaf, in the order of their names."""
    import jax

    return np.asarray([np.linalg.norm(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


def reference_outputs() -> dict[str, np.ndarray]:
    """Every loss term and logit of the joint stage, and the norms of the loss's gradient."""
    import torch
    from parity import module_gradient, to_tensors
    from reference.deepsc.network import DeepSC
    from reference.deepsc.training import scan_losses

    from deepsc_jax.interop.torch import to_torch
    from deepsc_jax.models.deepsc.torch_names import TORCH_NAMES

    module = DeepSC(CONFIG).double()
    module.load_state_dict(to_torch(draw(CONFIG), TORCH_NAMES))
    weights = torch.tensor(CLASS_WEIGHTS, dtype=torch.float64)
    inputs = to_tensors(batch(), "float64")
    scans = [dict(zip(inputs, row, strict=True)) for row in zip(*inputs.values(), strict=True)]
    rows = [scan_losses(module, scan, "joint", weights) for scan in scans]
    torch.stack([row["loss"] for row in rows]).mean().backward()
    logits = []
    for scan in scans:
        found = module(scan, "joint").logits
        assert found is not None
        logits.append(found[0].detach().numpy())
    terms = {name: np.asarray([row[name].item() for row in rows]) for name in TERMS}
    return terms | {"logits": np.stack(logits), "gradient_norms": norms(module_gradient(module))}


if __name__ == "__main__":
    np.savez_compressed(PATH, **reference_outputs())  # type: ignore[arg-type]
    print(f"wrote {PATH}")
