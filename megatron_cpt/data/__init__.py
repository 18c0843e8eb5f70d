"""Corpora on disk and the order in which training reads them: preprocessing, indexed files, mixtures. No torch here."""
