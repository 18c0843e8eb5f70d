"""SFT and DPO on Hugging Face checkpoints: data, templates, and TRL's trainers."""
