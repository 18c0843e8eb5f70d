"""The order of the data: which tokens of which corpus are sample n of a run. Integers only, nothing is materialised.

permutation   keyed hash and keyed permutation
splitters     which corpus: trees of Bresenham splitters, and stages that change them
order         both together: sample n -> corpus, epoch, sample, first token; in Python (the specification) and C++
cuda          the same on a GPU
"""
