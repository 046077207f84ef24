"""The network of the paper and the geometry that joins its two grids."""
