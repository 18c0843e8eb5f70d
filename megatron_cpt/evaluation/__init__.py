"""What models can do: benchmarks, bits per byte, the language of answers, comparisons; reports of them."""
