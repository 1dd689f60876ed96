"""What `raykeras doctor` finds out about machines and clusters, and its judgement."""
