"""The only files of the pack, besides the sample model's, that touch ComfyUI's own modules."""
