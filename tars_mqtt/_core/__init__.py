"""The engine behind both clients; nothing in here is public."""
