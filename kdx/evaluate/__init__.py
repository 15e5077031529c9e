"""Do the maps of a run mean something? Metrics of maps, with known masks and without, next to other methods and to baselines."""
