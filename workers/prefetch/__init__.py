"""What to fetch before it is asked for: sources of candidates, and what decides which of them are worth a read."""
