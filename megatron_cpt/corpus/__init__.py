"""Text -> Megatron's indexed corpora with manifests: preprocess, merge, inspect, import. No torch here."""
