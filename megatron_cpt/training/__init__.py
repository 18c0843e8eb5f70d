"""The training run: setup -> main -> fit -> evaluate -> save. What is checked of it without torch: run_files."""
