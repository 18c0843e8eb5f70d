"""Before a run: which layouts fit a cluster, how fast they are, and what one rank of the real job holds."""
