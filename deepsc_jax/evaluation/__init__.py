"""A trained network's figures on a split of a store."""
