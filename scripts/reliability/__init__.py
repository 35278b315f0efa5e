"""Does it keep its promises? Faults at random, with an account of every event, and figures: `scripts/soak`."""
