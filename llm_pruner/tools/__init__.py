"""Commands to look at models: inspect, chat, demo."""
