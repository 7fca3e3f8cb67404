"""E4T: an encoder, pretrained once for a domain, that finds the word for a picture in a few steps."""
