"""What a model can do: generation, and later benchmark suites and reports."""
