"""Talk to a Hugging Face checkpoint in the terminal.

python tools/chat.py checkpoints/Llama-3-zh-chat --system "Answer in Chinese."
"""

from megatron_cpt.config.cli import run_tool
from megatron_cpt.posttrain.chat import ChatConfig, chat

if __name__ == "__main__":
    run_tool(chat, ChatConfig, "Talk to a Hugging Face checkpoint.", positional="model")
