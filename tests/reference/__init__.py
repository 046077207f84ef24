"""DeepSC-COVID in plain PyTorch: what the Flax network must compute, as a specification.

Written for reading, not for speed. Volumes are `(batch, channel, depth, height, width)`. Where the
Flax code pads and masks, the reference does neither: every tile is computed by itself, cut to the
slices that its scan has, so that torch's own operators apply as they are.
"""
