"""What a training step needs of a cluster, found by compiling it without the cluster."""
