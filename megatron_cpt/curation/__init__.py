"""Raw corpora -> curated JSON Lines: filters, language identification and deduplication, on datatrove."""
