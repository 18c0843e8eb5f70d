"""mixture.yaml -> which tokens are sample n of a run: file, stages, ledger, order, batches. No torch here."""
