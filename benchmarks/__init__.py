"""Side-by-side measurements: ours, peers, and the least that the hardware must do."""
