"""Talk to a Hugging Face checkpoint in the terminal.

python tools/chat.py checkpoints/Llama-3-zh-chat --system "Answer in Chinese."
"""

from megatron_cpt.config.cli import run_tool

if __name__ == "__main__":
    run_tool(
        "megatron_cpt.posttrain.chat:chat",
        "megatron_cpt.posttrain.settings:ChatConfig",
        "Talk to a Hugging Face checkpoint.",
        positional="model",
        check="megatron_cpt.posttrain.run_files:check_chat",
    )
