"""Work in other processes, on this machine or on several: workers, the tasks that they compute, and what happens when one ends."""
