"""Measurements against peers, always as ratios within one run."""
