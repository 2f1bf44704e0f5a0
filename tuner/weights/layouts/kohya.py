"""How kohya's names end, which A1111, Forge and ComfyUI read: `lora_unet_down_blocks_0_….lora_down.weight`.

How they begin, and what stands for a module in between, is in `modules`.
"""

DOWN = ".lora_down.weight"
UP = ".lora_up.weight"
ALPHA = ".alpha"
