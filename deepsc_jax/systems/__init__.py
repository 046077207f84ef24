"""Tasks with their data, into which models are put: what the engine trains, runs and plans."""
