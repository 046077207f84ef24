"""The networks of `reference` once more, as an expert of PyTorch would time them.

A module for each that has been written so; `benchmark` takes the reference itself for the others.
Parameters and their names are the reference's, and tests hold values and gradients against it.

Each module has

- `network(config)`: with the reference's parameters;
- `Objective(network, config, stage, batch, class_weights, parts)`: a module that maps what
  `inputs(config, stage, batch)` makes of a batch to the means of the losses' terms over its scans;
- `Forward(network, config, stage, batch, parts)`: the same inputs to `lesion` and `logits`;
- `Predictor(network, config, shape, parts)`: a preprocessed scan to its volumes and classes.

Nothing in them waits for the device, and none has control flow that depends on data, so that
`torch.compile` makes one graph of each.
"""
