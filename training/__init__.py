"""What the methods share: photos as cached latents, seeded draws, the one loop, and the live picture."""
