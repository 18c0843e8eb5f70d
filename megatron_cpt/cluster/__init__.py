"""What somebody runs first on a cluster: do its parts, and the product's promises on them, hold?"""
