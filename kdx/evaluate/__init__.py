"""Do the maps mean something? Metrics of maps, and their computation for the images of a run."""
