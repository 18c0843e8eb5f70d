"""The ALMR x LR study: many short runs, and what they say about the mixture ratio and the learning rate to use."""
