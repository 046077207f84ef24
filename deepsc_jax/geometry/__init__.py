"""The grids of a scan, and the one resampling between them."""
