"""The run directory: what is finished of a run, on the disk, so that it can go on after a kill."""
