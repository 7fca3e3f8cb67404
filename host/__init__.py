"""The only files of the pack that touch ComfyUI's own modules; every other layer goes through these."""
