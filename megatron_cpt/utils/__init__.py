"""What every room uses, once: errors, files that are read with limits, locks, signals, the console, progress."""
