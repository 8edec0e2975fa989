"""What training does to a mechanism: what came back, and by which way it went."""
