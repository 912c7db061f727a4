"""The library measured beside plain C, interleaved, in one process: what `scripts/bench` runs."""
