"""What a run leaves behind: its folder, metrics, samples, checkpoints, provenance; and what mirrors or shows them."""
